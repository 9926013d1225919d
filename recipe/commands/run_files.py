"""Reads the files of a run, complete or in progress, for the commands that analyse runs."""

import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.checkpoints import CHECKPOINTS, PLAN
from recipe.config import Config, read_config
from recipe.plan import Plan, make_plan
from recipe.reporting import METRICS, parse_event, read_summary

Column = NDArray[np.float64]

WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"  # of an export

FIELDS = {  # read from each kind of event in metrics.jsonl; everything else is ignored
    "step": ("step", "lr", "loss", "images_per_second", "data_wait", "skipped"),
    "validation": ("step", "top1", "top5", "loss"),
    "noise_scale": ("step", "noise_scale"),
}


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files; ``summary`` is None until the run is complete.

    ``events`` has one column per entry of ``FIELDS``, in step order: null becomes NaN, ``skipped`` 0 or 1.
    """

    folder: Path
    plan: Plan
    summary: dict[str, Any] | None
    events: dict[str, dict[str, Column]]

    @property
    def steps_done(self) -> int:
        """The number of logged optimizer steps."""
        steps = self.events["step"]["step"]
        return int(steps[-1]) + 1 if steps.size else 0

    def epochs(self, event: str) -> Column:
        """The position of each event in epochs: those done after its step."""
        steps = self.events[event]["step"]
        return np.array([self.plan.timeline.epochs_done(int(step) + 1) for step in steps])


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder; a last line that is still being written is ignored.

    Raises:
        ValueError: it is not the folder of a run, or a line in one of its files is invalid.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the --output folder of a run")
    if not (folder / PLAN).exists():
        raise ValueError(f"{folder} has no {PLAN}, so it is not the folder of a run; {suggest_runs(folder)}")
    return RunFiles(folder, plan_of(read_config(folder / PLAN)), read_summary(folder), _read_events(folder / METRICS))


def plan_of(config: Config) -> Plan:
    """The plan that a resolved config describes; raises ``ConfigError`` if the config leaves a batch "auto"."""
    micro_batch, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    if micro_batch == "auto" or accumulation == "auto":
        problem, remedy = 'the plan of a run has no "auto"', "name the --output folder of a run"
        raise config.source.refusal("train_micro_batch_size_per_gpu", problem, remedy)
    return make_plan(config, config.train_batch_size // (micro_batch * accumulation))


def suggest_runs(folder: Path) -> str:
    """The remedy for a folder that is not a run's: the first runs below it, as in the folder of a study."""
    plans = sorted({*folder.glob(f"*/{PLAN}"), *folder.glob(f"*/*/{PLAN}")})
    within = [str(plan.parent) for plan in plans if plan.parent.parent.name != CHECKPOINTS]
    return f"did you mean {', '.join(within[:5])}?" if within else "name the --output folder of a run"


def _read_events(file: Path) -> dict[str, dict[str, Column]]:
    numbers = {event: array("d") for event in FIELDS}
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            event: dict[str, Any] = parse_event(line) or {}
            name = event["event"]
            if name in FIELDS:
                numbers[name].extend(math.nan if event[field] is None else event[field] for field in FIELDS[name])
        except (TypeError, LookupError, OverflowError):
            if not line.endswith(b"\n"):
                break  # it is still being written
            raise ValueError(f"{file}: line {number} is not a valid event; remove or fix it") from None
    columns = {name: np.array(numbers[name]).reshape(-1, len(fields)).T for name, fields in FIELDS.items()}
    for name, (steps, *_) in columns.items():
        if np.isinf(columns[name]).any() or (np.diff(steps) <= 0).any():
            raise ValueError(f'{file}: the steps of "{name}" do not increase, or a number is too large; fix the file')
    return {name: dict(zip(fields, columns[name], strict=True)) for name, fields in FIELDS.items()}
