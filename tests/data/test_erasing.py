"""Boxes are erased as timm and torchvision erase them, wherever the images come from."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing, functional

from recipe.data import HeldImages, TrainLoader, ValidationLoader, open_datasets
from recipe.data.augment import erased_boxes
from recipe.data.erasing import Erasing, fill_boxes
from tests.data.images import MEAN, STD, assert_same

SIZE = 64


def test_boxes_are_distributed_as_torchvision_draws_them():
    """By timm's bounds, whose rule is the same."""
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


def test_as_many_images_have_a_box_as_is_said():
    drawn = [erased_boxes(0, 0, torch.arange(4000), SIZE, share)[:, 2:].amin(1) > 0 for share in (0, 0.25, 1)]
    assert [int(boxes.sum()) for boxes in drawn[::2]] == [0, 4000]
    assert abs(float(drawn[1].float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_a_box_is_filled_as_torchvision_fills_it():
    images = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    boxes = erased_boxes(3, 1, torch.arange(40), SIZE, 0.5)
    expected = [
        functional.erase(image, *box, torch.tensor(0.0)) for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    assert torch.equal(fill_boxes(images, boxes), torch.stack(expected))


@pytest.mark.parametrize("way", ["held", "two workers", "two ranks"])
def test_the_same_boxes_on_any_rank_and_by_any_way_and_none_in_validation(way):
    plain = open_datasets("digits", None, 16, "padded", True, 3, "stop")
    options = {"device": "cpu", "dtype": torch.float32, "mean": MEAN, "std": STD}

    def batches(dataset, rank=0, world_size=1, workers=0):
        split = {"global_batch": 64, "micro_batch": 32, "rank": rank, "world_size": world_size, "seed": 1}
        loader = TrainLoader(dataset, **split, workers=workers, **options)
        found = list(loader.epoch(2, first_step=18))
        loader.close()
        return found

    untouched = torch.cat([batch.images for batch in batches(plain[0])])
    plain[0].erasing = Erasing(0.5, 3)
    expected = batches(plain[0])
    erased = (torch.cat([batch.images for batch in expected]) != untouched).flatten(1).any(1)
    assert 0 < int(erased.sum()) < len(erased)
    if way == "held":
        held = HeldImages(plain[0], torch.device("cpu"), training=True)
        held.erasing = plain[0].erasing
        assert_same(batches(held), expected)
    elif way == "two workers":
        assert_same(batches(plain[0], workers=2), expected)
    else:
        ranks = [batches(plain[0], rank=rank, world_size=2) for rank in range(2)]
        assert_same([batch for step in zip(*ranks, strict=True) for batch in step], expected)
    seen = next(ValidationLoader(plain[1], micro_batch=8, rank=0, world_size=1, workers=0, **options).batches())
    assert not (seen.images == 0).any()
