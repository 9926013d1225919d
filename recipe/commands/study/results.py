"""What a study has found, per run and per case, as CSV and as a report in Markdown."""

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from recipe.commands.machine import processor
from recipe.commands.study.file import CSV, Study, Training
from recipe.commands.study.runs import LAUNCH_LOG, diverged_at, ending
from recipe.config import printable
from recipe.plan import plan_json
from recipe.reporting import LAST_EPOCHS, SUMMARY, read_summary, steps_done

State = Literal["complete", "diverged", "failed", "interrupted", "not started"]
ERRORS = ("median", "final", "best")
CONFIDENCE = 0.95
COMPARED = (
    "Minus its baseline: the differences between the median errors of the same seed, their mean ± half of its "
    f"{CONFIDENCE:.0%} confidence interval (Student's t). Bold where the interval does not contain 0: a difference "
    "that the seeds' scatter does not explain."
)


@dataclass(frozen=True)
class Result:
    """How a run ended; ``reason`` says why it is not complete.

    ``errors`` are the top-1 validation errors in per cent by the names of ``ERRORS``, empty unless it is complete; the
    median is that of the last five epochs (§5.1 of the paper), or of all where it has fewer.
    """

    training: Training
    state: State
    reason: str
    errors: dict[str, float]
    summary: dict[str, Any] | None
    date: str | None


def read_results(study: Study, output: Path, failures: Mapping[Training, str] | None = None) -> list[Result]:
    """The results of all runs, case by case; ``failures`` has the reason of each run that has just failed."""
    order = list(study.file.cases)
    trainings = sorted(study.trainings, key=lambda training: order.index(training.case))
    return [_result(training, output / training.folder, (failures or {}).get(training)) for training in trainings]


def _result(training: Training, folder: Path, failure: str | None) -> Result:
    summary = read_summary(folder)
    if summary is None:
        return Result(training, *_why_incomplete(training, folder, failure), {}, None, None)
    errors = (summary["median_error_last_epochs"], 100 - summary["final_top1"], 100 - summary["best_top1"])
    day = date.fromtimestamp((folder / SUMMARY).stat().st_mtime).isoformat()
    return Result(training, "complete", "", dict(zip(ERRORS, errors, strict=True)), summary, day)


def _why_incomplete(training: Training, folder: Path, failure: str | None) -> tuple[State, str]:
    if ending(folder) == "diverged":
        return "diverged", f"the loss of step {diverged_at(folder)} is not finite"
    if failure is not None:
        return "failed", failure
    done = steps_done(folder)
    if not done and not (folder / LAUNCH_LOG).exists():
        return "not started", ""
    return "interrupted", f"{done:,} of {training.plan.total_steps:,} steps are done"


def spread(runs: Iterable[Result], error: str = "median") -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1) over the complete runs; NaN for want of runs."""
    errors = [run.errors[error] for run in runs if run.errors]
    mean = statistics.mean(errors) if errors else math.nan
    return mean, statistics.stdev(errors) if len(errors) > 1 else math.nan


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two differences, and half the width of its confidence interval by Student's t."""
    from scipy.stats import t  # it takes a second to import

    share = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return statistics.mean(differences), share * statistics.stdev(differences) / math.sqrt(len(differences))


def apart(runs: Iterable[Result], baseline: Iterable[Result]) -> str:
    """How much larger the median error is than the baseline's, paired by seed, as the table has it."""
    of_baseline = {run.training.seed: run.errors["median"] for run in baseline if run.errors}
    pairs = [(run.errors["median"], of_baseline.get(run.training.seed)) for run in runs if run.errors]
    differences = [error - other for error, other in pairs if other is not None]
    if len(differences) < 2:
        return "".join(f"{difference:+.2f}" for difference in differences)
    mean, half = interval(differences)
    text = f"{mean:+.2f} ± {half:.2f}"
    return f"**{text}**" if abs(mean) > half else text


def missing(results: Sequence[Result]) -> str:
    """How many runs of a case are not complete, and what they are instead; "" if all are complete."""
    counts = Counter(result.state for result in results if result.state != "complete")
    runs = len(results)
    return ", ".join(state if count == runs else f"{count} of {runs} {state}" for state, count in counts.items())


def last_epochs(trainings: Iterable[Training]) -> str:
    """The epochs over which the median error is taken, in words."""
    counts = sorted({min(LAST_EPOCHS, training.plan.epochs) for training in trainings})
    if counts == [1]:
        return "the last epoch"
    return f"the last {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} epochs"


