"""Gradient all-reduce during the backward pass: the mean over the ranks, in whatever order gradients arrive."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipe.engine import overlap
from recipe.engine.overlap import make_buckets
from tests.engine.test_start import new_engine, samples, train_step
from tests.ranks import run_ranks


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def test_buckets_go_from_the_last_to_the_first_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 16)
    for dtype, sizes in ((torch.float32, [4, 5, 6]), (torch.float16, [9, 6])):
        assert [bucket.message.numel() for bucket in make_buckets(parameters(5, 1, 2, 3, 4), dtype)] == sizes
    assert make_buckets([], torch.float32) == []


class Branches(nn.Module):
    """Two weights that are used in either order, and one that is not used, as some in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.first, self.second = parameters(2, 3, 3)

    def forward(self, x: Tensor, swapped: bool) -> Tensor:
        a, b = (self.second, self.first) if swapped else (self.first, self.second)
        return ((x * a).sin() * b).sum()


def _reduced(rank: int, world_size: int, settings: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    from recipe.engine.start import join_process_group

    join_process_group(torch.device("cpu"), timedelta(seconds=60))
    torch.manual_seed(rank)
    model = Branches().double()
    for parameter in model.parameters():
        parameter.data.normal_()
    due = False
    sent: list[int] = []
    all_reduce = dist.all_reduce
    overlap.BUCKET_BYTES = 1
    reduction = overlap.OverlappedReduction(
        model.parameters(), dist.group.WORLD, lambda: due, torch.float64, **settings
    )
    dist.all_reduce = lambda tensor, **words: (sent.append(tensor.numel()), all_reduce(tensor, **words))[1]
    own: list[Tensor] = []
    for due in (False, True):
        # Rank 1's gradients arrive in the other order; the ranks must still send the same messages.
        model(torch.randn(3, dtype=torch.float64), swapped=rank == 1).backward()
        if due:
            early = list(sent)
            own = [torch.zeros(2).double() if p.grad is None else p.grad.clone() for p in model.parameters()]
        reduction.finish()
        assert due or not sent
    assert early == [3, 3]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, own)
    expected = [torch.stack(values).mean(0) for values in zip(*gathered, strict=True)]
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], expected, sent


@pytest.mark.parametrize("factors", [{"before": 1.0, "after": 0.5}, {"before": 0.5, "after": 1.0}])
def test_gradients_are_averaged_at_the_end_of_an_accumulation(factors: dict) -> None:
    for gradients, expected, sent in run_ranks(2, _reduced, factors):
        assert sent == [3, 3, 2]  # the weight without a gradient is the last
        for gradient, mean in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, mean, rtol=1e-14, atol=1e-14)


def _messages_sent_at_the_end_of_backward(rank: int, world_size: int) -> list[int]:
    started: list[int] = []
    all_reduce = dist.all_reduce
    overlap.BUCKET_BYTES = 1
    engine = new_engine(world_size, 16, 2)
    dist.all_reduce = lambda tensor, **words: (started.append(tensor.numel()), all_reduce(tensor, **words))[1]
    counts, finish = [], engine.allreduce_gradients

    def count_and_finish() -> None:
        counts.append(len(started))
        finish()

    engine.allreduce_gradients = count_and_finish
    train_step(engine, rank, world_size, 0, 16)
    return counts


def test_the_engine_reduces_in_the_last_backward_pass_of_an_accumulation() -> None:
    for counts in run_ranks(2, _messages_sent_at_the_end_of_backward):
        assert counts == [0, 4]  # one per weight, before DeepSpeed would reduce


def _gradients(rank: int, world_size: int, sections: dict[str, Any]) -> list[Tensor]:
    from recipe.engine.start import backward

    engine = new_engine(world_size, 8, 1, **sections)
    images, labels = samples(rank, 4)
    backward(engine, nn.functional.cross_entropy(engine(images), labels))
    return [parameter.grad.clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 2.0},
        {"communication_data_type": "bf16"},
        {"communication_data_type": "fp16", "prescale_gradients": True},
    ],
)
def test_deepspeeds_settings_work_as_without_overlap(settings: dict) -> None:
    overlapped = run_ranks(2, _gradients, settings)
    blocking = run_ranks(2, _gradients, settings | {"zero_optimization": {"overlap_comm": False}})
    for ours, theirs in zip(overlapped, blocking, strict=True):
        for gradient, reference in zip(ours, theirs, strict=True):
            assert torch.equal(gradient, reference)  # exact, because a sum of two numbers has only one order
