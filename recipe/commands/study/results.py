"""What a study has found: the result of each run, and mean and standard deviation over the seeds of a case."""

import csv
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.checkpoints import leaves
from recipe.commands.study.file import Study, Training
from recipe.commands.study.runs import Launch, State, diverged_at, ending, read_launches, read_plan, was_interrupted
from recipe.plan import plan_json
from recipe.reporting import LAST_EPOCHS, read_summary, steps_done

# Keys of a plan that tables tell by shorter names.
NAMES = {
    "recipe.model.name": "model",
    "recipe.model.zero_init_last": "zero_init_last",
    "recipe.data.source": "data",
    "recipe.data.train_images": "train_images",
    "recipe.data.validation_images": "validation_images",
    "recipe.data.image_size": "image_size",
    "recipe.data.crop": "crop",
    "recipe.batchnorm.statistics": "batchnorm_statistics",
    "optimizer.params.momentum": "momentum",
    "recipe.schedule.epochs": "epochs",
    "recipe.schedule.scaling_rule": "scaling_rule",
    "recipe.schedule.reference_lr": "reference_lr",
    "recipe.schedule.reference_batch_size": "reference_batch_size",
    "recipe.schedule.decay_epochs": "decay_epochs",
    "recipe.schedule.decay_factor": "decay_factor",
    "recipe.schedule.weight_decay_rule": "weight_decay_rule",
}
# Keys that a table tells by what comes of them (``settings``), the seed, and the loader's processes, which change no
# image and are more or fewer on each machine.
RESOLVED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "recipe.max_micro_batch_size",
    "fp16.enabled",
    "bf16.enabled",
    "recipe.precision",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "recipe.schedule.warmup",
    "recipe.schedule.warmup_epochs",
    "zero_allow_untested_optimizer",
    "recipe.seed",
    "recipe.data.workers",
)


@dataclass(frozen=True)
class Result:
    """A run. ``keys`` are those of the plan by which it began, or else of the one that it will have.

    Errors are top-1 validation errors in per cent, None unless it is complete; the median is that of the
    last five epochs, the paper's convention (§5.1), or of all where it has fewer. ``reason`` says why it is not
    complete. ``seconds`` and ``cpu_seconds`` add up all of its launches, None where those of one are not known.
    """

    training: Training
    keys: dict[str, Any]
    state: State
    reason: str
    median_error: float | None
    final_error: float | None
    best_error: float | None
    seconds: float | None
    cpu_seconds: float | None
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation, which a single value has not."""

    mean: float | None
    std: float | None

    def __str__(self) -> str:
        """As the paper writes it."""
        return "" if self.mean is None else f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def read_results(study: Study, output: Path) -> list[Result]:
    """The results of all runs, case by case, as they lie in the study's output."""
    launches = read_launches(output)
    return [_result(training, output, launches) for case in study.file.cases for training in study.of_case(case.name)]


def spread(errors: Iterable[float | None]) -> Spread:
    """Mean and sample standard deviation (divided by n - 1) of what is there."""
    found = [error for error in errors if error is not None]
    return Spread(statistics.mean(found) if found else None, statistics.stdev(found) if len(found) > 1 else None)


def missing(results: Sequence[Result]) -> str:
    """What the runs of a case have come to that are not complete; "" if all are."""
    counts = Counter(result.state for result in results if result.state != "complete")
    runs = len(results)
    return ", ".join(state if count == runs else f"{count} of {runs} {state}" for state, count in counts.items())


def last_epochs(trainings: Iterable[Training]) -> str:
    """Of which epochs the median error is."""
    counts = sorted({min(LAST_EPOCHS, training.plan.epochs) for training in trainings})
    if counts == [1]:
        return "the last epoch"
    return f"the last {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} epochs"


