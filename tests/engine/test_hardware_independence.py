"""Invariant 3: a config trains the same on any number of ranks and with any micro-batch.

Training is chaotic: a rounding difference grows about fourfold per step. So runs are compared in float64.
"""

import shutil
from pathlib import Path

import pytest

from benchmarks.hardware_independence import Runs, Split, one_step, run_with_all_checkpoints
from tests.launch import DIGITS, events, losses, train, train_ok

pytestmark = pytest.mark.slow

FIXED_N = (
    "--set=train_batch_size=128",
    "--set=recipe.batchnorm.statistics=32",
    "--set=recipe.data.image_size=8",
    "--set=recipe.schedule.epochs=3",
    "--set=recipe.schedule.warmup_epochs=1",
    "--set=recipe.schedule.decay_epochs=[2]",
)  # 33 steps, 11 per epoch
FP64 = "--set=recipe.precision=fp64"


def run(output: Path, ranks: int, micro_batch: int, workers: int, *overrides: str) -> Path:
    split = (f"--set=recipe.max_micro_batch_size={micro_batch}", f"--set=recipe.data.workers={workers}")
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *FIXED_N, *split, *overrides)
    train_ok(*arguments, ranks=ranks)
    return output


def test_the_same_training_on_any_hardware(tmp_path: Path) -> None:
    """Combinations that cover all numbers of ranks and workers and all micro-batches, and a change during a run."""
    reference = run(tmp_path / "reference", 1, 32, 0, FP64)
    assert len(losses(reference)) == 33
    # As if it had been killed in the last epoch and resumed on different hardware.
    shutil.copytree(reference, tmp_path / "resumed")
    (tmp_path / "resumed/summary.json").unlink()
    (tmp_path / "resumed/checkpoints/step-00000033/manifest.json").unlink()
    for ranks, micro_batch, workers, name in (
        (1, 128, 2, "a"),
        (2, 16, 0, "b"),
        (4, 32, 0, "c"),
        (2, 64, 2, "resumed"),
    ):
        other = run(tmp_path / name, ranks, micro_batch, workers, FP64)
        name = f"{name}: {ranks} ranks, micro-batch {micro_batch}, {workers} workers"
        assert losses(other) == pytest.approx(losses(reference), rel=1e-9), name
        assert [event["step"] for event in events(other, "step")] == list(range(33))
        for validation, expected in zip(events(other, "validation"), events(reference, "validation"), strict=True):
            assert (validation["top1"], validation["count"]) == (expected["top1"], expected["count"]), name
            assert validation["loss"] == pytest.approx(expected["loss"], rel=1e-9)


def test_augmentation_and_progressive_resizing_are_the_same_on_any_hardware(tmp_path: Path) -> None:
    settings = ("--set=recipe.schedule.epochs=2", "--set=recipe.schedule.warmup_epochs=1")
    settings += ("--set=recipe.data.image_size=[[0, 8], [1, 16]]", "--set=recipe.data.validation_image_size=16")
    settings += ("--set=recipe.data.augment=rand", "--set=recipe.data.random_erasing=0.5")
    settings += tuple(f'--set=recipe.data.{name}={{"probability": 0.4}}' for name in ("mixup", "cutmix"))
    one = losses(run(tmp_path / "one", 1, 128, 0, FP64, *settings))
    two = losses(run(tmp_path / "two", 2, 16, 1, FP64, *settings))
    assert len(one) == 22
    assert two == pytest.approx(one, rel=1e-9)


GROWING = (
    *("--set=train_batch_size=256", "--set=recipe.schedule.epochs=2", "--set=recipe.schedule.batch_size=[[1,512]]"),
    *("--set=recipe.checkpoint.every_steps=1", "--set=recipe.checkpoint.keep_last=9"),
    *("--set=recipe.ema.decay=0.999", '--set=recipe.data.mixup={"probability": 0.5}'),
)  # five steps and two


def test_a_growing_batch_is_the_same_on_any_hardware_and_after_a_kill(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 1, 128, 0, FP64, *GROWING)
    two = run(tmp_path / "two", 2, 16, 0, FP64, *GROWING)
    steps = events(one, "step")
    assert [event["epoch"] for event in steps] == [0] * 5 + [1] * 2
    assert [event["samples"] for event in steps] == [256, 512, 768, 1024, 1280, 1792, 2304]
    assert [event["lr"] for event in steps[4:]] == pytest.approx([0.1, 0.2, 0.2])
    assert losses(two) == pytest.approx(losses(one), rel=1e-9)
    measured = [[event[name] for event in events(one, "validation")] for name in ("loss", "ema_loss")]
    other = [[event[name] for event in events(two, "validation")] for name in ("loss", "ema_loss")]
    assert other == [pytest.approx(values, rel=1e-9) for values in measured]
    killed = shutil.copytree(one, tmp_path / "killed")
    (killed / "summary.json").unlink()
    for later in range(5, 8):  # back to before the last step with the first batch size
        shutil.rmtree(killed / f"checkpoints/step-0000000{later}", ignore_errors=True)
    run(killed, 1, 128, 0, FP64, *GROWING)
    assert losses(killed) == losses(one)
    assert [[event[name] for event in events(killed, "validation")] for name in ("loss", "ema_loss")] == measured


def test_one_fp32_step_from_the_same_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    """Within 1e-5 of the update's norm, early and late in training; the checkpoints are from a real run.

    A model without ReLU or max-pooling: where rounding takes one activation across ReLU's kink, or turns a near-tie
    in a window, the gradient jumps, and the step with it, by up to 1e-3.
    """
    runs = Runs(tmp_path, epochs=5, run=train, model="test_efficientnet")
    base = run_with_all_checkpoints(runs)
    for start, split in ((2, Split(2, 16)), (8, Split(4, 128))):
        found = one_step(runs, base, start, [split])
        assert found["update_norm"] > 0
        assert max(found["parts_by"].values()) <= 1e-5, found
