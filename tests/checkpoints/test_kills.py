"""Invariants 4 and 6: killed at any moment, a run goes on as if nothing had happened.

Each kill is SIGKILL of a rank or of a real launch; ``python -m benchmarks.kill_resume`` launches all of them, and more.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks.kill_resume import LAST_STEP, Kill, Setting, difference, draw, kill_at, launch, run_killed
from benchmarks.killed_train import MOMENTS
from tests.launch import events, train

pytestmark = pytest.mark.slow

# As the benchmark has drawn them.
KILLS = {
    Setting(1, "fp32", image_size=8): [
        Kill("window", 16, "0"),
        Kill("checkpoint", 1, "0"),
        Kill("prune", 2, "group"),
        Kill("clock", 762, "0"),
        Kill("metrics", 6, "0"),
        Kill("published", 1, "0"),
        Kill("summary", 1, "0"),
    ],
    # Running averages that differ from rank to rank, and that DeepSpeed saves of rank 0 alone.
    Setting(2, "fp32", statistics="local", image_size=8): [
        Kill("step", 8, "0"),
        Kill("files", 1, "0"),
        Kill("validation", 5, "1"),
        Kill("last", 20, "1"),
        Kill("window", 3, "0"),
    ],
    # In which CPUs take minutes for what they do in seconds in fp32; for this model a third of them.
    Setting(1, "fp16", model="test_efficientnet", image_size=8): [Kill("publish", 3, "0")],
}


def start(setting: Setting, output: Path, kill: Kill | None) -> int:
    """By the launcher where it is killed too, and once where it ends the other rank; else the ranks alone, forked."""
    if kill is not None and (kill.who == "group" or (setting.ranks, kill.moment) == (2, "step")):
        return launch(setting, output, kill)
    arguments = (*setting.arguments, "--output", str(output))
    done = train(*arguments, ranks=setting.ranks, script="benchmarks/killed_train.py", KILL_AT=kill_at(kill))
    assert kill is not None or done.returncode == 0, done.stderr
    return done.returncode


def test_every_moment_is_killed_at() -> None:
    assert {kill.moment for kills in KILLS.values() for kill in kills} == set(MOMENTS)
    dice = random.Random(0)
    assert all(draw(dice, setting, moment).moment == moment for setting in KILLS for moment in MOMENTS)


@pytest.mark.parametrize("setting", KILLS, ids=lambda setting: f"{setting.ranks}-{setting.precision}")
def test_killed_runs_come_out_bit_for_bit(tmp_path: Path, setting: Setting) -> None:
    reference = tmp_path / "undisturbed"
    start(setting, reference, None)
    if setting.precision == "fp16":
        steps = events(reference, "step")
        assert len({step["loss_scale"] for step in steps}) > 2, "the loss scale has no state that could be lost"
        assert any(step["skipped"] for step in steps)
    outcomes = run_killed(setting, KILLS[setting], tmp_path, reference, start)
    assert [(outcome.kill, outcome.difference) for outcome in outcomes if outcome.difference] == []
    assert sorted(outcome.kill for outcome in outcomes) == sorted(KILLS[setting])


def test_a_run_that_is_another_is_found_out(tmp_path: Path) -> None:
    """The comparison can fail: at a metric, a line that is missing, the last bit of a weight, the loss scale."""

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
