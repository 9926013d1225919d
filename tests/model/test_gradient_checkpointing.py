"""Gradient checkpointing repeats forward passes in the backward pass; the results must not change."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.model.batchnorm import BatchNorm, Statistics, join_neighbours
from recipe.model.build import build_model
from recipe.model.running_averages import update_running_averages
from tests.ranks import run_ranks

MICRO_BATCH, ACCUMULATION, STEPS = 4, 3, 2


def trained(model: nn.Module, rank: int, passes: list[int] | None = None) -> list[Tensor]:
    """Losses, gradients, running averages and their counts of two steps of three micro-batches."""
    generator, losses = torch.Generator().manual_seed(rank), []
    if passes is not None:
        norm = next(module for module in model.layer1.modules() if isinstance(module, BatchNorm))
        norm.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(STEPS):
        model.zero_grad()
        for _ in range(ACCUMULATION):
            images = torch.randn(MICRO_BATCH, 3, 64, 64, generator=generator)
            loss = F.cross_entropy(model(images), torch.randint(10, (MICRO_BATCH,), generator=generator))
            loss.backward()
            losses.append(loss.detach())
        update_running_averages(model)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*losses, *gradients, *model.buffers()]


def _trains_the_same_bits(rank: int, world_size: int) -> None:
    # Over one micro-batch, over those of all ranks, over half of one, and over those of two ranks.
    cases: tuple[Statistics, ...] = ("local", "global", MICRO_BATCH // 2, MICRO_BATCH * world_size)
    for statistics in cases:
        found, passes = [], list[int]()
        for checkpointing in (False, True):
            model = build_model("test_resnet", 10, 0, statistics, gradient_checkpointing=checkpointing)
            join_neighbours(model.train(), MICRO_BATCH)
            found.append(trained(model, rank, passes if checkpointing else None))
        assert len(passes) == 2 * STEPS * ACCUMULATION, "nothing was recomputed"
        plain, checkpointed = found
        assert len(plain) == len(checkpointed)
        assert all(map(torch.equal, plain, checkpointed)), statistics


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpointing_gives_the_same_bits(world_size: int) -> None:
    run_ranks(world_size, _trains_the_same_bits)


def test_a_model_without_checkpointing_in_timm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing = true: timm's selecsls42 does not support it; "):
        build_model("selecsls42", 10, 0, "local", gradient_checkpointing=True)
