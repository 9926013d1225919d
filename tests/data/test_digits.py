import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from recipe.data import open_datasets
from tests.data.images import sample


def digits(crop: str = "none", image_size: int = 8):
    return open_datasets("digits", None, image_size=image_size, crop=crop, flip=False, seed=0)


def test_every_fifth_image_of_each_class_is_held_out():
    pixels, labels = load_digits(return_X_y=True)
    train, validation = digits()
    assert (len(train), len(validation)) == (1442, 355)
    assert train.classes == validation.classes == 10

    expected = {"train": [], "validation": []}
    seen = dict.fromkeys(range(10), 0)
    for image, label in zip(pixels, labels, strict=True):
        seen[label] += 1
        expected["validation" if seen[label] % 5 == 0 else "train"].append((image, label))
    for name, dataset in (("train", train), ("validation", validation)):
        for index, (image, label) in enumerate(expected[name]):
            found = sample(dataset, index)
            assert found.label == label
            assert np.abs(found.image.numpy().reshape(64, 3).T - image * 255 / 16).max() <= 0.5


@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
def test_digits_are_enlarged_and_cropped(crop):
    train, validation = digits(crop, image_size=24)
    images = torch.stack([sample(validation, index).image for index in range(100)])
    assert images.shape == (100, 24, 24, 3)
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert sample(train, (3, 5)).label == sample(train, 5).label
    moved = not torch.equal(sample(train, (3, 5)).image, sample(train, (4, 5)).image)
    assert moved == (crop != "none")
