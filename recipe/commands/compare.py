"""``python -m recipe compare``: what differs between two runs, and from which step on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.checkpoints import NEVER_TO_CHANGE, batchnorm_images, is_same_training, leaves, stated
from recipe.commands import refusing
from recipe.commands.run_files import Column, RunFiles, read_run
from recipe.config import ABSENT, printable
from recipe.reporting import Parser

SAME, DIFFERENT, NOT_TOLD_YET = 0, 1, 3
# Relative to the larger loss, with their names: beyond rounding in double precision, and what a curve may show.
TOLERANCES = (("1e-9", 1e-9), ("1e-3", 1e-3))
ENVIRONMENT = ("device", "hosts", "versions")  # of summary.json
APART = " (apart: relative to the larger loss)"
MISSING = "–"


class Difference(NamedTuple):
    """A key whose values differ, as JSON or ``MISSING``."""

    key: str
    a: str
    b: str


@refusing
def main(argv: Sequence[str]) -> int:
    """Print what differs; return 0 if it is the same training, 1 if not, 2 on a refusal, 3 if nothing tells yet."""
    parser = Parser(
        prog="python -m recipe compare",
        description="Print what differs between the plans of two runs, and from which step on their losses part. Runs "
        "whose steps hold other images are compared by epoch. A run may be in progress.",
        epilog="Exit code: 0 if as far as both have come it is the same training, with the same losses and accuracies "
        "to the last bit, wherever and however it ran; 1 if not; 2 if a folder cannot be read; 3 if nothing tells yet, "
        "because there is no step (of other batch sizes: no epoch) that both have done.",
    )
    parser.add_argument("a", type=Path, metavar="RUN_A", help="output folder of a run")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="output folder of another")
    arguments = parser.parse_args(argv)
    lines, exit_code = compare(read_run(arguments.a), read_run(arguments.b))
    print("\n".join(lines))
    return exit_code


def compare(a: RunFiles, b: RunFiles) -> tuple[list[str], int]:
    """The lines to print, and the exit code."""
    changed, free = plan_differences(a, b)
    lines = _table("", [("A", str(a.folder), _progress(a)), ("B", str(b.folder), _progress(b))])
    lines += _differences("changes the training", changed) or ["", "The plans say the same training."]
    lines += _differences("only where or how it runs", free)
    lines += _differences("what it ran on", environment_differences(a, b))
    if any(difference.key in NEVER_TO_CHANGE for difference in changed):
        losses, differ = _compare_by_epoch(a, b)
    else:
        losses, differ = _compare_by_step(a, b)
    validations, validations_differ = _compare_validations(a, b)
    lines += [*losses, *validations, ""]
    if changed or differ or validations_differ:
        return [*lines, "Not the same training."], DIFFERENT
    if differ is None:
        return [*lines, "Whether it is the same training, nothing tells yet."], NOT_TOLD_YET
    return [*lines, "The same training, as far as both have come."], SAME


def plan_differences(a: RunFiles, b: RunFiles) -> tuple[list[Difference], list[Difference]]:
    """What of two plans changes the training, and what says only where or how it runs."""
    keys_a, keys_b = (stated(run.plan) for run in (a, b))
    found = _differing(keys_a, keys_b)
    changed = [
        difference
        for difference in found
        if not is_same_training(difference.key, keys_a.get(difference.key), keys_b.get(difference.key))
    ]
    free = [difference for difference in found if difference not in changed]
    images_a, images_b = batchnorm_images(a.plan), batchnorm_images(b.plan)
    statistics = "recipe.batchnorm.statistics"
    if images_a != images_b and keys_a.get(statistics) == keys_b.get(statistics):
        # Then it is ranks and micro-batch that decide what is trained.
        changed.append(Difference(f"images in {statistics}", str(images_a), str(images_b)))
    if a.world_size != b.world_size:
        free.insert(0, Difference("ranks", str(a.world_size), str(b.world_size)))
    return changed, free


def environment_differences(a: RunFiles, b: RunFiles) -> list[Difference]:
    """Hardware and versions, as far as both runs are complete and say them."""
    if a.summary is None or b.summary is None:
        return []
    found = [
        dict(leaves({key: summary[key] for key in ENVIRONMENT if key in summary})) for summary in (a.summary, b.summary)
    ]
    return [difference for difference in _differing(*found) if MISSING not in difference]


def relative_differences(a: Column, b: Column) -> Column:
    """|a - b| / max(|a|, |b|): 0 where both are the same number or not finite, infinite where only one is."""
    a, b = np.nan_to_num(a, nan=np.inf), np.nan_to_num(b, nan=np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    relative[np.isinf(a) != np.isinf(b)] = np.inf
    relative[a == b] = 0
    return relative


def epoch_means(run: RunFiles) -> tuple[Column, Column]:
    """The epochs, from 0, of which every step is there, and the mean of their losses that are finite."""
    steps, losses = run.events["step"]["step"], run.events["step"]["loss"]
    epochs, starts, counts = np.unique(steps // run.steps_per_epoch, return_index=True, return_counts=True)
    whole = counts == run.steps_per_epoch
    is_finite = ~np.isnan(losses)
    if not starts.size:
        return epochs, epochs
    sums = np.add.reduceat(np.where(is_finite, losses, 0), starts)[whole]
    finite = np.add.reduceat(is_finite, starts, dtype=float)[whole]
    return epochs[whole], np.divide(sums, finite, out=np.full(sums.size, np.nan), where=finite > 0)


def _compare_by_step(a: RunFiles, b: RunFiles) -> tuple[list[str], bool | None]:
    """Lines on the losses of the steps that both have, and whether any differs; None if there is no such step."""
    events_a, events_b = a.events["step"], b.events["step"]
    steps, at_a, at_b = np.intersect1d(events_a["step"], events_b["step"], assume_unique=True, return_indices=True)
    if not steps.size:
        return ["", "There is no step yet that both have done."], None

    def where(place: int) -> str:
        return f"step {int(steps[place])} (epoch {int(steps[place]) // a.steps_per_epoch + 1})"

    rows, differ = _partings(events_a["loss"][at_a], events_b["loss"][at_b], where, TOLERANCES)
    return ["", *_table(f"training loss, {_count(steps.size, 'step')} in common{APART}", rows)], differ


def _compare_by_epoch(a: RunFiles, b: RunFiles) -> tuple[list[str], bool | None]:
    """Lines on the mean losses of the epochs that both have, and whether any differs; None if there is none."""
    (epochs_a, means_a), (epochs_b, means_b) = epoch_means(a), epoch_means(b)
    epochs, at_a, at_b = np.intersect1d(epochs_a, epochs_b, assume_unique=True, return_indices=True)
    steps = [f"{run.global_batch:,} of {run.train_images:,} images" for run in (a, b)]
    lines = ["", f"Compared by epoch: a step of A is {steps[0]}, of B {steps[1]}."]
    if not epochs.size:
        return [*lines, "There is no epoch yet that both have done."], None
    a_mean, b_mean = means_a[at_a], means_b[at_b]
    rows, differ = _partings(a_mean, b_mean, lambda place: f"epoch {int(epochs[place]) + 1}", TOLERANCES[-1:])
    last = f"epoch {int(epochs[-1]) + 1}: A {_number(a_mean[-1])}, B {_number(b_mean[-1])}"
    title = f"training loss, means of {_count(epochs.size, 'epoch')} in common{APART}"
    return [*lines, *_table(title, [*rows, ("last", last)])], differ


def _compare_validations(a: RunFiles, b: RunFiles) -> tuple[list[str], bool]:
    """Lines on the validations after the epochs that both have, and whether any differs."""
    events_a, events_b = a.events["validation"], b.events["validation"]
    epochs, at_a, at_b = np.intersect1d(
        a.epochs("validation"), b.epochs("validation"), assume_unique=True, return_indices=True
    )
    if not epochs.size:
        return ["", "There is no validation yet that both have done."], False
    differs = np.zeros(epochs.size, dtype=bool)
    for field in ("top1", "top5", "loss"):
        differs |= relative_differences(events_a[field][at_a], events_b[field][at_b]) > 0
    top1_a, top1_b = events_a["top1"][at_a], events_b["top1"][at_b]

    def described(place: int) -> str:
        points = top1_b[place] - top1_a[place]
        text = f"epoch {epochs[place]:g}: top-1 A {top1_a[place]:.2f} %, B {top1_b[place]:.2f} % ({points:+.2f} points)"
        return f"{text}, top-5 or loss differ" if differs[place] and not points else text

    rows = [("first differs", "never: it is the same to the last bit")]
    if differs.any():
        rows = [("first differs", described(int(differs.argmax())))]
        rows.append(("differs most", described(int(np.abs(top1_b - top1_a).argmax()))))
    rows.append(("last", described(epochs.size - 1)))
    return ["", *_table(f"validation, {_count(epochs.size, 'epoch')} in common", rows)], bool(differs.any())


def _partings(
    a: Column, b: Column, where: Callable[[int], str], tolerances: Sequence[tuple[str, float]]
) -> tuple[list[tuple[str, str]], bool]:
    """Rows that say where two series first differ, part by more than each tolerance, and differ most; and whether."""
    relative = relative_differences(a, b)

    def described(place: int) -> str:
        return f"{where(place)}: A {_number(a[place])}, B {_number(b[place])}"

    if not relative.any():
        return [("first differs", "never: it is the same to the last bit")], False
    rows = [("first differs", described(int((relative > 0).argmax())))]
    for name, limit in tolerances:
        beyond = relative > limit
        rows.append((f"apart > {name}", described(int(beyond.argmax())) if beyond.any() else "never"))
    most = int(relative.argmax())
    rows.append(("differs most", f"{described(most)}, {relative[most]:.3g} apart"))
    return rows, True


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    def shown(keys: dict[str, Any], key: str) -> str:
        return json.dumps(keys[key], ensure_ascii=False) if key in keys else MISSING

    return [
        Difference(key, shown(a, key), shown(b, key)) for key in {**a, **b} if a.get(key, ABSENT) != b.get(key, ABSENT)
    ]


def _differences(title: str, differences: Sequence[Difference]) -> list[str]:
    return ["", *_table(title, [("", "A", "B"), *differences])] if differences else []


def _table(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns beneath a title; what comes from files is made safe to print."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [title, *(f"  {line}" for line in lines)] if title else lines


def _progress(run: RunFiles) -> str:
    done = f"{run.steps_done:,} of {_count(run.total_steps, 'step')}"
    return f"{done}, {'not complete' if run.summary is None else 'complete'}"


def _number(loss: float) -> str:
    """A loss, with as many digits as it takes to tell it from any other."""
    return "not finite" if np.isnan(loss) else repr(float(loss))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
