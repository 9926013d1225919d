"""Validation on real ranks, compared with a direct count, and label smoothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ranks import run_ranks

CLASSES = 7


class Lookup(nn.Module):
    """Returns row k of a fixed table of logits for an image whose first pixel is k."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long()]


def logits_and_labels(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, CLASSES, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def _evaluated(rank: int, world_size: int, cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    from recipe.data import Batch
    from recipe.data.sampler import PADDING, ValidationSampler
    from recipe.engine.loop import evaluate

    results = []
    for count, micro in cases:
        logits, labels = logits_and_labels(count)
        batches = []
        for keys in ValidationSampler(count, micro_batch=micro, rank=rank, world_size=world_size):
            indices = torch.from_numpy(keys.indices).clamp(min=0)
            weights = torch.from_numpy(keys.indices != PADDING).float()
            images = indices.float()[:, None, None, None].expand(-1, 3, 2, 2)
            batches.append(Batch(images, labels[indices], weights, ()))
        results.append(vars(evaluate(Lookup(logits), batches, torch.device("cpu"))))
    return results


def test_label_smoothing_spreads_a_share_of_each_label_over_all_classes() -> None:
    """Szegedy et al. (2016), section 7: the distribution of a label is (1 − ε) δ + ε / K."""
    from recipe.engine.loop import training_loss

    logits, labels = logits_and_labels(9)
    smoothed = 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    found = training_loss(nn.Identity(), label_smoothing=0.1, compiled=False)(logits, labels)
    torch.testing.assert_close(found, expected)
    plain = training_loss(nn.Identity(), label_smoothing=0.0, compiled=False)(logits, labels)
    assert torch.equal(plain, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_validation_image_counts_once(world_size: int) -> None:
    cases = [(1, 1), (23, 4), (24, 4), (25, 4), (97, 8), (3, 8)]
    for results in run_ranks(world_size, _evaluated, cases):
        for (count, _), result in zip(cases, results, strict=True):
            logits, labels = logits_and_labels(count)
            ranking = logits.argsort(1, descending=True)
            assert result["count"] == count
            assert result["top1"] == pytest.approx(100 * (ranking[:, 0] == labels).float().mean().item())
            in_five = (ranking[:, :5] == labels[:, None]).any(1)
            assert result["top5"] == pytest.approx(100 * in_five.float().mean().item())
            assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
