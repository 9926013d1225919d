"""LARS and LAMB: compared with their papers' formulas and, in the engine, with timm's own on the whole batch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipe.engine.optimizers import make_optimizer
from tests.engine.test_start import (
    PRECISIONS,
    WEIGHT_DECAY,
    groups,
    master_weights,
    new_engine,
    plain_training,
    relative_error,
    small_model,
    train_step,
    train_steps,
    updates,
)
from tests.ranks import run_ranks

LARS = {"type": "LARS", "params": {"lr": 0.1, "momentum": 0.9, "trust_coefficient": 0.02, "eps": 1e-8}}
LAMB = {"type": "LAMB", "params": {"lr": 0.01, "eps": 1e-6}}
BOTH = [LARS, LAMB]


def two_steps(section: dict[str, Any], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A decayed and an undecayed weight before the first step and after each, with these gradients."""
    kernel, bias = (nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64)) for _ in range(2))
    decays = [{"params": [kernel], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = make_optimizer(decays, section)
    kernels, biases = [kernel.detach().clone()], [bias.detach().clone()]
    for gradient in gradients:
        kernel.grad, bias.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        kernels.append(kernel.detach().clone())
        biases.append(bias.detach().clone())
    return kernels, biases


GRADIENTS = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-2.0, 0.5], dtype=torch.float64)]


def test_lars_follows_the_paper() -> None:
    """You et al. (2017), Algorithm 1, with torch's momentum: local rate η‖w‖ / (‖g‖ + β‖w‖) on g + βw."""
    kernels, biases = two_steps(LARS, GRADIENTS)
    v, u = torch.zeros(2).double(), torch.zeros(2).double()
    for step, g in enumerate(GRADIENTS):
        w = kernels[step]
        v = 0.9 * v + 0.02 * w.norm() / (g.norm() + 0.5 * w.norm() + 1e-8) * (g + 0.5 * w)
        torch.testing.assert_close(kernels[step + 1], w - 0.1 * v, rtol=1e-14, atol=0)
        u = 0.9 * u + g  # no trust ratio, no decay: SGD
        torch.testing.assert_close(biases[step + 1], biases[step] - 0.1 * u, rtol=1e-14, atol=0)


def test_lamb_follows_the_paper() -> None:
    """You et al. (2019), Algorithm 2 with φ(z) = z: the rate ‖w‖ / ‖r + λw‖ on r + λw, where r is Adam's step."""
    kernels, biases = two_steps(LAMB, GRADIENTS)
    m, s = torch.zeros(2).double(), torch.zeros(2).double()
    for step, g in enumerate(GRADIENTS):
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        r = (m / (1 - 0.9 ** (step + 1))) / ((s / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
        w, decayed = kernels[step], r + 0.5 * kernels[step]
        expected = w - 0.01 * w.norm() / decayed.norm() * decayed
        torch.testing.assert_close(kernels[step + 1], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(biases[step + 1], biases[step] - 0.01 * r, rtol=1e-12, atol=0)


def _trained(rank: int, world_size: int, accumulation: int) -> dict[tuple[str, str], list[dict]]:
    found = {}
    for section in BOTH:
        for precision, sections in PRECISIONS.items() if world_size == 1 else [("fp32", {})]:
            engine = new_engine(world_size, 16, accumulation, optimizer=section, **sections)
            found[section["type"], precision] = train_steps(engine, rank, world_size, [16] * 4)
    return found


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2)])
def test_updates_equal_timms_on_the_whole_batch(world_size: int, accumulation: int) -> None:
    for found in run_ranks(world_size, _trained, accumulation):
        for section in BOTH:
            reference = updates(plain_training([16] * 4, section))
            for (kind, precision), history in found.items():
                if kind == section["type"]:
                    # LAMB divides each gradient by its own size, which amplifies the rounding of the smallest ones.
                    rounding = {"fp32": 1e-5, "fp16": 2**-11, "bf16": 2**-8}[precision]
                    allowed = 64 * rounding if kind == "LAMB" else 16 * rounding
                    errors = [relative_error(*pair) for pair in zip(updates(history), reference, strict=True)]
                    assert max(errors) < allowed, (kind, precision, errors)


def everything(engine: Any) -> list[Tensor]:
    """The weights and the whole state of the optimizer."""
    optimizer = engine.basic_optimizer
    kept = [value for state in optimizer.state.values() for value in state.values()]
    steps = [group["step"] for group in optimizer.param_groups if "step" in group]
    return [value.clone() for value in (*master_weights(engine).values(), *kept, *steps)]


def _around_an_overflow(rank: int, world_size: int) -> list[tuple[str, bool, bool]]:
    seen = []
    for section in BOTH:
        engine = new_engine(world_size, 8, 1, optimizer=section, fp16={"enabled": True})
        for step in range(4):
            before = everything(engine)
            result = train_step(engine, rank, world_size, step, 8, factor=math.inf if step == 1 else 1)
            after = everything(engine)
            unchanged = len(before) == len(after) and all(map(torch.equal, before, after))
            seen.append((section["type"], bool(result.skipped), unchanged))
    return seen


def test_an_overflow_does_not_change_weights_moments_or_the_step_count() -> None:
    (seen,) = run_ranks(1, _around_an_overflow)
    skipped = [False, True, False, False]
    assert seen == [(section["type"], skip, skip) for section in BOTH for skip in skipped]


def _resumed(rank: int, world_size: int, folder: str) -> list[bool]:
    """Whether four steps leave the same bits as two, a checkpoint and two more."""
    from recipe.checkpoints import checkpoint
    from recipe.checkpoints.manifest import find

    same = []
    for section in BOTH:
        for precision, sections in PRECISIONS.items():
            path = Path(folder, section["type"] + precision)
            path.mkdir()
            whole = new_engine(world_size, 8, 2, optimizer=section, **sections)
            for step in range(4):
                if step == 2:
                    checkpoint.save(whole, path, top1=None, client_state={}, plan="{}", training_sha256="")
                train_step(whole, rank, world_size, step, 8)
            resumed = new_engine(world_size, 8, 2, optimizer=section, **sections)
            checkpoint.load_newest(resumed, find(path))
            for step in (2, 3):
                train_step(resumed, rank, world_size, step, 8)
            same.append(all(map(torch.equal, everything(whole), everything(resumed))))
    return same


def test_a_resume_gives_the_same_bits(tmp_path: Path) -> None:
    assert run_ranks(1, _resumed, str(tmp_path)) == [[True] * 6]


def test_weight_decay_comes_from_the_groups() -> None:
    optimizer = make_optimizer(groups(small_model()), LARS | {"params": LARS["params"] | {"weight_decay": 0.7}})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [WEIGHT_DECAY, 0.0]
