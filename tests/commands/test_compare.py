"""``python -m recipe compare`` says what differs between two runs, from which step on, and as diff does by its exit."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipe.commands.compare import compare, main, relative_differences
from recipe.commands.run_files import read_run
from tests.run_folders import plan, step, validation, write_run

SAME = [*(step(t, 2.0 + t) for t in range(4)), validation(3, 50.0)]


def compared(a: Path, b: Path) -> tuple[str, bool]:
    lines, exit_code = compare(read_run(a), read_run(b))
    return "\n".join(lines), exit_code == 0


def test_the_same_training_wherever_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_folder = plan()
    from_folder["recipe"]["data"] |= {"source": "imagefolder", "path": "photos"}
    a = write_run(tmp_path / "a", SAME, from_folder, summary={})
    of_plan = plan(train_micro_batch_size_per_gpu=4, csv_monitor={"enabled": True})
    of_plan["recipe"]["data"] |= {"workers": 3, "source": "pack", "path": "photos", "pack_short_side": 0}
    longer = [*SAME, step(4, 9.0)]
    b = write_run(tmp_path / "b", longer, of_plan, {"device": "H100", "versions": {"torch": "2.15.0", "cuda": "13"}})
    assert main([str(a), str(b)]) == 0
    assert (
        capsys.readouterr().out
        == f"""\
A  {a}  4 of 40 steps, complete
B  {b}  5 of 40 steps, complete

The plans describe the same training.

only where or how it runs
                                  A              B
  ranks                           1              2
  train_micro_batch_size_per_gpu  8              4
  recipe.data.source              "imagefolder"  "pack"
  recipe.data.workers             0              3
  csv_monitor.enabled             –              true

what it ran on
                  A         B
  device          "CPU"     "H100"
  versions.torch  "2.14.1"  "2.15.0"

step loss, 4 values in common (apart: relative to the larger)
  first differs  never: it is the same to the last bit
  last           step 3, epoch 1: A 5.0, B 5.0

validation top1, 1 value in common (apart: relative to the larger)
  first differs  never: it is the same to the last bit
  last           epoch 1: A 50.0, B 50.0

validation top5, 1 value in common (apart: relative to the larger)
  first differs  never: it is the same to the last bit
  last           epoch 1: A 99.0, B 99.0

validation loss, 1 value in common (apart: relative to the larger)
  first differs  never: it is the same to the last bit
  last           epoch 1: A 1.0, B 1.0

The same training, as far as both have come.
"""
    )


def test_from_which_step_on_losses_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Relative to the larger one: 0, 2e-16, 5e-10, 2e-9, 2e-3, 0.5, 0.1.
    losses_a = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9]
    losses_b = [1.0, 1.0000000000000002, 1.0000000005, 1.000000002, 0.998, 2.0, 1.0]
    of_plan = plan()
    of_plan["recipe"]["seed"] = 7
    of_plan["recipe"]["data"]["flip"] = False
    a = write_run(tmp_path / "a", map(step, range(7), losses_a))
    b = write_run(tmp_path / "b", map(step, range(7), losses_b), of_plan)
    assert main([str(a), str(b)]) == 1
    assert (
        capsys.readouterr().out
        == f"""\
A  {a}  7 of 40 steps, not complete
B  {b}  7 of 40 steps, not complete

changes the training
                    A     B
  recipe.data.flip  true  false
  recipe.seed       0     7

step loss, 7 values in common (apart: relative to the larger)
  first differs  step 1, epoch 0.5: A 1.0, B 1.0000000000000002
  apart > 1e-9   step 3, epoch 1: A 1.0, B 1.000000002
  apart > 1e-3   step 4, epoch 1.25: A 1.0, B 0.998
  differs most   step 5, epoch 1.5: A 1.0, B 2.0, 0.5 apart
  last           step 6, epoch 1.75: A 0.9, B 1.0

validation top1, no value in common yet

validation top5, no value in common yet

validation loss, no value in common yet

