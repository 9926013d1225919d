"""``metrics.jsonl`` as others read it, while it is being written, too."""

import json
from pathlib import Path

import pytest

from recipe.reporting.metrics import has_diverged, read_events, steps_done


def write(folder: Path, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def step(number: int) -> str:
    return json.dumps({"event": "step", "step": number, "loss": 1.0, "padding": "x" * 100})


def test_a_half_written_line_is_none(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    write(tmp_path, step(0), json.dumps({"event": "validation", "step": 0}), "[1]", "", '{"event": "step", "ste')
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("step", 0), ("validation", 0)]


def test_steps_done_are_told_by_the_end_of_a_long_file(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    write(tmp_path, *map(step, range(1000)), '{"event": "step", "step": 1000')
    assert steps_done(tmp_path) == 1000
    write(tmp_path, step(0))
    assert steps_done(tmp_path) == 1


@pytest.mark.parametrize(
    ("loss", "skipped", "loss_scale", "diverged"),
    [(2.3, False, 1.0, False), (None, False, 1.0, True), (None, True, 2.0, False), (None, True, 1.0, True)],
)
def test_an_overflow_at_a_loss_scale_that_can_still_fall_is_no_divergence(
    loss: float | None, skipped: bool, loss_scale: float, diverged: bool
) -> None:
    assert has_diverged(loss, skipped, loss_scale) == diverged
