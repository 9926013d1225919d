"""The moving average of the weights: its closed form, whatever the batch, the ranks and the precision."""

import math
from collections.abc import Set
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.test_start import PRECISIONS, master_weights, new_engine, samples, train_step
from tests.ranks import run_ranks

BATCH, DECAY = 16, 0.99


def _averages(rank: int, world_size: int) -> dict[str, tuple[list[dict], list[dict[str, Tensor]]]]:
    """By precision: the master weights after each step, and their average."""
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
def test_it_is_the_plain_mean_at_first_and_then_decays_by_image(world_size: int) -> None:
    # 1 − 0.99¹⁶ = 0.1485: from the seventh step on 1 / n is smaller, so that six steps give the plain mean.
    for found in run_ranks(world_size, _averages):
        for precision, (history, averages) in found.items():
            for step, average in enumerate(averages):
                for name, value in average.items():
                    mean = torch.stack([weights[name].double() for weights in history[: step + 1]]).mean(0)
                    torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6, msg=f"{precision} {name}")


class Engine:
    """What an average looks at: a module with one weight, in fp64, without DeepSpeed."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.module, self.optimizer, self.device = torch.nn.Linear(1, 1, bias=False).double(), None, torch.device("cpu")

    def train_batch_size(self) -> int:
        return self.batch


def averaged(batch: int, weights: list[float], skipped: Set[int] = frozenset(), then: int = 0) -> float:
    """The average after steps that leave these weights, the last of them on ``then`` images, if that is not 0."""
    from recipe.engine.averaging import WeightAverage

    engine: Any = Engine(batch)
    average = WeightAverage(engine, DECAY)
    for step, weight in enumerate(weights):
        if then and step == len(weights) - 1:
            engine.batch = then
        with torch.no_grad():
            engine.module.weight.fill_(weight)
        average.update(torch.tensor(step in skipped))
    return float(average.state()["tensors"]["weight"])


def test_a_batch_does_not_change_how_far_it_looks_back() -> None:
    """Of w = 1 for as long as the mean is plain and w = 0 for 1,600 images after that, 0.99¹⁶⁰⁰ is left."""
    for batch in (16, 160, 800):
        warm = math.ceil(1 / (1 - DECAY**batch))
        left = averaged(batch, [1.0] * warm + [0.0] * (1600 // batch))
        assert left == pytest.approx(DECAY**1600, rel=1e-9)


def test_a_batch_that_changes_counts_by_its_images() -> None:
    assert averaged(16, [5.0, 1.0], then=32) == pytest.approx((16 * 5 + 32 * 1) / 48)
    left = 1 - (warm := math.ceil(1 / (1 - DECAY**16))) / warm  # the plain mean of ones is one
    assert averaged(16, [1.0] * warm + [0.0], then=800) == pytest.approx(DECAY**800 + left)


def test_a_skipped_step_does_not_count() -> None:
    assert averaged(16, [5.0, 1.0, 5.0, 2.0, 6.0], skipped={0, 2}) == pytest.approx((1 + 2 + 6) / 3)


def _validated(rank: int, world_size: int) -> list[tuple[bool, bool]]:
    """Whether the average's logits are those of a model that has been given it, and the model is as it was."""
    same = []
    for sections in PRECISIONS.values():
        engine = new_engine(world_size, BATCH, 2, ema_decay=DECAY, **sections)
        for step in range(3):
            train_step(engine, rank, world_size, step, BATCH)
        images = samples(9, 4)[0].to(next(engine.module.parameters()).dtype)
        before = [parameter.clone() for parameter in engine.module.parameters()]
        with torch.no_grad():
            found = engine.weight_average.forward()(images)
            after = list(engine.module.parameters())
            unchanged = all(map(torch.equal, before, after))
            for name, parameter in engine.module.named_parameters():
                parameter.copy_(engine.weight_average.state()["tensors"][name])
            same.append((torch.equal(found, engine.module(images)), unchanged))
    return same


def test_validation_sees_the_average_and_leaves_the_weights_alone() -> None:
    assert run_ranks(1, _validated) == [[(True, True)] * 3]
