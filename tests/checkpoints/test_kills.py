"""Invariants 4 and 6: a run that is killed or signalled at any moment resumes as if nothing had happened.

``python -m benchmarks.kill_resume`` kills real launches at all of these moments, and more often.
"""

import json
import random
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.kill_resume import LAST_STEP, Kill, Setting, difference, draw, kill_at, launch, run_killed
from benchmarks.killed_train import MOMENTS
from recipe.checkpoints.manifest import find
from tests.launch import events, train

pytestmark = pytest.mark.slow

KILLS = {
    Setting(1, "fp32", image_size=8): [
        Kill("window", 16, "0"),
        Kill("checkpoint", 1, "0"),
        Kill("prune", 2, "group"),
        Kill("clock", 762, "0"),
        Kill("files", 1, "0"),
        Kill("metrics", 6, "0"),
        Kill("publish", 1, "0"),
        Kill("published", 1, "0"),
        Kill("summary", 1, "0"),
    ],
    # Running averages that differ between ranks; DeepSpeed saves only rank 0's.
    Setting(2, "fp32", workers=1, statistics="local", image_size=8): [
        Kill("step", 8, "0"),
        Kill("validation", 5, "1"),
        Kill("window", 5, "1", "TERM"),
        Kill("validation", 2, "0", "INT"),
        Kill("checkpoint", 1, "0", "TERM"),
        Kill("last", 20, "1"),
    ],
}


def start(setting: Setting, output: Path, kill: Kill | None) -> int:
    """Run with the launcher if it is killed too, otherwise only the ranks, which are forked."""
    if kill is not None and kill.who == "group":
        return launch(setting, output, kill)
    arguments = (*setting.arguments, "--output", str(output))
    done = train(*arguments, ranks=setting.ranks, script="benchmarks/killed_train.py", KILL_AT=kill_at(kill))
    assert kill is not None or done.returncode == 0, done.stderr
    if kill is not None and kill.signal_name != "KILL":
        # The step was finished and saved.
        assert done.returncode == 128 + signal.Signals[f"SIG{kill.signal_name}"], done.stderr
        assert find(output / "checkpoints")[0].step == events(output, "step")[-1]["step"] + 1
        assert f"ended by SIG{kill.signal_name}" in (output / "train.log").read_text().splitlines()[-1]
        assert not (output / "summary.json").exists()
    return done.returncode


def test_every_moment_is_killed_at() -> None:
    assert {kill.moment for kills in KILLS.values() for kill in kills} == set(MOMENTS)
    dice = random.Random(0)
    assert all(draw(dice, setting, moment).moment == moment for setting in KILLS for moment in MOMENTS)


@pytest.mark.parametrize("setting", KILLS, ids=lambda setting: f"{setting.ranks}-{setting.precision}")
def test_killed_runs_are_bit_identical(tmp_path: Path, setting: Setting) -> None:
    reference = tmp_path / "undisturbed"
    start(setting, reference, None)
    outcomes = run_killed(setting, KILLS[setting], tmp_path, reference, start)
    assert [(outcome.kill, outcome.difference) for outcome in outcomes if outcome.difference] == []
    assert sorted(outcome.kill for outcome in outcomes) == sorted(KILLS[setting])


def test_comparison_finds_differences(tmp_path: Path) -> None:
    """In a metric, a missing line, the last bit of a weight, and the loss scale."""

    def run(name: str, *, loss: float = 1.5, lines: int = 2, weight: float = 1.0, loss_scale: float = 2.0) -> Path:
        checkpoint = tmp_path / name / f"checkpoints/step-{LAST_STEP:08}"
        checkpoint.mkdir(parents=True)
        line = {"event": "step", "step": 0, "loss": loss, "images_per_second": len(name)}
        (tmp_path / name / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * lines)
        state = {"module": {"weight": torch.tensor([0.5, weight])}, "optimizer": [{"cur_scale": loss_scale}]}
        torch.save(state | {"seconds": float(len(name))}, checkpoint / "mp_rank_00_model_states.pt")
        return tmp_path / name

    reference = run("undisturbed")
    assert difference(run("equal"), reference) is None
    assert "metrics.jsonl has {" in str(difference(run("metric", loss=1.5 + 2**-52), reference))
    assert difference(run("line", lines=3), reference) == "metrics.jsonl has 3 lines, the undisturbed run 2"
    assert difference(run("weight", weight=1 + 2**-23), reference) == "/module/weight is another tensor"
    assert "/optimizer/0/cur_scale is 4.0" in str(difference(run("scale", loss_scale=4.0), reference))
