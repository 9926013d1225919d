"""Batch norm over exactly n samples, compared with plain batch norm on each group of n neighbours, for any split."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipe.model.batchnorm import BatchNorm, join_neighbours
from recipe.model.running_averages import (
    average_running_statistics,
    gather_running_averages,
    restore_running_averages,
    update_running_averages,
)
from tests.engine.test_start import Waits
from tests.ranks import run_ranks

N, CHANNELS, BATCH, STEPS = 4, 3, 16, 2


def samples(step: int) -> tuple[Tensor, Tensor]:
    """A global batch and its output gradient; each sample has a different mean and scale."""
    generator = torch.Generator().manual_seed(step)
    x, dy = torch.randn(2, BATCH, CHANNELS, 3, 2, generator=generator, dtype=torch.float64)
    number = torch.arange(BATCH, dtype=torch.float64).view(-1, 1, 1, 1)
    return x * (1 + number / 5) + number, dy + 0.3


def expected() -> dict[str, Any]:
    """Results of torch's own batch norm on each group, with running averages computed by hand from the groups' mean."""
    module = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    parameters(module)
    running_mean, running_var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    result: dict[str, Any] = {"outputs": [], "gradients": [], "weight": [], "bias": []}
    for step in range(STEPS):
        x, dy = samples(step)
        x.requires_grad_()
        module.zero_grad()
        y = torch.cat([module(group) for group in x.split(N)])
        y.backward(dy)
        result["outputs"].append(y.detach())
        result["gradients"].append(x.grad)
        result["weight"].append(module.weight.grad.clone())
        result["bias"].append(module.bias.grad.clone())
        means = torch.stack([group.mean((0, 2, 3)) for group in x.detach().split(N)])
        variances = torch.stack([group.transpose(0, 1).flatten(1).var(1) for group in x.detach().split(N)])
        running_mean = 0.9 * running_mean + 0.1 * means.mean(0)
        running_var = 0.9 * running_var + 0.1 * variances.mean(0)
    return result | {"running_mean": running_mean, "running_var": running_var}


def parameters(module: nn.Module) -> None:
    module.weight.data = torch.tensor([0.5, 1.0, 2.0]).to(module.weight.dtype)
    module.bias.data = torch.tensor([0.1, 0.0, -0.3]).to(module.bias.dtype)


Split = tuple[int, torch.dtype, bool]  # micro-batch, dtype, channels_last


def _splits(rank: int, world_size: int, splits: list[Split]) -> list[dict[str, Any]]:
    return [_split(rank, world_size, *split) for split in splits]


def _split(rank: int, world_size: int, micro: int, dtype: torch.dtype, channels_last: bool) -> dict[str, Any]:
    """The same global batches split over ranks and accumulation steps; results are in the order of the batch."""
    module = BatchNorm(CHANNELS, statistics=N, dtype=torch.promote_types(dtype, torch.float32))
    parameters(module)
    module.weight.data, module.bias.data = module.weight.data.to(dtype), module.bias.data.to(dtype)
    join_neighbours(module, micro)
    result: dict[str, Any] = {"outputs": [], "gradients": [], "weight": [], "bias": [], "layout": True}
    for step in range(STEPS):
        x_all, dy_all = samples(step)
        outputs, gradients = torch.zeros_like(x_all), torch.zeros_like(x_all)
        module.zero_grad()
        for accumulation in range(BATCH // world_size // micro):
            first = (accumulation * world_size + rank) * micro
            x, dy = (t[first : first + micro].to(dtype) for t in (x_all, dy_all))
            if channels_last:
                x = x.to(memory_format=torch.channels_last)
            x.requires_grad_()
            y = module(x)
            y.backward(dy)
            outputs[first : first + micro], gradients[first : first + micro] = y.detach(), x.grad
            result["layout"] &= not channels_last or y.is_contiguous(memory_format=torch.channels_last)
        before = module.running_mean.clone()
        average_running_statistics(module)
        assert torch.equal(before, module.running_mean)
        update_running_averages(module)
        for name, value in zip(
            ("outputs", "gradients", "weight", "bias"),
            (outputs, gradients, module.weight.grad.clone(), module.bias.grad.clone()),
            strict=True,
        ):
            result[name].append(value)
    return result | {"running_mean": module.running_mean, "running_var": module.running_var}


@pytest.mark.parametrize(
    ("world_size", "micros"), [(1, [4, 8, 16]), (2, [2, 4, 8]), (4, [1, 2, 4])], ids=["1 rank", "2 ranks", "4 ranks"]
)
def test_any_split_gives_the_same_groups(world_size: int, micros: list[int]) -> None:
    reference = expected()
    splits: list[Split] = [
        (micro, dtype, channels_last)
        for micro in micros
        for dtype, channels_last in ((torch.float64, False), (torch.float64, True), (torch.float32, False))
    ]
    of_ranks = run_ranks(world_size, _splits, splits)
    for number, (_, dtype, _) in enumerate(splits):
        ranks = [splits_of_rank[number] for splits_of_rank in of_ranks]
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for name in ("outputs", "gradients", "weight", "bias"):
            for step in range(STEPS):
                # Each rank has its own samples, and its share of the parameters' gradients.
                whole = sum(rank[name][step].double() for rank in ranks)
                torch.testing.assert_close(whole, reference[name][step], rtol=tolerance, atol=tolerance * 10)
        for rank in ranks:
            assert rank["layout"]
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(rank[name].double(), reference[name], rtol=tolerance, atol=tolerance * 10)
                assert torch.equal(rank[name], ranks[0][name])


def test_a_skipped_update_does_not_change_the_running_averages() -> None:
    module = BatchNorm(CHANNELS, statistics=N)
    module(torch.full((N, CHANNELS, 2, 2), torch.inf))
    with Waits() as waits:
        update_running_averages(module, discard=torch.tensor(True))
    assert waits.count == 0
    assert torch.equal(module.running_mean, torch.zeros(CHANNELS))
    update_running_averages(module)  # of a step that has not called the module
    assert torch.equal(module.running_mean, torch.zeros(CHANNELS))
    module.num_batches_tracked.zero_()
    module(torch.randn(N, CHANNELS, 2, 2))
    update_running_averages(module, discard=torch.tensor(False))
    assert module.running_mean.isfinite().all()
    assert int(module.num_batches_tracked) == 1


def _averaged_and_restored(rank: int, world_size: int) -> dict[str, Any]:
    """The running averages during a checkpoint and after it, starting from r + 1 and r + 10 on rank r."""
    norm = BatchNorm(2, statistics="local")
    norm.running_mean.fill_(rank + 1.0)
    norm.running_var.fill_(rank + 10.0)
    own = gather_running_averages(norm)
    average_running_statistics(norm)
    saved = norm.running_mean.tolist() + norm.running_var.tolist()
    restore_running_averages(norm, own)
    again = norm.running_mean.tolist() + norm.running_var.tolist()
    assert own is not None
    restore_running_averages(norm, own[:1])  # from a different number of ranks: ignored
    assert norm.running_mean.tolist() + norm.running_var.tolist() == again
    return {"saved": saved, "again": again, "global": gather_running_averages(BatchNorm(2, statistics="global"))}


def test_a_checkpoint_holds_the_mean_and_each_rank_keeps_its_own() -> None:
    first, second = run_ranks(2, _averaged_and_restored)
    assert first["saved"] == second["saved"] == [1.5, 1.5, 10.5, 10.5]
    assert first["again"] == [1.0, 1.0, 10.0, 10.0]
    assert second["again"] == [2.0, 2.0, 11.0, 11.0]
    assert first["global"] is None
