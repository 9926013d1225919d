"""Invariants 4 and 6: killed at any moment, a run goes on as if nothing had happened.

Each kill is SIGKILL of a process of a real launch; ``python -m benchmarks.kill_resume`` does more of them.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from benchmarks.kill_resume import LAST_STEP, Setting, difference, draw, launch, run_killed
from benchmarks.killed_train import MOMENTS
from tests.launch import events

pytestmark = pytest.mark.slow

SEED = 20261123
KILLS = {
    Setting(1, "fp32"): ("window", "checkpoint", "prune", "clock", "metrics", "published", "summary"),
    # Running averages that differ from rank to rank, and that DeepSpeed saves of rank 0 alone.
    Setting(2, "fp32", statistics="local"): ("step", "files", "validation", "last", "window"),
    # In which CPUs take minutes for what they do in seconds in fp32; for this model a third of them.
    Setting(1, "fp16", model="test_efficientnet"): ("publish",),
}


def test_every_moment_is_killed_at() -> None:
    assert {moment for moments in KILLS.values() for moment in moments} == set(MOMENTS)


@pytest.mark.parametrize("setting", KILLS, ids=lambda setting: f"{setting.ranks}-{setting.precision}")
def test_killed_runs_come_out_bit_for_bit(tmp_path: Path, setting: Setting) -> None:
    dice = random.Random(SEED)
    kills = [draw(dice, setting, moment) for moment in KILLS[setting]]
    print(f"seed {SEED}:", *kills, sep="\n  ")
    reference = tmp_path / "undisturbed"
    launch(setting, reference, None)
    if setting.precision == "fp16":
        steps = events(reference, "step")
        assert len({step["loss_scale"] for step in steps}) > 2, "the loss scale has no state that could be lost"
        assert any(step["skipped"] for step in steps)
    outcomes = run_killed(setting, kills, tmp_path, reference)
    assert [(outcome.kill, outcome.difference) for outcome in outcomes if outcome.difference] == []
    assert sorted(outcome.kill for outcome in outcomes) == sorted(kills)


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
