"""Mixup and CutMix against hand-computed values, for every split of the batch."""

import math
from itertools import chain

import pytest
import torch
from torch import Tensor

from recipe.data.batch import Batch
from recipe.data.mixing import Mixed, Mixing, mix_neighbours

CLASSES, SIZE = 3, 8


def batch(images: Tensor, labels: list[int]) -> Batch:
    return Batch(images, torch.tensor(labels), torch.ones(len(labels)))


def plain(values: list[float]) -> Tensor:
    """Images of a single colour each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def test_mixup_blends_neighbours() -> None:
    found = mix_neighbours(batch(plain([0.0, 1.0, 10.0, 20.0]), [0, 1, 2, 2]), Mixed(0.75), CLASSES)
    torch.testing.assert_close(found.images, plain([0.25, 0.75, 12.5, 17.5]))
    expected = [[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0, 1], [0, 0, 1]]
    torch.testing.assert_close(found.labels, torch.tensor(expected))


def test_cutmix_inserts_a_box_of_the_neighbour() -> None:
    found = mix_neighbours(batch(plain([1.0, 2.0]), [0, 1]), Mixed(1 - 6 / 64, (1, 2, 3, 5)), CLASSES)
    for image, own, other in ((found.images[0], 1.0, 2.0), (found.images[1], 2.0, 1.0)):
        expected = torch.full((3, SIZE, SIZE), own)
        expected[:, 1:3, 2:5] = other
        assert torch.equal(image, expected)
    torch.testing.assert_close(found.labels, torch.tensor([[58 / 64, 6 / 64, 0], [6 / 64, 58 / 64, 0]]))


def mixing(seed: int = 0) -> Mixing:
    return Mixing((0.3, 0.2), (0.5, 1.0), CLASSES, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_split_is_mixed_the_same_way(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 8, 3, SIZE, SIZE, generator=generator).to(dtype)  # six steps of eight samples
    labels = torch.randint(CLASSES, (6, 8), generator=generator).tolist()
    whole = list(mixing().mix(map(batch, images, labels), 5, 1))
    for micro in (4, 2):
        parts = [
            batch(images[s, i : i + micro], labels[s][i : i + micro]) for s in range(6) for i in range(0, 8, micro)
        ]
        found = list(mixing().mix(parts, 5, 8 // micro))
        for name in ("images", "labels"):
            joined = torch.cat([getattr(one, name) for one in found])
            assert torch.equal(joined, torch.cat([getattr(one, name) for one in whole])), (micro, name)
    # A run that resumes three steps later, and channels_last images.
    later = list(mixing().mix(map(batch, images[3:], labels[3:]), 8, 1))
    channels_last = mix_neighbours(
        batch(images[0].to(memory_format=torch.channels_last), labels[0]), mixing().draw(5, SIZE), CLASSES
    )
    assert all(torch.equal(one.images, other.images) for one, other in zip(later, whole[3:], strict=True))
    assert torch.equal(channels_last.images, whole[0].images)
    assert channels_last.images.is_contiguous(memory_format=torch.channels_last)


def test_batches_are_unchanged_without_mixing() -> None:
    before = batch(plain([1.0, 2.0]), [0, 1])
    assert list(Mixing((0.0, 0.2), (0.0, 1.0), CLASSES, 0).mix([before], 0, 1)) == [before]


def test_mixing_has_the_configured_probabilities_and_shares() -> None:
    """Over many steps, within four standard errors; Beta(α, α) has mean ½, and boxes are clipped at the border."""
    steps = 4000
    drawn = [mixing().draw(step, 224) for step in range(steps)]
    cut = [how for how in drawn if how.box is not None]
    blended = [how.share for how in drawn if how.box is None and how.share < 1]
    for count, probability in ((len(blended), 0.3), (len(cut), 0.5)):
        assert abs(count / steps - probability) < 4 * math.sqrt(probability * (1 - probability) / steps)
    deviation = math.sqrt(0.25 / (2 * 0.2 + 1))  # the variance of Beta(α, α) is 1 / (4 (2α + 1))
    assert abs(sum(blended) / len(blended) - 0.5) < 4 * deviation / math.sqrt(len(blended))
    for how in cut:
        assert how.box is not None
        top, left, bottom, right = how.box
        assert 0 <= top <= bottom <= 224
        assert 0 <= left <= right <= 224
        assert how.share == pytest.approx(1 - (bottom - top) * (right - left) / 224**2)
    assert min(how.share for how in cut) < 0.1
    assert len({how.share for how in chain(drawn, (mixing(seed=1).draw(step, 224) for step in range(steps)))}) > steps
