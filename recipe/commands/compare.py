"""``python -m recipe compare``: how two runs differ, and from which step on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.checkpoints import NEVER_TO_CHANGE, batchnorm_images, is_same_training, leaves, stated
from recipe.commands import refusing
from recipe.commands.run_files import Column, RunFiles, read_run
from recipe.config import ABSENT, printable
from recipe.plan import counted
from recipe.reporting import Parser, table

SAME, DIFFERENT, TOO_EARLY = 0, 1, 3
VALUES = (("step", "loss"), ("validation", "top1"), ("validation", "top5"), ("validation", "loss"))  # event and field
# Relative to the larger value: more than rounding in double precision, and visible in a plot.
TOLERANCES = ("1e-9", "1e-3")
ENVIRONMENT = ("device", "hosts", "versions")  # keys of summary.json
MISSING = "–"
NO_WRAPPING = 10_000  # columns: the output is often searched or parsed


class Difference(NamedTuple):
    """A key and its two values, each as JSON or ``MISSING``."""

    key: str
    a: str
    b: str


@refusing
def main(argv: Sequence[str]) -> int:
    """Print the differences; return 0 if the runs agree, 1 if not, 2 on a refusal, 3 if it is too early to tell."""
    parser = Parser(
        prog="python -m recipe compare",
        description="Print how the plans of two runs differ, and from which step on their losses do. If the runs have "
        "different global batches, only their validations are compared. A run can be in progress.",
        epilog="Exit code: 0 if the two are the same training, wherever and however they ran, and all common losses "
        "and accuracies are bit-identical; 1 if not; 2 if a folder cannot be read; 3 if it is too early to tell, "
        "because the runs have no step in common.",
    )
    parser.add_argument("a", type=Path, metavar="RUN_A", help="output folder of a run")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="output folder of a second run")
    arguments = parser.parse_args(argv)
    lines, exit_code = compare(read_run(arguments.a), read_run(arguments.b))
    print("\n".join(lines))
    return exit_code


def compare(a: RunFiles, b: RunFiles) -> tuple[list[str], int]:
    """The lines to print and the exit code."""
    changed, free = plan_differences(a.plan.config.source.raw, b.plan.config.source.raw)
    if a.plan.world_size != b.plan.world_size:
        free.insert(0, Difference("ranks", str(a.plan.world_size), str(b.plan.world_size)))
    lines = _table("", [("A", str(a.folder), _progress(a)), ("B", str(b.folder), _progress(b))])
    lines += _differences("changes the training", changed) or ["", "The plans describe the same training."]
    lines += _differences("changes only where or how it runs", free)
    lines += _differences("environment", environment_differences(a, b))
    has_other_steps = any(difference.key in NEVER_TO_CHANGE for difference in changed)
    compared = [_compare_values(a, b, *values) for values in VALUES if values[0] != "step" or not has_other_steps]
    for rows, _ in compared:
        lines += ["", *rows]
    if changed or any(differ for _, differ in compared):
        return [*lines, "", "Not the same training."], DIFFERENT
    if compared[0][1] is None:
        return [*lines, "", "Too early to tell: the runs have no step in common yet."], TOO_EARLY
    return [*lines, "", "The same training, bit-identical in all common values."], SAME


def plan_differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Difference], list[Difference]]:
    """The differences that change the training, and those that change only where or how it runs."""
    keys_a, keys_b = stated(a), stated(b)
    changed: list[Difference] = []
    free: list[Difference] = []
    for found in _differing(keys_a, keys_b):
        is_same = is_same_training(found.key, keys_a.get(found.key), keys_b.get(found.key))
        (free if is_same else changed).append(found)
    images_a, images_b = batchnorm_images(a), batchnorm_images(b)
    statistics = "recipe.batchnorm.statistics"
    if images_a != images_b and keys_a.get(statistics) == keys_b.get(statistics):
        # Ranks and micro-batch then change what batch norm computes.
        changed.append(Difference(f"images in {statistics}", str(images_a), str(images_b)))
    return changed, free


def environment_differences(a: RunFiles, b: RunFiles) -> list[Difference]:
    """Differences in hardware and versions that both summaries state; none until both runs are complete."""
    if a.summary is None or b.summary is None:
        return []
    found_a, found_b = (leaves({key: summary[key] for key in ENVIRONMENT}) for summary in (a.summary, b.summary))
    return [difference for difference in _differing(found_a, found_b) if MISSING not in difference]


def relative_differences(a: Column, b: Column) -> Column:
    """|a - b| / max(|a|, |b|): 0 if both are equal or neither is finite, infinite if only one is finite."""
    a, b = np.nan_to_num(a, nan=np.inf), np.nan_to_num(b, nan=np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    relative[np.isinf(a) != np.isinf(b)] = np.inf
    relative[a == b] = 0
    return relative


def _compare_values(a: RunFiles, b: RunFiles, event: str, field: str) -> tuple[list[str], bool | None]:
    """Lines on a field's values at common epochs, and whether any value differs; None if no epoch is common."""
    epochs, at_a, at_b = np.intersect1d(a.epochs(event), b.epochs(event), assume_unique=True, return_indices=True)
    if not epochs.size:
        return [f"{event} {field}, no common values yet"], None
    steps, of_a, of_b = a.events[event]["step"][at_a], a.events[event][field][at_a], b.events[event][field][at_b]
    relative = relative_differences(of_a, of_b)

    def described(place: int) -> str:
        where = f"step {int(steps[place])}, epoch" if event == "step" else "epoch"
        return f"{where} {epochs[place]:.4g}: A {_number(of_a[place])}, B {_number(of_b[place])}"

    rows = [("first difference", "never: bit-identical")]
    if relative.any():
        rows = [("first difference", described(int((relative > 0).argmax())))]
        for limit in TOLERANCES:
            beyond = relative > float(limit)
            rows.append((f"first > {limit}", described(int(beyond.argmax())) if beyond.any() else "never"))
        largest = int(relative.argmax())
        rows.append(("largest", f"{described(largest)}, difference {relative[largest]:.3g}"))
    rows.append(("last value", described(epochs.size - 1)))
    title = f"{event} {field}, {counted(epochs.size, 'common value')} (differences relative to the larger)"
    return _table(title, rows), bool(relative.any())


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    texts_a, texts_b = ({key: json.dumps(keys[key], ensure_ascii=False) for key in keys} for keys in (a, b))
    different = (key for key in {**a, **b} if a.get(key, ABSENT) != b.get(key, ABSENT))
    return [Difference(key, texts_a.get(key, MISSING), texts_b.get(key, MISSING)) for key in different]


def _differences(title: str, differences: Sequence[Difference]) -> list[str]:
    return ["", *_table(title, [("", "A", "B"), *differences])] if differences else []


def _table(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns below a title, with text from files made safe to print."""
    lines = table([[printable(cell) for cell in row] for row in rows], NO_WRAPPING).splitlines()
    return [title, *(f"  {line}" for line in lines)] if title else lines


def _progress(run: RunFiles) -> str:
    state = "not complete" if run.summary is None else "complete"
    return f"{run.steps_done:,} of {counted(run.plan.total_steps, 'step')}, {state}"


def _number(number: float) -> str:
    """A number with all the digits that identify it."""
    return "not finite" if np.isnan(number) else repr(float(number))
