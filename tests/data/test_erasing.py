"""Random erasing follows timm and torchvision, on every way from an image to the device."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing, functional

from recipe.data import HeldImages, open_datasets
from recipe.data.augment import Erasing, erased_boxes, fill_boxes
from tests.data.images import CPU, assert_same, train_loader, validation_loader

SIZE = 64


def test_boxes_have_torchvisions_distribution():
    """With timm's bounds; the rule is the same."""
    draws, image = 3000, torch.zeros(3, SIZE, SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        params = [RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])[:4] for _ in range(draws)]
    ours = erased_boxes(1, 2, torch.arange(draws), SIZE, 1).numpy()
    features = []
    for top, left, height, width in (ours.T, np.array(params).T):
        features.append((top, left, height, width, height * width, height / width, top + height / 2, left + width / 2))
    for mine, theirs in zip(*features, strict=True):
        assert ks_2samp(mine, theirs).pvalue > 1e-3


def test_boxes_are_erased_with_the_given_probability():
    drawn = [erased_boxes(0, 0, torch.arange(4000), SIZE, share)[:, 2:].amin(1) > 0 for share in (0, 0.25, 1)]
    assert [int(boxes.sum()) for boxes in drawn[::2]] == [0, 4000]
    assert abs(float(drawn[1].float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_boxes_are_filled_like_torchvisions():
    images = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    boxes = erased_boxes(3, 1, torch.arange(40), SIZE, 0.5)
    expected = [
        functional.erase(image, *box, torch.tensor(0.0)) for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    assert torch.equal(fill_boxes(images, boxes), torch.stack(expected))
    interleaved = fill_boxes(images.to(memory_format=torch.channels_last), boxes)
    assert interleaved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", ["held", "two workers", "two ranks"])
def test_erased_batches_are_the_same_on_every_rank_and_way_and_validation_erases_nothing(way):
    train, validation = open_datasets("digits", None, image_size=16, crop="padded", flip=True, seed=3)

    def batches(dataset, **changes):
        loader = train_loader(dataset, global_batch=64, micro_batch=32, **changes)
        found = list(loader.epoch(2, first_step=18))
        loader.close()
        return found

    untouched = torch.cat([batch.images for batch in batches(train)])
    train.erasing = Erasing(0.5, 3)
    expected = batches(train)
    erased = (torch.cat([batch.images for batch in expected]) != untouched).flatten(1).any(1)
    assert 0 < int(erased.sum()) < len(erased)
    if way == "held":
        held = HeldImages(train, CPU, training=True)
        held.erasing = train.erasing
        assert_same(batches(held), expected)
    elif way == "two workers":
        assert_same(batches(train, workers=2), expected)
    else:
        ranks = [batches(train, rank=rank, world_size=2) for rank in range(2)]
        assert_same([batch for step in zip(*ranks, strict=True) for batch in step], expected)
    assert not (next(validation_loader(validation).batches()).images == 0).any()
