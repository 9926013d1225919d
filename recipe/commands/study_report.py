"""The report of a study as Markdown: where it ran, what the paper found, the table and the pictures."""

from collections.abc import Sequence
from pathlib import Path

from recipe.commands.machine import processor
from recipe.commands.study_file import Study
from recipe.commands.study_results import Result, settings, spread
from recipe.commands.study_runs import Launch
from recipe.strict_json import printable
from recipe.summary import LAST_EPOCHS


def format_report(
    study: Study, results: Sequence[Result], launches: Sequence[Launch], command: str, pictures: Sequence[Path]
) -> str:
    """The report; ``pictures`` lie beside it."""
    file = study.file
    lines = [
        f"# {file.title}",
        "",
        *_circumstances(results, launches, command),
        "",
        f"The paper: {file.paper}",
        "",
        *_table(study, results),
        "",
        f"Top-1 validation error in per cent: the median of the last {LAST_EPOCHS} epochs of each run, mean ± sample "
        f"standard deviation over the seeds ({', '.join(map(str, file.seeds))}). Each run: [results.csv](results.csv).",
    ]
    for figure, picture in zip(file.figures, pictures, strict=True):
        lines += ["", f"![{figure.title}]({picture.name})"]
    return "".join(f"{printable(line)}\n" for line in lines)


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
        cpu_seconds = sum(launch.cpu_seconds for launch in launches)
        lines.append(
            f"- time: {wall_seconds(launches) / 60:.1f} minutes with all launches, while the load average was "
            f"{min(loads)} to {max(loads)}; they used {cpu_seconds / 60:.1f} minutes of a core"
        )
    return lines


def wall_seconds(launches: Sequence[Launch]) -> float:
    """The time in which at least one launch was under way."""
    total, end = 0.0, 0.0
    for launch in sorted(launches, key=lambda launch: launch.started):
        launch_end = launch.started + launch.wall_seconds
        total += max(0.0, launch_end - max(end, launch.started))
        end = max(end, launch_end)
    return total


def _table(study: Study, results: Sequence[Result]) -> list[str]:
    """A row a case; of the settings those that differ, the others on a line before it."""
    of_cases = [[result for result in results if result.training.case == case] for case in study.file.cases]
    chosen = [settings(runs[0].training) for runs in of_cases]
    differing = [name for name in chosen[0] if len({str(values[name]) for values in chosen}) > 1]
    common = [f"{_words(name)} {_shown(value)}" for name, value in chosen[0].items() if name not in differing]
    plan = study.trainings[0].plan
    recipe, n = plan.config.recipe, plan.config.recipe.batchnorm.statistics
    compares = any(case.paper for case in study.file.cases)
    head = ["case", *map(_words, differing), "error, %", *(["the paper's, ImageNet"] if compares else [])]
    lines = [
        f"All cases: {recipe.model.name} on {recipe.data.source} at {recipe.data.image_size} px ({plan.train_images:,} "
        f"training images, {plan.validation_images:,} for validation), crop {recipe.data.crop}, {plan.precision}, "
        f"batch norm over {f'{n} images' if isinstance(n, int) else f'the {n} micro-batch'}, rates scaled from a batch "
        f"of {recipe.schedule.reference_batch_size:,} and decayed at epochs "
        f"{', '.join(f'{epoch:g}' for epoch in recipe.schedule.decay_epochs) or 'none'}; {', '.join(common)}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for case, values, runs in zip(study.file.cases, chosen, of_cases, strict=True):
        cells = [case.label, *(_shown(values[name]) for name in differing), str(spread(runs))]
        lines.append(f"| {' | '.join(cells + ([case.paper or ''] if compares else []))} |")
    return lines


def _words(name: str) -> str:
    return {"zero_init_last": "γ = 0 at the blocks' ends"}.get(name, name.replace("_", " "))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
