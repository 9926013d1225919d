"""The moving average of the weights follows its closed form for any batch, number of ranks and precision."""

import math
from collections.abc import Set
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.test_start import PRECISIONS, master_weights, new_engine, train_step
from tests.ranks import run_ranks

BATCH, DECAY = 16, 0.99


def _averages(rank: int, world_size: int) -> dict[str, tuple[list[dict], list[dict[str, Tensor]]]]:
    """For each precision, the master weights after each step and their average."""
    found = {}
    for precision, sections in PRECISIONS.items():
        engine = new_engine(world_size, BATCH, 2, ema_decay=DECAY, **sections)
        history, averages = [], []
        for step in range(6):
            train_step(engine, rank, world_size, step, BATCH)
            history.append(master_weights(engine))
            state = engine.weight_average.state()["tensors"]
            averages.append({name: value.clone() for name, value in state.items()})
        found[precision] = history, averages
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_average_starts_as_the_plain_mean(world_size: int) -> None:
    # 1 − 0.99¹⁶ = 0.1485, which 1 / n exceeds up to the sixth step.
    for found in run_ranks(world_size, _averages):
        for precision, (history, averages) in found.items():
            for step, average in enumerate(averages):
                for name, value in average.items():
                    mean = torch.stack([weights[name].double() for weights in history[: step + 1]]).mean(0)
                    torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6, msg=f"{precision} {name}")


def averaged(weights: list[float], batches: list[int], skipped: Set[int] = frozenset()) -> float:
    """The average after steps with these resulting weights on these batch sizes, without DeepSpeed and in fp64."""
    from recipe.engine.averaging import WeightAverage

    module = torch.nn.Linear(1, 1, bias=False).double()
    engine: Any = SimpleNamespace(
        module=module, optimizer=None, device=torch.device("cpu"), train_batch_size=partial(next, iter(batches))
    )
    average = WeightAverage(engine, DECAY)
    for step, weight in enumerate(weights):
        with torch.no_grad():
            module.weight.fill_(weight)
        average.update(torch.tensor(step in skipped))
    return float(average.state()["tensors"]["weight"])


def test_the_decay_per_image_does_not_depend_on_the_batch() -> None:
    """With w = 1 until the mean is no longer plain, then w = 0 for 1,600 images, the average is 0.99¹⁶⁰⁰."""
    for batch in (16, 160, 800):
        weights = [1.0] * math.ceil(1 / (1 - DECAY**batch)) + [0.0] * (1600 // batch)
        assert averaged(weights, [batch] * len(weights)) == pytest.approx(DECAY**1600, rel=1e-9)


def test_a_changed_batch_counts_by_its_images() -> None:
    assert averaged([5.0, 1.0], [16, 32]) == pytest.approx((16 * 5 + 32 * 1) / 48)
    warm = math.ceil(1 / (1 - DECAY**16))  # the plain mean of ones is one
    assert averaged([1.0] * warm + [0.0], [16] * warm + [800]) == pytest.approx(DECAY**800)


def test_a_skipped_step_does_not_count() -> None:
    assert averaged([5.0, 1.0, 5.0, 2.0, 6.0], [16] * 5, skipped={0, 2}) == pytest.approx((1 + 2 + 6) / 3)
