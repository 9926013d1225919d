"""The report of a study as Markdown: where it ran, what the paper found, the table and the pictures."""

from collections.abc import Sequence
from pathlib import Path

from recipe.commands.machine import processor
from recipe.commands.study.file import Study
from recipe.commands.study.results import Result, all_settings, differing, last_epochs, missing, settings, spread
from recipe.commands.study.runs import Launch
from recipe.config import printable


def format_report(
    study: Study, results: Sequence[Result], launches: Sequence[Launch], command: str, pictures: Sequence[Path | None]
) -> str:
    """The report; ``pictures`` lie beside it, one for each figure, or None where there is nothing to draw."""
    file, names = study.file, {case.name for case in study.file.cases}
    lines = [
        study.heading,
        "",
        *_circumstances(results, [one for one in launches if one.case in names], command),
        "",
        *([f"The paper: {file.paper}", ""] if file.paper else []),
        *_table(study, results),
        "",
        f"Top-1 validation error in per cent, mean ± sample standard deviation over the seeds "
        f"({', '.join(map(str, file.seeds))}): the median of {last_epochs(study.trainings)} of each run, and the final "
        "one. Each run: [results.csv](results.csv).",
        *_incomplete(results),
    ]
    for figure, picture in zip(file.figures, pictures, strict=True):
        nothing = f'No picture of "{figure.title}": there is nothing to draw yet.'
        lines += ["", nothing if picture is None else f"![{figure.title}]({picture.name})"]
    return "".join(f"{printable(line)}\n" for line in lines)


def _incomplete(results: Sequence[Result]) -> list[str]:
    """The runs that have no error to report, each with its reason."""
    lines = [f"- {result.training}: {result.state}: {result.reason}" for result in results if result.reason]
    not_started = sum(result.state == "not started" for result in results)
    if not_started:
        lines.append(f"- not started: {not_started} of {len(results)} runs")
    return ["", "Not complete:", "", *lines] if lines else []


def _circumstances(results: Sequence[Result], launches: Sequence[Launch], command: str) -> list[str]:
    summaries = [result.summary for result in results if result.summary is not None]
    here = processor()
    devices = {f"{summary['world_size']} × {summary['device']}" for summary in summaries}
    versions = {", ".join(f"{name} {number}" for name, number in summary["versions"].items()) for summary in summaries}
    dates = sorted({launch.date for launch in launches})
    lines = [
        f"- hardware: {'; '.join(sorted(devices)) or 'none yet'}; {here['cpu']}, {here['cores']} cores",
        f"- versions: {'; or '.join(sorted(versions)) or 'none yet'}",
        f"- command: `{command}`",
        f"- date: {' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'none yet'}",
    ]
    if launches:
        loads = [launch.load_before for launch in launches]
        known = [launch.cpu_seconds for launch in launches if launch.cpu_seconds is not None]
        unknown = len(launches) - len(known)
        lines.append(
            f"- time: {wall_seconds(launches) / 60:.1f} minutes with all launches, while the load average was "
            f"{min(loads)} to {max(loads)}; they used {sum(known) / 60:.1f} minutes of a core"
            + (f", without {unknown} of {len(launches)} launches, which were interrupted" if unknown else "")
        )
    return lines


def wall_seconds(launches: Sequence[Launch]) -> float:
    """The time in which at least one launch was under way, of those whose end was seen."""
    total, end = 0.0, 0.0
    for launch in sorted(launches, key=lambda launch: launch.started):
        launch_end = launch.started + (launch.wall_seconds or 0.0)
        total += max(0.0, launch_end - max(end, launch.started))
        end = max(end, launch_end)
    return total


def _table(study: Study, results: Sequence[Result]) -> list[str]:
    """A row a case; of the settings those that differ, the others on a line before it."""
    of_cases = [[result for result in results if result.training.case == case] for case in study.file.cases]
    names = differing(results)
    common = [f"{_words(name)} {_shown(value)}" for name, value in settings(results[0]).items() if name not in names]
    compares = any(case.paper for case in study.file.cases)
    head = ["case", *map(_words, names), "median error, %", "final error, %"]
    head += ["the paper's, ImageNet"] if compares else []
    lines = [
        f"All cases: {', '.join(common)}; all else as in `{study.config}` with what `{study.path}` changes.",
        "",
        _row(head),
        f"|{'---|' * len(head)}",
    ]
    for case, runs in zip(study.file.cases, of_cases, strict=True):
        values = [all_settings(run) for run in runs]
        median = spread(run.median_error for run in runs)
        cells = [str(case), *(" or ".join(dict.fromkeys(_shown(of.get(name)) for of in values)) for name in names)]
        cells += [", ".join(filter(None, [str(median), missing(runs)])), str(spread(run.final_error for run in runs))]
        lines.append(_row(cells + ([case.paper or ""] if compares else [])))
    return lines


def _row(cells: Sequence[str]) -> str:
    """A row of a table; GitHub takes a bar for the end of a cell unless it is escaped."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


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
