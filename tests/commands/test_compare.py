"""``python -m recipe compare`` reports how two runs differ and from which step on; its exit code is like diff's."""

from pathlib import Path
from typing import Any

import pytest

from recipe.commands.compare import compare, main
from recipe.commands.run_files import read_run
from tests.run_folders import plan, step, validation, write_run

SAME = [*(step(t, 2.0 + t) for t in range(4)), validation(3, 50.0)]


def compared(a: Path, b: Path) -> tuple[str, bool]:
    lines, exit_code = compare(read_run(a), read_run(b))
    return "\n".join(lines), exit_code == 0


def test_the_same_training_on_other_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_folder = plan()
    from_folder["recipe"]["data"] |= {"source": "imagefolder", "path": "photos"}
    a = write_run(tmp_path / "a", SAME, from_folder, summary={})
    from_pack = plan(train_micro_batch_size_per_gpu=4, csv_monitor={"enabled": True})
    from_pack["recipe"]["data"] |= {"workers": 3, "source": "pack", "path": "photos", "pack_short_side": 0}
    longer = [*SAME, step(4, 9.0)]
    b = write_run(tmp_path / "b", longer, from_pack, {"device": "H100", "versions": {"torch": "2.15.0", "cuda": "13"}})
    assert main([str(a), str(b)]) == 0
    output = capsys.readouterr().out
    beginning = f"""\
A  {a}  4 of 40 steps, complete
B  {b}  5 of 40 steps, complete

The plans describe the same training.

changes only where or how it runs
                                  A              B
  ranks                           1              2
  train_micro_batch_size_per_gpu  8              4
  recipe.data.source              "imagefolder"  "pack"
  recipe.data.workers             0              3
  csv_monitor.enabled             –              true

environment
                  A         B
  device          "CPU"     "H100"
  versions.torch  "2.14.1"  "2.15.0"

step loss, 4 common values (differences relative to the larger)
  first difference  never: bit-identical
  last value        step 3, epoch 1: A 5.0, B 5.0

"""
    assert output.startswith(beginning)
    assert output.endswith("\n\nThe same training, bit-identical in all common values.\n")
    for field, value in ("top1", 50.0), ("top5", 99.0), ("loss", 1.0):
        assert (
            f"validation {field}, 1 common value (differences relative to the larger)\n"
            f"  first difference  never: bit-identical\n  last value        epoch 1: A {value}, B {value}\n"
        ) in output


def test_from_which_step_on_losses_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Relative to the larger one: 0, 2e-16, 5e-10, 2e-9, 2e-3, infinite, 0 (both skipped), 0.1.
    losses_a = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, None, 0.9]
    losses_b = [1.0, 1.0000000000000002, 1.0000000005, 1.000000002, 0.998, None, None, 1.0]
    other_plan = plan()
    other_plan["recipe"]["seed"] = 7
    other_plan["recipe"]["data"]["flip"] = False
    a = write_run(tmp_path / "a", map(step, range(8), losses_a))
    b = write_run(tmp_path / "b", map(step, range(8), losses_b), other_plan)
    assert main([str(a), str(b)]) == 1
    assert (
        capsys.readouterr().out
        == f"""\
A  {a}  8 of 40 steps, not complete
B  {b}  8 of 40 steps, not complete

changes the training
                    A     B
  recipe.data.flip  true  false
  recipe.seed       0     7

step loss, 8 common values (differences relative to the larger)
  first difference  step 1, epoch 0.5: A 1.0, B 1.0000000000000002
  first > 1e-9      step 3, epoch 1: A 1.0, B 1.000000002
  first > 1e-3      step 4, epoch 1.25: A 1.0, B 0.998
  largest           step 5, epoch 1.5: A 1.0, B not finite, difference inf
  last value        step 7, epoch 2: A 0.9, B 1.0

validation top1, no common values yet

validation top5, no common values yet

validation loss, no common values yet

Not the same training.
"""
    )


def test_runs_with_different_batches_are_compared_by_their_validations(tmp_path: Path) -> None:
    # 35 images: 4 steps of 8 per epoch, 2 of 16.
    a = write_run(tmp_path / "a", [*(step(t, t + 1.0) for t in range(11)), validation(3, 40.0), validation(7, 50.0)])
    events = [*map(step, range(5), [2.0, 3.0, 7.0, 8.0, 1.0]), validation(1, 40.0), validation(3, 52.0)]
    text, is_same = compared(a, write_run(tmp_path / "b", events, plan(train_batch_size=16)))
    assert not is_same
    assert "  train_batch_size                8         16\n" in text
    assert "step loss" not in text
    assert (
        """
validation top1, 2 common values (differences relative to the larger)
  first difference  epoch 2: A 50.0, B 52.0
  first > 1e-9      epoch 2: A 50.0, B 52.0
  first > 1e-3      epoch 2: A 50.0, B 52.0
  largest           epoch 2: A 50.0, B 52.0, difference 0.0385
  last value        epoch 2: A 50.0, B 52.0
"""
        in text
    )


@pytest.mark.parametrize(
    ("statistics", "images"), [("local", ["8", "4", "4"]), ("global", ["8", "8", "4"]), (4, ["4", "4", "4"])]
)
def test_batch_norm_over_other_images_changes_the_training(tmp_path: Path, statistics: Any, images: list[str]) -> None:
    plans = [plan(), plan(train_micro_batch_size_per_gpu=4), plan(train_micro_batch_size_per_gpu=4)]
    plans[2]["gradient_accumulation_steps"] = 2
    for number, own_plan in enumerate(plans):
        own_plan["recipe"]["batchnorm"] = {"statistics": statistics}
        write_run(tmp_path / str(number), SAME, own_plan)
    for number in (1, 2):
        text, is_same = compared(tmp_path / "0", tmp_path / str(number))
        assert is_same == (images[0] == images[number])
        assert (f"images in recipe.batchnorm.statistics  {images[0]}  {images[number]}" in text) != is_same


def test_without_common_steps_it_is_too_early_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a", SAME), write_run(tmp_path / "b")
    assert main([str(a), str(b)]) == 3
    assert capsys.readouterr().out.endswith("\nToo early to tell: the runs have no step in common yet.\n")
    b = write_run(tmp_path / "b", of_plan=plan(train_batch_size=16))
    assert main([str(a), str(b)]) == 1


def test_control_characters_in_files_do_not_reach_the_terminal(tmp_path: Path) -> None:
    own_plan = plan(tensorboard={"enabled": True, "job_name": "value\x1b[2J"})
    text, _ = compared(write_run(tmp_path / "a"), write_run(tmp_path / "b\x1b[2J", of_plan=own_plan))
    assert "value\\u001b[2J" in text
    assert "\x1b" not in text
