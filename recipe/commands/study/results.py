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

from recipe.checkpoints import leaves
from recipe.commands.machine import processor
from recipe.commands.study.file import CSV, Study, Training
from recipe.commands.study.runs import LAUNCH_LOG, diverged_at, ending, read_plan
from recipe.config import printable
from recipe.plan import plan_json
from recipe.reporting import LAST_EPOCHS, SUMMARY, read_summary, steps_done

# What a reader looks for first, by shorter names than the plan's keys.
SETTINGS = {
    "global_batch": "train_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "model": "recipe.model.name",
    "zero_init_last": "recipe.model.zero_init_last",
    "data": "recipe.data.source",
    "train_images": "recipe.data.train_images",
    "validation_images": "recipe.data.validation_images",
    "image_size": "recipe.data.image_size",
    "crop": "recipe.data.crop",
    "batchnorm_statistics": "recipe.batchnorm.statistics",
    "momentum": "optimizer.params.momentum",
    "epochs": "recipe.schedule.epochs",
    "scaling_rule": "recipe.schedule.scaling_rule",
    "reference_lr": "recipe.schedule.reference_lr",
    "reference_batch_size": "recipe.schedule.reference_batch_size",
    "decay_epochs": "recipe.schedule.decay_epochs",
    "decay_factor": "recipe.schedule.decay_factor",
    "weight_decay_rule": "recipe.schedule.weight_decay_rule",
    "peak_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
}
# Keys that follow from these settings or those of ``_result``, or that change no image: they are no settings.
FOLLOWING = (
    "train_micro_batch_size_per_gpu",
    "recipe.max_micro_batch_size",
    "fp16.enabled",
    "bf16.enabled",
    "recipe.precision",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "recipe.schedule.warmup",
    "recipe.schedule.warmup_epochs",
    "zero_allow_untested_optimizer",
    "recipe.seed",
    "recipe.data.workers",
)

State = Literal["complete", "diverged", "failed", "interrupted", "not started"]


@dataclass(frozen=True)
class Result:
    """A run: ``settings`` are those of the plan with which it began, or else of the one that it will have, ``others``
    all other keys of that plan.

    ``errors`` are the "median", "final" and "best" top-1 validation error in per cent, empty unless it is complete;
    the median is that of the last five epochs (§5.1 of the paper), or of all where it has fewer. ``reason`` says why it
    is not complete.
    """

    training: Training
    settings: dict[str, Any]
    others: dict[str, Any]
    state: State
    reason: str
    errors: dict[str, float]
    summary: dict[str, Any] | None
    date: str | None

    @property
    def all_settings(self) -> dict[str, Any]:
        """``settings`` and ``others``."""
        return self.settings | self.others


def read_results(study: Study, output: Path, failures: Mapping[Training, str] | None = None) -> list[Result]:
    """The results of all runs, case by case; ``failures`` has the reason of each run that has just failed."""
    order = list(study.file.cases)
    trainings = sorted(study.trainings, key=lambda training: order.index(training.case))
    return [_result(training, output, (failures or {}).get(training)) for training in trainings]


def _result(training: Training, output: Path, failure: str | None) -> Result:
    folder, plan = output / training.folder, training.plan
    state, reason = _state(training, output, failure)
    begun, summary = read_plan(training, output), read_summary(folder)
    keys = dict(leaves(json.loads(plan_json(plan)) if begun is None else begun))
    if begun is None and plan.assumes_micro_batch:
        keys["gradient_accumulation_steps"] = "auto"
    settings = {name: keys.get(key) for name, key in SETTINGS.items()} | {
        "precision": plan.precision,
        "warmup": plan.schedule.warmup,
        "warmup_epochs": plan.config.recipe.schedule.warmup_epochs if plan.schedule.warmup_steps else 0,
        "steps": plan.total_steps,
    }
    others = {key: value for key, value in keys.items() if key not in SETTINGS.values() and key not in FOLLOWING}
    errors, day = {}, None
    if summary is not None:
        errors = {"median": float(summary["median_error_last_epochs"])}
        errors |= {name: 100 - float(summary[f"{name}_top1"]) for name in ("final", "best")}
        day = date.fromtimestamp((folder / SUMMARY).stat().st_mtime).isoformat()
    return Result(training, settings, others, state, reason, errors, summary, day)


