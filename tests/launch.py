"""Starts real training runs, by the ``deepspeed`` CLI or plain Python, and reads what they leave."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, deepspeed_command, environment

__all__ = ["ROOT", "environment"]

DIGITS = "ds_configs/digits_b512.json"
SHORT = (
    "--set=recipe.schedule.epochs=3",
    "--set=recipe.schedule.warmup_epochs=1",
    "--set=recipe.schedule.decay_epochs=[2]",
)  # six steps of the digits config


def command(*arguments: str, ranks: int | None, script: str = "recipe/train.py") -> list[str]:
    """The command line of a run on ``ranks`` ranks by the launcher; None starts one rank without it."""
    if ranks is None:
        return [sys.executable, script, *arguments]
    return deepspeed_command(ranks, script, *arguments)


def train(
    *arguments: str, ranks: int | None = None, script: str = "recipe/train.py", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; give its exit code and output."""
    return subprocess.run(
        command(*arguments, ranks=ranks, script=script),
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_ok(*arguments: str, ranks: int | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """``train``, insisting that the run is complete."""
    done = train(*arguments, ranks=ranks, **variables)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of one kind, "step" or "validation"."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(output: Path) -> list[float]:
    """The training loss of every step."""
    return [event["loss"] for event in events(output, "step")]
