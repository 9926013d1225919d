"""The search for the largest micro-batch; tests/gpu/test_micro_batch.py shows that it fits a GPU."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from recipe.engine.micro_batch import largest_that_fits
from tests.launch import DIGITS, SHORT, losses, train_ok


@pytest.mark.parametrize(("room", "taken"), [(10_000, 512), (512, 512), (511, 256), (33, 32), (32, 32)])
def test_the_largest_micro_batch_that_fits_the_memory_is_found(room: int, taken: int) -> None:
    tried: list[int] = []

    def train(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError(f"{size} images do not fit")

    assert largest_that_fits([32, 256, 128, 512], train) == taken
    assert tried == [size for size in (512, 256, 128, 32) if size >= taken]


def test_a_failed_trial_frees_its_memory_before_the_next() -> None:
    """A model is part of reference cycles, which only the garbage collector frees; they took up half of a GPU."""
    made: list[weakref.ref[torch.nn.Module]] = []

    def train(size: int) -> None:
        assert [model() for model in made] == [None] * len(made)
        model = torch.nn.Linear(2, 2)
        model.register_forward_hook(lambda *_: model.bias)
        made.append(weakref.ref(model))
        if size > 32:
            raise torch.OutOfMemoryError(f"{size} images do not fit")

    gc.disable()
    try:
        assert largest_that_fits([32, 64, 128], train) == 32
    finally:
        gc.enable()


def test_if_none_fits_the_error_is_that_of_the_smallest() -> None:
    def train(size: int) -> None:
        raise torch.OutOfMemoryError(f"{size} images do not fit")

    with pytest.raises(torch.OutOfMemoryError, match="8 images do"):
        largest_that_fits([8, 16], train)


@pytest.mark.slow
def test_a_run_reports_its_micro_batch_and_keeps_it_when_resumed(tmp_path: Path) -> None:
    auto = ("--set=recipe.max_micro_batch_size=auto", "--set=recipe.batchnorm.statistics=32")
    first = tmp_path / "first"
    arguments = ("--deepspeed_config", DIGITS, *SHORT, *auto)
    done = train_ok(*arguments, "--output", str(first))
    assert 'max_micro_batch_size "auto": 32 images, on a CPU the largest up to 32' in done.stdout
    assert "512 = 1 rank × 16 accumulation steps × micro-batch of 32" in done.stdout
    assert done.stdout.count("Plan of") == 1
    written = json.loads((first / "plan.json").read_text())
    assert written["train_micro_batch_size_per_gpu"] == written["recipe"]["max_micro_batch_size"] == 32

    # A run that started with a different micro-batch keeps it when resumed on the same number of ranks.
    other = tmp_path / "other"
    train_ok(*arguments, "--output", str(other), "--set=recipe.max_micro_batch_size=64")
    whole = losses(other)
    (other / "summary.json").unlink()
    (other / "checkpoints/step-00000006/manifest.json").unlink()
    again = train_ok(*arguments, "--output", str(other))
    assert 'max_micro_batch_size "auto": 64 images, as before' in again.stdout
    assert losses(other) == whole