def _state(training: Training, output: Path, failure: str | None) -> tuple[State, str]:
    """What has become of a run, and why it is not complete."""
    folder = output / training.folder
    ended, done = ending(training, output), steps_done(folder)
    if ended is not None:
        return ended, "" if ended == "complete" else f"the loss of step {diverged_at(folder)} is not finite"
    if failure is not None:
        return "failed", failure
    if not done and not (folder / LAUNCH_LOG).exists():
        return "not started", ""
    return "interrupted", f"{done:,} of {training.plan.total_steps:,} steps are done"


def spread(runs: Iterable[Result], error: str = "median") -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1) over the complete runs; NaN for want of runs."""
    errors = [run.errors[error] for run in runs if run.errors]
    mean = statistics.mean(errors) if errors else math.nan
    return mean, statistics.stdev(errors) if len(errors) > 1 else math.nan


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


def differing(results: Sequence[Result]) -> list[str]:
    """The settings in which the runs differ; one that a run lacks is one of these."""
    found = [result.all_settings for result in results]
    names = dict.fromkeys(name for settings in found for name in settings)
    return [name for name in names if any(settings.get(name) != found[0].get(name) for settings in found)]


def write_csv(results: Sequence[Result], file: Path) -> None:
    """Write one line per run."""
    names = list(dict.fromkeys([*results[0].settings, *differing(results)]))
    rows = [
        {
            "case": result.training.case.name,
            "seed": result.training.seed,
            **{name: result.all_settings.get(name) for name in names},
            "state": result.state,
            "reason": result.reason,
            **{
                f"{name}_error_percent": f"{result.errors[name]:.4f}" if result.errors else ""
                for name in ("median", "final", "best")
            },
            "wall_seconds": "" if result.summary is None else result.summary["wall_seconds"],
        }
        for result in results
    ]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def format_report(study: Study, results: Sequence[Result], command: str, pictures: Sequence[Path | None]) -> str:
    """The report in Markdown; ``pictures`` has a file beside it for each figure, None where nothing is to be drawn."""
    file = study.file
    seeds = ", ".join(map(str, file.seeds))
    lines = [
        study.heading,
        "",
        *_circumstances(results, command),
        "",
        *([f"The paper: {file.paper}", ""] if file.paper else []),
        *_table(study, results),
        "",
        f"Top-1 validation error in per cent, mean ± sample standard deviation over the seeds ({seeds}): the median of "
        f"{last_epochs(study.trainings)} of each run, and the final one. Each run: [{CSV}]({CSV}).",
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
    """A row per case with the settings that differ; the others are on a line before the table."""
    names = differing(results)
    common = [f"{_words(name)} {_shown(value)}" for name, value in results[0].settings.items() if name not in names]
    compares = any(case.paper for case in study.file.cases)
    head = ["case", *map(_words, names), "median error, %", "final error, %"]
    head += ["the paper's, ImageNet"] if compares else []
    lines = [
        f"All cases: {', '.join(common)}; all else as in `{study.config}` with what `{study.path}` changes.",
        "",
        _row(head),
        f"|{'---|' * len(head)}",
    ]
    for case in study.file.cases:
        runs = [result for result in results if result.training.case == case]
        cells = [str(case)]
        cells += [" or ".join(dict.fromkeys(_shown(run.all_settings.get(name)) for run in runs)) for name in names]
        median, final = (_mean_and_std(*spread(runs, error)) for error in ("median", "final"))
        cells += [", ".join(filter(None, [median, missing(runs)])), final]
        lines.append(_row(cells + ([case.paper or ""] if compares else [])))
    return lines


def _row(cells: Sequence[str]) -> str:
    """A row of a table; a bar would end a cell unless it is escaped."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _mean_and_std(mean: float, std: float) -> str:
    """As the paper writes it."""
    return "" if math.isnan(mean) else f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")


def _words(name: str) -> str:
    """The name of a setting as people say it; a key of the config stays as it is written."""
    if name == "zero_init_last":
        return "γ = 0 at the blocks' ends"
    return name if "." in name else name.replace("_", " ")


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
