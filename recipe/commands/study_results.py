"""What a study has found: the result of each run, and mean and standard deviation over the seeds of a case."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.commands.study_file import Study, Training
from recipe.commands.study_runs import Launch, State, read_launches, state
from recipe.summary import read_summary


@dataclass(frozen=True)
class Result:
    """A run. Errors are top-1 validation errors in per cent, None unless it is complete; the median is that of the
    last five epochs, the paper's convention (§5.1). ``seconds`` and ``cpu_seconds`` add up all of its launches.
    """

    training: Training
    state: State
    median_error: float | None
    final_error: float | None
    best_error: float | None
    seconds: float
    cpu_seconds: float
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Spread:
    """The median errors of a case's complete runs: their mean and sample standard deviation, in per cent."""

    mean: float | None
    std: float | None
    complete: int
    diverged: int
    open: int

    def __str__(self) -> str:
        """As the paper writes it; what is missing in it is told."""
        runs = self.complete + self.diverged + self.open
        found = [] if self.mean is None else [f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")]
        if self.diverged:
            found.append("diverged" if self.diverged == runs else f"{self.diverged} of {runs} diverged")
        if self.open:
            found.append(f"{self.open} of {runs} not run")
        return ", ".join(found)


def read_results(study: Study, output: Path) -> list[Result]:
    """The results of all runs, case by case, as they lie in the study's output."""
    launches = read_launches(output)
    return [_result(training, output, launches) for case in study.file.cases for training in study.of_case(case.name)]


def spread(results: Sequence[Result]) -> Spread:
    """Mean and sample standard deviation (divided by n - 1) of what is complete; of a single run there is no std."""
    errors = [result.median_error for result in results if result.median_error is not None]
    return Spread(
        mean=statistics.mean(errors) if errors else None,
        std=statistics.stdev(errors) if len(errors) > 1 else None,
        complete=len(errors),
        diverged=sum(result.state == "diverged" for result in results),
        open=sum(result.state == "open" for result in results),
    )


def settings(training: Training) -> dict[str, Any]:
    """What a run was trained with, in the words of the config."""
    plan, rules = training.plan, training.plan.config.recipe.schedule
    return {
        "global_batch": plan.global_batch,
        "accumulation_steps": plan.accumulation,
        "scaling_rule": rules.scaling_rule,
        "reference_lr": rules.reference_lr,
        "peak_rate": float(f"{plan.schedule.peak_rate:.6g}"),
        "warmup": plan.schedule.warmup,
        "warmup_epochs": rules.warmup_epochs if plan.schedule.warmup_steps else 0,
        "weight_decay_rule": rules.weight_decay_rule,
        "weight_decay": plan.weight_decay,
        "zero_init_last": plan.config.recipe.model.zero_init_last,
        "epochs": plan.epochs,
        "steps": plan.total_steps,
    }


def write_csv(results: Sequence[Result], file: Path) -> None:
    """One line a run."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = [_row(result) for result in results]
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _row(result: Result) -> dict[str, Any]:
    errors = {
        "median_error_percent": result.median_error,
        "final_error_percent": result.final_error,
        "best_error_percent": result.best_error,
    }
    return {
        "case": result.training.case.name,
        "seed": result.training.seed,
        **settings(result.training),
        "state": result.state,
        **{name: "" if error is None else f"{error:.4f}" for name, error in errors.items()},
        "wall_seconds": f"{result.seconds:.1f}",
        "cpu_seconds": f"{result.cpu_seconds:.1f}",
    }


def _result(training: Training, output: Path, launches: Sequence[Launch]) -> Result:
    summary = read_summary(output / training.folder)
    own = [launch for launch in launches if (launch.case, launch.seed) == (training.case.name, training.seed)]
    return Result(
        training=training,
        state=state(training, output),
        median_error=None if summary is None else float(summary["median_error_last_epochs"]),
        final_error=None if summary is None else 100 - float(summary["final_top1"]),
        best_error=None if summary is None else 100 - float(summary["best_top1"]),
        seconds=sum(launch.wall_seconds for launch in own),
        cpu_seconds=sum(launch.cpu_seconds for launch in own),
        summary=summary,
    )
