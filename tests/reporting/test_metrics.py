"""Reading ``metrics.jsonl``, also while it is being written."""

import json
from pathlib import Path

from recipe.reporting.metrics import read_events, steps_done


def write(folder: Path, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def step(number: int) -> str:
    return json.dumps({"event": "step", "step": number, "loss": 1.0, "padding": "x" * 100})


def test_half_written_lines_are_ignored(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    write(tmp_path, step(0), json.dumps({"event": "validation", "step": 0}), "[1]", "", '{"event": "step", "ste')
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [("step", 0), ("validation", 0)]


def test_steps_done_are_read_from_the_tail_of_a_long_file(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    write(tmp_path, *map(step, range(1000)), '{"event": "step", "step": 1000')
    assert steps_done(tmp_path) == 1000
    write(tmp_path, step(0))
    assert steps_done(tmp_path) == 1