def settings(study: Study, training: Training) -> dict[str, str]:
    """What the plan of a run says of each key that any case sets; its peak rate and steps, which follow from them."""
    found = {}
    for key in dict.fromkeys(key for case in study.file.cases for key in case.set):
        value: Any = json.loads(plan_json(training.plan))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found[key] = value if isinstance(value, str) else "–" if value is None else json.dumps(value)
    return found | {"peak rate": f"{training.plan.schedule.peak_rate:.6g}", "steps": f"{training.plan.total_steps}"}


def write_csv(study: Study, results: Sequence[Result], file: Path) -> None:
    """Write one line per run."""
    rows = [
        {
            "case": result.training.case.name,
            "seed": result.training.seed,
            **settings(study, result.training),
            "state": result.state,
            "reason": result.reason,
            **{f"{name}_error_percent": f"{result.errors[name]:.4f}" if result.errors else "" for name in ERRORS},
            "wall_seconds": "" if result.summary is None else result.summary["wall_seconds"],
        }
        for result in results
    ]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def format_report(study: Study, results: Sequence[Result], command: str, pictures: Sequence[Path | None]) -> str:
    """The report in Markdown; ``pictures`` has a file beside it, or None, for each figure."""
    file = study.file
    seeds = ", ".join(map(str, file.seeds))
    lines = [
        f"# {file.title}",
        "",
        *_circumstances(results, command),
        "",
        *([f"The paper: {file.paper}", ""] if file.paper else []),
        f"All else as in `{study.config}` with what `{study.path}` changes.",
        "",
        *_table(study, results),
        "",
        f"Top-1 validation error in per cent, mean ± sample standard deviation over the seeds ({seeds}): the median of "
        f"{last_epochs(study.trainings)} of each run, and the final one. Each run: [{CSV}]({CSV}).",
        *(["", COMPARED] if any(case.baseline for case in file.cases) else []),
    ]
    incomplete = [f"- {result.training}: {result.state}: {result.reason}" for result in results if result.reason]
    not_started = sum(result.state == "not started" for result in results)
    if not_started:
        incomplete.append(f"- not started: {not_started} of {len(results)} runs")
    lines += ["", "Not complete:", "", *incomplete] if incomplete else []
    for figure, picture in zip(file.figures, pictures, strict=True):
        nothing = f'No picture of "{figure.title}": there is nothing to draw yet.'
        lines += ["", nothing if picture is None else f"![{figure.title}]({picture.name})"]
    return "".join(f"{printable(line)}\n" for line in lines)


def _circumstances(results: Sequence[Result], command: str) -> list[str]:
    """Where, when and how the runs were trained."""
    summaries = [result.summary for result in results if result.summary is not None]
    here = processor()
    devices = {f"{summary['world_size']} × {summary['device']}" for summary in summaries}
    versions = {", ".join(f"{name} {number}" for name, number in summary["versions"].items()) for summary in summaries}
    dates = sorted({result.date for result in results if result.date is not None})
    minutes = sum(summary["wall_seconds"] for summary in summaries) / 60
    return [
        f"- hardware: {'; '.join(sorted(devices)) or 'none yet'}; {here['cpu']}, {here['cores']} cores",
        f"- versions: {'; or '.join(sorted(versions)) or 'none yet'}",
        f"- command: `{command}`",
        f"- date: {' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'none yet'}",
        f"- time: {minutes:.1f} minutes, the complete runs added up",
    ]


def _table(study: Study, results: Sequence[Result]) -> list[str]:
    """A row per case: what it sets and what follows, the errors of its runs, and the paper's."""
    by_name = {case.name: [run for run in results if run.training.case == case] for case in study.file.cases}
    rows = []
    for case in study.file.cases:
        runs = by_name[case.name]
        (median, final) = (_mean_and_std(*spread(runs, error)) for error in ("median", "final"))
        row = {"case": str(case)} | settings(study, runs[0].training)
        row |= {"median error, %": ", ".join(filter(None, [median, missing(runs)])), "final error, %": final}
        if any(case.baseline for case in study.file.cases):
            row["minus its baseline"] = "" if case.baseline is None else apart(runs, by_name[case.baseline])
        if any(case.paper for case in study.file.cases):
            row["the paper's, ImageNet"] = case.paper or ""
        rows.append(row)
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    # A bar would end a cell unless it is escaped.
    return [f"| {' | '.join(row)} |" for row in ([cell.replace("|", r"\|") for cell in row] for row in cells)]


def _mean_and_std(mean: float, std: float) -> str:
    """As the paper writes it."""
    return "" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")
