"""The search for the largest micro-batch; that it fits a GPU stands in tests/gpu/test_micro_batch.py."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from recipe.engine.micro_batch import largest_on_cpu, largest_that_fits
from tests.launch import DIGITS, SHORT, losses, train_ok


@pytest.mark.parametrize(
    ("candidates", "taken"), [([256, 128, 64, 32, 16, 1], 32), ([96, 48, 24], 24), ([512, 256], 256), ([1], 1)]
)
def test_on_a_cpu_the_largest_up_to_32_or_else_the_smallest(candidates: list[int], taken: int) -> None:
    assert largest_on_cpu(candidates) == taken


@pytest.mark.parametrize(("room", "taken"), [(10_000, 512), (512, 512), (511, 256), (33, 32), (32, 32)])
def test_the_largest_that_does_not_run_out_of_memory(room: int, taken: int) -> None:
    tried: list[int] = []

    def train(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError(f"{size} images do not fit")

    assert largest_that_fits([32, 256, 128, 512], train) == taken
    assert tried == [size for size in (512, 256, 128, 32) if size >= taken]


def test_a_failed_trial_leaves_nothing_in_the_next_ones_way() -> None:
    """A model is part of reference cycles, which only the collector frees; measured: half of a GPU was not there."""
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


def test_where_none_fits_the_smallest_ones_error_is_told() -> None:
    def train(size: int) -> None:
        raise torch.OutOfMemoryError(f"{size} images do not fit")

    with pytest.raises(torch.OutOfMemoryError, match="8 images do"):
        largest_that_fits([8, 16], train)


@pytest.mark.slow
def test_a_run_says_which_it_took_and_keeps_it(tmp_path: Path) -> None:
    auto = ("--set=recipe.max_micro_batch_size=auto", "--set=recipe.batchnorm.statistics=32")
    first = tmp_path / "first"
    arguments = ("--deepspeed_config", DIGITS, *SHORT, *auto)
    done = train_ok(*arguments, "--output", str(first))
    assert 'max_micro_batch_size "auto": 32 images, on a CPU the largest up to 32' in done.stdout
    assert "512 = 1 rank × 16 accumulation steps × micro-batch of 32" in done.stdout
    assert done.stdout.count("Plan of") == 1
    written = json.loads((first / "plan.json").read_text())
    assert written["train_micro_batch_size_per_gpu"] == written["recipe"]["max_micro_batch_size"] == 32

    # A run that had another one goes on with it, on as many ranks.
    other = tmp_path / "other"
    train_ok(*arguments, "--output", str(other), "--set=recipe.max_micro_batch_size=64")
    whole = losses(other)
    (other / "summary.json").unlink()
    (other / "checkpoints/step-00000006/manifest.json").unlink()
    again = train_ok(*arguments, "--output", str(other))
    assert 'max_micro_batch_size "auto": 64 images, as before' in again.stdout
    assert losses(other) == whole
