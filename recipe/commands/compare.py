"""``python -m recipe compare``: what differs between two runs, and from which step on."""

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
TOLERANCES = (
    "1e-9",
    "1e-3",
)  # relative to the larger loss: beyond rounding in double precision, and what a curve may show
ENVIRONMENT = ("device", "hosts", "versions")  # of summary.json
MISSING = "–"
NO_WRAPPING = 10_000  # columns: the answer is often read by programs, or searched


class Difference(NamedTuple):
    """A key whose values differ, as JSON or ``MISSING``."""

    key: str
    a: str
    b: str


@refusing
def main(argv: Sequence[str]) -> int:
    """Print what differs; return 0 if it is the same training, 1 if not, 2 on a refusal, 3 if it is too early."""
    parser = Parser(
        prog="python -m recipe compare",
        description="Print what differs between the plans of two runs, and from which step on their losses part. Of "
        "runs with other global batches only the validations are compared. A run may be in progress.",
        epilog="Exit code: 0 if as far as both have come it is the same training, with the same losses and accuracies "
        "to the last bit, wherever and however it ran; 1 if not; 2 if a folder cannot be read; 3 if it is too early to "
        "say, because there is no step that both have done.",
    )
    parser.add_argument("a", type=Path, metavar="RUN_A", help="output folder of a run")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="output folder of another")
    arguments = parser.parse_args(argv)
    lines, exit_code = compare(read_run(arguments.a), read_run(arguments.b))
    print("\n".join(lines))
    return exit_code


def compare(a: RunFiles, b: RunFiles) -> tuple[list[str], int]:
    """The lines to print, and the exit code."""
    changed, free = plan_differences(a.plan.config.source.raw, b.plan.config.source.raw)
    if a.plan.world_size != b.plan.world_size:
        free.insert(0, Difference("ranks", str(a.plan.world_size), str(b.plan.world_size)))
    lines = _table("", [("A", str(a.folder), _progress(a)), ("B", str(b.folder), _progress(b))])
    lines += _differences("changes the training", changed) or ["", "The plans say the same training."]
    lines += _differences("only where or how it runs", free)
    lines += _differences("what it ran on", environment_differences(a, b))
    has_other_steps = any(difference.key in NEVER_TO_CHANGE for difference in changed)
    losses, differ = ([], None) if has_other_steps else _compare_losses(a, b)
    validations, validations_differ = _compare_validations(a, b)
    lines += [*losses, *validations, ""]
    if changed or differ or validations_differ:
        return [*lines, "Not the same training."], DIFFERENT
    if differ is None:
        return [*lines, "It is too early to say whether it is the same training."], TOO_EARLY
    return [*lines, "The same training, as far as both have come."], SAME


def plan_differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Difference], list[Difference]]:
    """What of two plans changes the training, and what says only where or how it runs."""
    keys_a, keys_b = stated(a), stated(b)
    changed: list[Difference] = []
    free: list[Difference] = []
    for found in _differing(keys_a, keys_b):
        is_same = is_same_training(found.key, keys_a.get(found.key), keys_b.get(found.key))
        (free if is_same else changed).append(found)
    images_a, images_b = batchnorm_images(a), batchnorm_images(b)
    statistics = "recipe.batchnorm.statistics"
    if images_a != images_b and keys_a.get(statistics) == keys_b.get(statistics):
        # Then it is ranks and micro-batch that decide what is trained.
        changed.append(Difference(f"images in {statistics}", str(images_a), str(images_b)))
    return changed, free


def environment_differences(a: RunFiles, b: RunFiles) -> list[Difference]:
    """Hardware and versions, as far as both runs are complete and say them."""
    if a.summary is None or b.summary is None:
        return []
    found = [leaves({key: summary[key] for key in ENVIRONMENT if key in summary}) for summary in (a.summary, b.summary)]
    return [difference for difference in _differing(*found) if MISSING not in difference]


def relative_differences(a: Column, b: Column) -> Column:
    """|a - b| / max(|a|, |b|): 0 where both are the same number or not finite, infinite where only one is."""
    a, b = np.nan_to_num(a, nan=np.inf), np.nan_to_num(b, nan=np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    relative[np.isinf(a) != np.isinf(b)] = np.inf
    relative[a == b] = 0
    return relative


def _compare_losses(a: RunFiles, b: RunFiles) -> tuple[list[str], bool | None]:
    """Lines on the losses of the steps that both have, and whether any differs; None if there is no such step."""
    events_a, events_b = a.events["step"], b.events["step"]
    steps, at_a, at_b = np.intersect1d(events_a["step"], events_b["step"], assume_unique=True, return_indices=True)
    if not steps.size:
        return ["", "There is no step yet that both have done."], None
    losses_a, losses_b = events_a["loss"][at_a], events_b["loss"][at_b]
    relative = relative_differences(losses_a, losses_b)

    def described(place: int) -> str:
        step, loss_a, loss_b = int(steps[place]), _number(losses_a[place]), _number(losses_b[place])
        return f"step {step} (epoch {step // a.plan.steps_per_epoch + 1}): A {loss_a}, B {loss_b}"

    rows = [("first differs", "never: it is the same to the last bit")]
    if relative.any():
        rows = [("first differs", described(int((relative > 0).argmax())))]
        for limit in TOLERANCES:
            beyond = relative > float(limit)
            rows.append((f"apart > {limit}", described(int(beyond.argmax())) if beyond.any() else "never"))
        most = int(relative.argmax())
        rows.append(("differs most", f"{described(most)}, {relative[most]:.3g} apart"))
    title = f"training loss, {counted(steps.size, 'step')} in common (apart: relative to the larger loss)"
    return ["", *_table(title, rows)], bool(relative.any())


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
    return ["", *_table(f"validation, {counted(epochs.size, 'epoch')} in common", rows)], bool(differs.any())


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
    lines = table([[printable(cell) for cell in row] for row in rows], NO_WRAPPING).splitlines()
    return [title, *(f"  {line}" for line in lines)] if title else lines


def _progress(run: RunFiles) -> str:
    done = f"{run.steps_done:,} of {counted(run.plan.total_steps, 'step')}"
    return f"{done}, {'not complete' if run.summary is None else 'complete'}"


def _number(loss: float) -> str:
    """A loss, with as many digits as it takes to tell it from any other."""
    return "not finite" if np.isnan(loss) else repr(float(loss))