def settings(result: Result) -> dict[str, Any]:
    """What a run was trained with: what a reader looks for first, much in the words of the config."""
    plan, rules = result.training.plan, result.training.plan.config.recipe.schedule
    warmup, start = plan.schedule.warmup, plan.schedule.start_rate
    return {
        "global_batch": plan.global_batch,
        "accumulation_steps": result.keys.get("gradient_accumulation_steps"),
        **{name: result.keys.get(key) for key, name in NAMES.items()},
        "precision": plan.precision,
        "peak_rate": float(f"{plan.schedule.peak_rate:.6g}"),
        "warmup": warmup if warmup == "none" or start == rules.reference_lr else f"{warmup} from {start:g}",
        "warmup_epochs": rules.warmup_epochs if plan.schedule.warmup_steps else 0,
        "weight_decay": plan.weight_decay,
        "steps": plan.total_steps,
    }


def all_settings(result: Result) -> dict[str, Any]:
    """``settings``, and every other key of the plan; of those that follow from others, none."""
    others = {key: value for key, value in result.keys.items() if key not in NAMES and key not in RESOLVED}
    return settings(result) | others


def differing(results: Iterable[Result]) -> list[str]:
    """The names in ``all_settings`` that not all runs have alike; a key that one of them lacks is one of these."""
    found = [all_settings(result) for result in results]
    names = dict.fromkeys(name for values in found for name in values)
    return [name for name in names if any(values.get(name) != found[0].get(name) for values in found)]


def write_csv(results: Sequence[Result], file: Path) -> None:
    """One line a run."""
    names = [*settings(results[0]), *differing(results)]
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = [_row(result, list(dict.fromkeys(names))) for result in results]
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _row(result: Result, names: Sequence[str]) -> dict[str, Any]:
    errors = {
        "median_error_percent": result.median_error,
        "final_error_percent": result.final_error,
        "best_error_percent": result.best_error,
    }
    seconds = {"wall_seconds": result.seconds, "cpu_seconds": result.cpu_seconds}
    values = all_settings(result)
    return {
        "case": result.training.case.name,
        "seed": result.training.seed,
        **{name: values.get(name) for name in names},
        "state": result.state,
        "reason": result.reason,
        **{name: "" if error is None else f"{error:.4f}" for name, error in errors.items()},
        **{name: "" if time is None else f"{time:.1f}" for name, time in seconds.items()},
    }


def _result(training: Training, output: Path, launches: Sequence[Launch]) -> Result:
    summary = read_summary(output / training.folder)
    own = [launch for launch in launches if (launch.case, launch.seed) == (training.case.name, training.seed)]
    state, reason = _state(training, output, own)
    begun = read_plan(training, output)
    keys = dict(leaves(json.loads(plan_json(training.plan)) if begun is None else begun))
    if begun is None and training.plan.assumes_micro_batch:
        keys["gradient_accumulation_steps"] = "auto"
    return Result(
        training=training,
        keys=keys,
        state=state,
        reason=reason,
        median_error=None if summary is None else float(summary["median_error_last_epochs"]),
        final_error=None if summary is None else 100 - float(summary["final_top1"]),
        best_error=None if summary is None else 100 - float(summary["best_top1"]),
        seconds=_total(launch.wall_seconds for launch in own),
        cpu_seconds=_total(launch.cpu_seconds for launch in own),
        summary=summary,
    )


def _state(training: Training, output: Path, launches: Sequence[Launch]) -> tuple[State, str]:
    """What has become of a run, by its folder and its launches, and why it is not complete."""
    folder = output / training.folder
    ended, done = ending(training, output), steps_done(folder)
    if ended == "complete":
        return ended, ""
    if ended == "diverged":
        return ended, f"the loss of step {diverged_at(folder)} is not finite"
    if not launches and not done:
        return "not started", ""
    failure = launches[-1].failure if launches else None
    if failure is not None and not was_interrupted(failure):
        return "failed", failure
    return "interrupted", f"{done:,} of {training.plan.total_steps:,} steps are done"


def _total(seconds: Iterable[float | None]) -> float | None:
    times = list(seconds)
    return None if None in times else sum(time for time in times if time is not None)
