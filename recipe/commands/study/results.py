"""The results of a study, per run and per case, as CSV and as a report in Markdown."""

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from recipe.commands.machine import processor
from recipe.commands.study.file import CSV, LAUNCH_LOG, Run, Study
from recipe.config import printable
from recipe.plan import plan_json
from recipe.reporting import LAST_EPOCHS, SUMMARY, has_diverged, read_events, read_summary, steps_done

ERRORS = ("median", "final", "best")
CONFIDENCE = 0.95
COMPARED = (
    "Minus its baseline: the differences between the median errors of the same seed, their mean ± half of its "
    f"{CONFIDENCE:.0%} confidence interval (Student's t). Bold if the interval does not contain 0: a difference "
    "that the seeds' scatter does not explain."
)


@dataclass(frozen=True)
class Result:
    """The outcome of a run; ``reason`` says why it is not complete.

    ``errors`` has the top-1 validation errors in per cent by the names of ``ERRORS``, and is empty unless the run is
    complete. The median is over the last five epochs (§5.1 of the paper), or over all if there are fewer.
    """

    run: Run
    state: Literal["complete", "diverged", "failed", "interrupted", "not started"]
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    date: str | None = None


def read_results(study: Study, output: Path, failures: Mapping[Run, str]) -> list[Result]:
    """The results of all runs, case by case; ``failures`` has the reason for each run that has just failed."""
    runs = sorted(study.runs, key=lambda run: study.file.cases.index(run.case))
    return [read_result(run, output, failures.get(run)) for run in runs]


def read_result(run: Run, output: Path, failure: str | None = None) -> Result:
    """The result that a run has left in its folder below ``output``."""
    folder = output / run.folder
    summary = read_summary(folder)
    if summary is not None:
        errors = (summary["median_error_last_epochs"], 100 - summary["final_top1"], 100 - summary["best_top1"])
        day = date.fromtimestamp((folder / SUMMARY).stat().st_mtime).isoformat()
        return Result(run, "complete", "", dict(zip(ERRORS, errors, strict=True)), summary, day)
    steps = [event for event in read_events(folder) if event["event"] == "step"]
    if steps and has_diverged(steps[-1]["loss"], steps[-1]["skipped"], steps[-1]["loss_scale"]):
        return Result(run, "diverged", f"the loss of step {steps[-1]['step']} is not finite")
    if failure is not None:
        return Result(run, "failed", failure)
    done = steps_done(folder)
    if not done and not (folder / LAUNCH_LOG).exists():
        return Result(run, "not started")
    return Result(run, "interrupted", f"{done:,} of {run.plan.total_steps:,} steps are done")


def spread(results: Iterable[Result], error: str = "median") -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1) over the complete runs; NaN if there are too few."""
    errors = [result.errors[error] for result in results if result.errors]
    mean = statistics.mean(errors) if errors else math.nan
    return mean, statistics.stdev(errors) if len(errors) > 1 else math.nan


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two differences, and half the width of its confidence interval by Student's t."""
    from scipy.stats import t  # it takes a second to import

    share = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return statistics.mean(differences), share * statistics.stdev(differences) / math.sqrt(len(differences))


def difference_text(results: Iterable[Result], baseline: Iterable[Result]) -> str:
    """The table's cell for the median error minus the baseline's, paired by seed."""
    of_baseline = {result.run.seed: result.errors["median"] for result in baseline if result.errors}
    pairs = [(result.errors["median"], of_baseline.get(result.run.seed)) for result in results if result.errors]
    differences = [error - other for error, other in pairs if other is not None]
    if len(differences) < 2:
        return "".join(f"{difference:+.2f}" for difference in differences)
    mean, half = interval(differences)
    text = f"{mean:+.2f} ± {half:.2f}"
    return f"**{text}**" if abs(mean) > half else text


def missing(results: Sequence[Result]) -> str:
    """How many runs of a case are not complete, by state, as "1 of 3 diverged"; "" if all are complete."""
    counts = Counter(result.state for result in results if result.state != "complete")
    runs = len(results)
    return ", ".join(state if count == runs else f"{count} of {runs} {state}" for state, count in counts.items())


def last_epochs(runs: Iterable[Run]) -> str:
    """The epochs over which the median error is taken, in words."""
    counts = sorted({min(LAST_EPOCHS, run.plan.epochs) for run in runs})
    if counts == [1]:
        return "the last epoch"
    return f"the last {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} epochs"


def settings(study: Study, run: Run) -> dict[str, str]:
    """The values, in a run's plan, of all keys that any case sets, and the resulting peak rate and steps."""
    found = {}
    for key in dict.fromkeys(key for case in study.file.cases for key in case.set):
        value: Any = json.loads(plan_json(run.plan))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found[key] = value if isinstance(value, str) else "–" if value is None else json.dumps(value)
    return found | {"peak rate": f"{run.plan.schedule.peak_rate:.6g}", "steps": f"{run.plan.total_steps}"}


def write_csv(study: Study, results: Sequence[Result], file: Path) -> None:
    """Write one line per run."""
    rows = [
        {
            "case": result.run.case.name,
            "seed": result.run.seed,
            **settings(study, result.run),
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
    """The report in Markdown; ``pictures`` has a file next to it, or None, for each figure."""
    file = study.file
    seeds = ", ".join(map(str, file.seeds))
    lines = [
        f"# {file.title}",
        "",
        *_circumstances(results, command),
        "",
        *([f"The paper: {file.paper}", ""] if file.paper else []),
        f"Everything else is as in `{study.config}` with the changes of `{study.path}`.",
        "",
        *_table(study, results),
        "",
        f"Top-1 validation error in per cent, mean ± sample standard deviation over the seeds ({seeds}): the median of "
        f"{last_epochs(study.runs)} of each run, and the final one. Each run: [{CSV}]({CSV}).",
        *(["", COMPARED] if any(case.baseline for case in file.cases) else []),
    ]
    incomplete = [f"- {result.run}: {result.state}: {result.reason}" for result in results if result.reason]
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
        f"- time: {minutes:.1f} minutes, the sum over the complete runs",
    ]


def _table(study: Study, results: Sequence[Result]) -> list[str]:
    """One row per case: its settings, the errors of its runs, and the paper's."""
    by_name = {case.name: [result for result in results if result.run.case == case] for case in study.file.cases}
    rows = []
    for case in study.file.cases:
        own = by_name[case.name]
        (median, final) = (_mean_and_std(*spread(own, error)) for error in ("median", "final"))
        row = {"case": str(case)} | settings(study, own[0].run)
        row |= {"median error, %": ", ".join(filter(None, [median, missing(own)])), "final error, %": final}
        if any(case.baseline for case in study.file.cases):
            row["minus its baseline"] = "" if case.baseline is None else difference_text(own, by_name[case.baseline])
        if any(case.paper for case in study.file.cases):
            row["the paper's, ImageNet"] = case.paper or ""
        rows.append(row)
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    # An unescaped bar would end a cell.
    return [f"| {' | '.join(row)} |" for row in ([cell.replace("|", r"\|") for cell in row] for row in cells)]


def _mean_and_std(mean: float, std: float) -> str:
    return "" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")
