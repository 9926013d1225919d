"""Post-local SGD, compared with independent plain PyTorch models that are averaged, and after a resume."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.test_start import (
    PRECISIONS,
    groups,
    new_engine,
    plain_training,
    relative_error,
    samples,
    small_model,
    train_steps,
    updates,
    weights_of,
)
from tests.launch import DIGITS, events, losses, train, train_ok
from tests.ranks import run_ranks

BATCH, RANKS, FIRST, STEPS, EVERY = 16, 2, 2, 8, 3  # averaged after steps 5 and 8; the first two reduce gradients


def is_local(step: int) -> bool:
    return step >= FIRST


def equal_after(steps: int) -> bool:
    return steps <= FIRST or (steps - FIRST) % EVERY == 0


def _trained(rank: int, world_size: int) -> dict[str, list[dict[str, Tensor]]]:
    from recipe.engine.local_steps import LocalSteps

    found = {}
    for precision in ("fp32", "bf16"):
        engine = new_engine(world_size, BATCH, 2, **PRECISIONS[precision])
        engine.local_steps = LocalSteps(engine, is_local, equal_after)
        found[precision] = train_steps(engine, rank, world_size, [BATCH] * STEPS)
    return found


def plain_local_training() -> list[list[dict[str, Tensor]]]:
    """The weights of each rank before the first step and after each."""
    models = [small_model() for _ in range(RANKS)]
    optimizers = [torch.optim.SGD(groups(model), lr=0.1, momentum=0.9, nesterov=True) for model in models]
    history = [[weights_of(model)] for model in models]
    for step in range(STEPS):
        images, labels = samples(step, BATCH)
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            # The ranks take turns in micro-batches of four.
            own = torch.arange(BATCH) // 4 % RANKS == rank if is_local(step) else torch.ones(BATCH, dtype=torch.bool)
            optimizer.zero_grad()
            F.cross_entropy(model(images[own]), labels[own]).backward()
            optimizer.step()
        if is_local(step) and equal_after(step + 1):
            with torch.no_grad():
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack(same).mean(0)
                    for parameter in same:
                        parameter.copy_(mean)
        for model, weights in zip(models, history, strict=True):
            weights.append(weights_of(model))
    return history


def test_local_steps_equal_independent_training_with_averaging() -> None:
    found = run_ranks(RANKS, _trained)
    for own, expected in zip(found, plain_local_training(), strict=True):
        for precision, tolerance in (("fp32", 5e-6), ("bf16", 16 * 2**-8)):
            for update, plain in zip(updates(own[precision]), updates(expected), strict=True):
                assert relative_error(update, plain) < tolerance, precision
    for precision in ("fp32", "bf16"):
        one, other = (rank[precision] for rank in found)
        same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)]
        assert same == [equal_after(steps) for steps in range(STEPS + 1)]
    # Reduced gradients give other updates.
    assert relative_error(updates(found[0]["fp32"])[3], updates(plain_training([BATCH] * 4))[3]) > 0.1


RUN = (
    *("--deepspeed_config", DIGITS, "--set=train_batch_size=256", "--set=recipe.batchnorm.statistics=local"),
    *("--set=recipe.schedule.epochs=2", "--set=recipe.local_sgd.steps=2", "--set=recipe.local_sgd.after_epoch=1"),
    *("--set=recipe.checkpoint.every_steps=1", "--set=recipe.checkpoint.keep_last=9", "--set=recipe.seed=1"),
)  # ten steps; those of the second epoch are local


def test_a_run_resumes_bit_for_bit_after_local_steps(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_ok(*RUN, "--output", str(whole), ranks=2)
    checkpoints = whole / "checkpoints"
    # After steps 6 and 8 the ranks' weights differ, so their checkpoints are written one step later.
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        f"step-{step:08d}" for step in (1, 2, 3, 4, 5, 7, 9, 10)
    ]
    assert not (checkpoints / "step-00000005/rank-00001.pt").exists()
    own = [torch.load(checkpoints / f"step-00000007/rank-0000{rank}.pt")[0]["momentum_buffer"] for rank in range(2)]
    assert not torch.equal(*own)
    # A signal after step 6 also takes effect at step 7.
    ended = train(
        *(*RUN, "--output", str(killed)), ranks=2, script="benchmarks/killed_train.py", KILL_AT="step 6 0 TERM"
    )
    assert ended.returncode == 143
    assert "saved after 7 of 10 steps" in ended.stdout
    assert "7 steps done" in train_ok(*RUN, "--output", str(killed), ranks=2).stdout
    assert losses(killed) == losses(whole)
    assert events(killed, "validation") == events(whole, "validation")
