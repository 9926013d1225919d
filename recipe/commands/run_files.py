"""Reads what a run has written, complete or in progress, for the commands that look at runs."""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from recipe.checkpoints import CHECKPOINTS, PLAN
from recipe.config import parse_json, read_text
from recipe.reporting import METRICS, parse_object, read_summary

Column = NDArray[np.float64]

# What is read of each event of metrics.jsonl; all else is passed over.
FIELDS = {
    "step": ("step", "lr", "loss", "images_per_second", "data_wait", "skipped"),
    "validation": ("step", "top1", "top5", "loss"),
    "noise_scale": ("step", "noise_scale"),
}
NULLABLE = ("loss", "noise_scale")  # JSON has no word for an infinite number
WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"  # of an export
NAME_A_RUN = "name the --output folder of a run"
MOST_STEPS = 2**53  # as whole numbers, a float holds no more


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it.

    ``events`` has a column for each of ``FIELDS``, in the order of the steps: null is NaN, ``skipped`` 0 or 1.
    ``summary`` is None while the run is not complete.
    """

    folder: Path
    plan: dict[str, Any]
    summary: dict[str, Any] | None
    events: dict[str, dict[str, Column]]

    @property
    def model(self) -> str:
        """timm's name of the model."""
        return str(self.plan["recipe"]["model"]["name"])

    @property
    def data_source(self) -> str:
        """What is trained on, as the config names it."""
        return str(self.plan["recipe"]["data"]["source"])

    @property
    def global_batch(self) -> int:
        """Images in an optimizer step."""
        return int(self.plan["train_batch_size"])

    @property
    def train_images(self) -> int:
        """Images in the training set."""
        return int(self.plan["recipe"]["data"]["train_images"])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last, partial batch is dropped."""
        return self.train_images // self.global_batch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, done or not."""
        return int(self.plan["recipe"]["schedule"]["epochs"]) * self.steps_per_epoch

    @property
    def micro_batch(self) -> int:
        """Images in a forward pass of one rank."""
        return int(self.plan["train_micro_batch_size_per_gpu"])

    @property
    def world_size(self) -> int:
        """The ranks of the plan, which says it by ranks × accumulation × micro-batch = global batch."""
        return self.global_batch // (self.micro_batch * int(self.plan["gradient_accumulation_steps"]))

    @property
    def steps_done(self) -> int:
        """Optimizer steps that are written down."""
        steps = self.events["step"]["step"]
        return int(steps[-1]) + 1 if steps.size else 0

    def epochs(self, event: str) -> Column:
        """Where in the training each line of an event lies: the epochs that were done after its step."""
        return (self.events[event]["step"] + 1) / self.steps_per_epoch


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        ValueError: it is not the folder of a run, or a file in it is not what a run writes; says which line, and what
            to do. A last line that is still being written is no error.
    """
    try:
        plan = _read_plan(folder)
        return RunFiles(folder, plan, read_summary(folder), _read_events(folder / METRICS))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}; mend that, or name another folder") from None


def run_meant(folder: Path) -> str:
    """What to name instead of a folder that is no run's: the first runs below it, as a study has them."""
    plans = sorted({*folder.glob(f"*/{PLAN}"), *folder.glob(f"*/*/{PLAN}")})
    within = [str(plan.parent) for plan in plans if plan.parent.parent.name != CHECKPOINTS]
    return f"did you mean {', '.join(within[:5])}?" if within else NAME_A_RUN


def _read_plan(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        found = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise ValueError(f"{found}; {NAME_A_RUN}")
    file = folder / PLAN
    if not file.exists():
        raise ValueError(f"{folder} holds no {PLAN}, so that it is not the folder of a run; {run_meant(folder)}")
    plan = parse_json(read_text(file, PLAN), str(file))
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "recipe.data.train_images",
        "recipe.schedule.epochs",
    ):
        number = _value(plan, key)
        if type(number) is not int or not 0 < number < MOST_STEPS:
            raise ValueError(f"{file} is not the plan of a run: {key} is not a whole number >= 1; {NAME_A_RUN}")
    for key in ("recipe.model.name", "recipe.data.source"):
        if not isinstance(_value(plan, key), str):
            raise ValueError(f"{file} is not the plan of a run: {key} is no string; {NAME_A_RUN}")
    if plan["train_batch_size"] > plan["recipe"]["data"]["train_images"]:
        raise ValueError(f"{file} is not the plan of a run: its train_batch_size is larger than its train_images")
    return plan


def _value(plan: Any, key: str) -> Any:
    """What a plan has under a dotted key; None if it has nothing there."""
    for part in key.split("."):
        plan = plan.get(part) if isinstance(plan, dict) else None
    return plan


def _read_events(file: Path) -> dict[str, dict[str, Column]]:
    columns = {event: {field: array("d") for field in fields} for event, fields in FIELDS.items()}
    latest = dict.fromkeys(FIELDS, -1)
    for number, line in _lines(file):
        event = line.get("event")
        if not isinstance(event, str):
            _refuse(file, number, "it names no event")
        if event not in FIELDS:
            continue
        step = line.get("step")
        if type(step) is not int or not 0 <= step < MOST_STEPS:
            _refuse(file, number, f"its step is not a whole number but {step!r:.40}")
        if step <= latest[event]:
            _refuse(file, number, f"step {step} comes after step {latest[event]}")
        latest[event] = step
        for field, column in columns[event].items():
            value: Any = line.get(field)
            try:
                column.append(value)
            except (TypeError, OverflowError):
                if value is not None or field not in NULLABLE or field not in line:
                    _refuse(file, number, f"its {field} is not a number")
                column.append(math.nan)
            if column[-1] in (math.inf, -math.inf):
                _refuse(file, number, f"its {field} is too large a number")
    return {
        event: {field: np.frombuffer(column) if column else np.empty(0) for field, column in fields.items()}
        for event, fields in columns.items()
    }


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file, numbered from 1, but for a last one that has no end yet."""
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return  # the run has only begun
    with opened:
        for number, raw in enumerate(opened, start=1):
            line = parse_object(raw)
            if line is not None:
                yield number, line
            elif raw.endswith(b"\n"):
                _refuse(file, number, "it is not a JSON object")


def _refuse(file: Path, number: int, problem: str) -> NoReturn:
    raise ValueError(f"{file}: line {number} is not what a run writes: {problem}; remove the line, or mend it")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its last part, or as many as it takes to tell it from the others.

    The folders are absolute, and none occurs twice.
    """
    assert len(set(folders)) == len(folders), "no name tells a folder from itself"
    depths = [1] * len(folders)
    while True:
        names = [str(Path(*folder.parts[-depth:])) for folder, depth in zip(folders, depths, strict=True)]
        repeated = [index for index, name in enumerate(names) if names.count(name) > 1]
        if not repeated:
            return names
        for index in repeated:
            depths[index] += 1