Not the same training.
"""
    )


def test_rounding_is_a_difference(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [step(0, 1.0), step(1, 0.5)])
    text, is_same = compared(a, write_run(tmp_path / "b", [step(0, 1.0), step(1, 0.5000000000000001)]))
    assert not is_same
    assert "first differs  step 1, epoch 0.5: A 0.5, B 0.5000000000000001" in text
    assert "apart > 1e-9   never" in text


def test_losses_without_a_number() -> None:
    a = np.array([np.nan, np.nan, 1.0, 0.0, 1e308, -1e308])
    b = np.array([np.nan, 1.0, np.nan, 0.0, 1e308, 1e308])
    assert relative_differences(a, b).tolist() == [0, np.inf, np.inf, 0, 0, np.inf]


def test_skipped_steps_and_infinite_losses_are_reported(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [step(0, None, skipped=True), step(1, 1.0)])
    b = write_run(tmp_path / "b", [step(0, None, skipped=True), step(1, None)])
    text, is_same = compared(a, b)
    assert not is_same
    assert "differs most   step 1, epoch 0.5: A 1.0, B not finite, inf apart" in text


def test_of_runs_with_other_batches_the_validations_are_compared(tmp_path: Path) -> None:
    # 35 images: 4 steps of 8 an epoch, 2 of 16.
    a = write_run(tmp_path / "a", [*(step(t, t + 1.0) for t in range(11)), validation(3, 40.0), validation(7, 50.0)])
    events = [*map(step, range(5), [2.0, 3.0, 7.0, 8.0, 1.0]), validation(1, 40.0), validation(3, 52.0)]
    text, is_same = compared(a, write_run(tmp_path / "b", events, plan(train_batch_size=16)))
    assert not is_same
    assert "  train_batch_size                8         16\n" in text
    assert "step loss" not in text
    assert (
        """
validation top1, 2 values in common (apart: relative to the larger)
  first differs  epoch 2: A 50.0, B 52.0
  apart > 1e-9   epoch 2: A 50.0, B 52.0
  apart > 1e-3   epoch 2: A 50.0, B 52.0
  differs most   epoch 2: A 50.0, B 52.0, 0.0385 apart
  last           epoch 2: A 50.0, B 52.0
"""
        in text
    )


def test_batch_norm_over_other_images_is_another_training(tmp_path: Path) -> None:
    plans = [plan(), plan(train_micro_batch_size_per_gpu=4), plan(train_micro_batch_size_per_gpu=4)]
    plans[2]["gradient_accumulation_steps"] = 2
    for statistics, images in (("local", ["8", "4", "4"]), ("global", ["8", "8", "4"]), (4, ["4", "4", "4"])):
        for number, of_plan in enumerate(plans):
            of_plan["recipe"]["batchnorm"] = {"statistics": statistics}
            write_run(tmp_path / str(number), SAME, of_plan)
        for number in (1, 2):
            text, is_same = compared(tmp_path / "0", tmp_path / str(number))
            assert is_same == (images[0] == images[number])
            row = f"images in recipe.batchnorm.statistics  {images[0]}  {images[number]}"
            assert (row in text) == (images[0] != images[number])


def test_without_a_step_in_common_nothing_is_said_to_be_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run(tmp_path / "a", SAME), write_run(tmp_path / "b")
    assert main([str(a), str(b)]) == 3
    assert capsys.readouterr().out.endswith("\nIt is too early to say whether it is the same training.\n")
    b = write_run(tmp_path / "b", of_plan=plan(train_batch_size=16))
    assert main([str(a), str(b)]) == 1


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", SAME)
    torn = write_run(tmp_path / "torn")
    (torn / "plan.json").write_text(json.dumps(plan())[:-1])
    for other, problem in ((tmp_path / "none\x1b[2J", "there is no folder"), (torn, "plan.json: line 1, column ")):
        assert main([str(run), str(other)]) == 2
        seen = capsys.readouterr()
        assert seen.out == ""
        (error,) = seen.err.splitlines()
        assert error.startswith("recipe: ")
        assert problem in error
        assert "\x1b" not in error


def test_texts_from_files_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    of_plan = plan(tensorboard={"enabled": True, "job_name": "value\x1b[2J"})
    text, _ = compared(write_run(tmp_path / "a"), write_run(tmp_path / "b\x1b[2J", of_plan=of_plan))
    assert "value\\u001b[2J" in text
    assert "\x1b" not in text
