"""The pictures of a study: errors against the batch size, and curves over the epochs."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands.figure import COLOURS, new_figure, save_figure
from recipe.commands.study_file import Case, Figure, Study
from recipe.commands.study_results import Result, spread
from recipe.metrics import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_LOSS, VALIDATION_ERROR = "training loss, mean of an epoch", "top-1 validation error, %"
OVER_SEEDS = "mean and range over the seeds"

Curve = list[float]
"""A value an epoch, from the first on."""


def draw_figures(study: Study, results: Sequence[Result], output: Path) -> list[Path]:
    """Draw what the study asks for as PNG and SVG; return the PNGs.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: they cannot be written.
    """
    drawing: dict[str, Callable[[Study, Figure, Sequence[Result], Path], Any]] = {
        "error_by_batch_size": _error_by_batch_size,
        "beside_baseline": _beside_baseline,
        "curves": _curves,
    }
    pictures = []
    for asked in study.file.figures:
        figure = drawing[asked.draw](study, asked, results, output)
        pictures.append(save_figure(figure, output / asked.draw)[0])
    return pictures


def _error_by_batch_size(study: Study, asked: Figure, results: Sequence[Result], output: Path) -> Any:
    """The paper's Figure 1; a line for each scaling rule."""
    figure, axes = new_figure()
    lines: dict[str, dict[int, list[Result]]] = defaultdict(dict)
    for name in asked.cases:
        runs = [result for result in results if result.training.case.name == name]
        plan = runs[0].training.plan
        lines[plan.config.recipe.schedule.scaling_rule][plan.global_batch] = runs
    batches = sorted({batch for points in lines.values() for batch in points})
    chance = 100 - 100 / study.trainings[0].plan.config.recipe.model.num_classes
    for rule, points in lines.items():
        spreads = {batch: spread(runs) for batch, runs in sorted(points.items())}
        found = [(batch, one.mean, one.std or 0.0) for batch, one in spreads.items() if one.mean is not None]
        if found:
            x, y, stds = zip(*found, strict=True)
            axes.errorbar(x, y, yerr=stds, marker="o", capsize=4, label=f"{rule} scaling")
            for batch, mean, _ in found:
                axes.annotate(f"{mean:.2f}", (batch, mean), (-6, 6), textcoords="offset points", fontsize=9, ha="right")
        diverged = [batch for batch, one in spreads.items() if one.diverged]
        if diverged:
            axes.plot(
                diverged, [chance] * len(diverged), "x", color="black", label=f"{rule} scaling: runs that diverged"
            )
    axes.set_xscale("log", base=2)
    axes.margins(x=0.08)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    means = [one.mean for points in lines.values() for one in map(spread, points.values()) if one.mean is not None]
    if means and 0 < 10 * min(means) < max(means):
        axes.set_yscale("log")
        _plain_numbers(axes)
    axes.set(xlabel="global batch", ylabel=f"{VALIDATION_ERROR}, mean ± std", title=asked.title)
    if axes.has_data():
        axes.legend(frameon=False, loc="upper left")
    return figure


def _beside_baseline(study: Study, asked: Figure, results: Sequence[Result], output: Path) -> Any:
    """The paper's Figure 2: the training loss of each case in a panel of its own, with the baseline's."""
    figure, panels = new_figure(columns=len(asked.cases), size=(4.2 * len(asked.cases), 4.4))
    panels = [panels] if len(asked.cases) == 1 else list(panels)
    cases = {case.name: case for case in study.file.cases}
    assert asked.baseline is not None, "the study's file has been checked"
    baseline = _loss_curves(asked.baseline, results, output)
    for panel in panels[1:]:
        panel.sharey(panels[0])
    for panel, name in zip(panels, asked.cases, strict=True):
        _draw_mean(panel, cases[asked.baseline], baseline, COLOURS[0])
        _draw_mean(panel, cases[name], _loss_curves(name, results, output), COLOURS[1])
        _over_epochs(panel)
    panels[0].set_ylabel(TRAINING_LOSS)
    figure.suptitle(f"{asked.title}: {OVER_SEEDS}")
    return figure


def _curves(study: Study, asked: Figure, results: Sequence[Result], output: Path) -> Any:
    """The paper's Figure 4: training and validation of all cases over the epochs."""
    figure, (left, right) = new_figure(columns=2, size=(11, 5))
    cases = {case.name: case for case in study.file.cases}
    for number, name in enumerate(asked.cases):
        colour = COLOURS[number % len(COLOURS)]
        _draw_mean(left, cases[name], _loss_curves(name, results, output), colour)
        _draw_mean(right, cases[name], _error_curves(name, results, output), colour)
    _over_epochs(left)
    _over_epochs(right)
    left.set_ylabel(TRAINING_LOSS)
    right.set_ylabel(VALIDATION_ERROR)
    figure.suptitle(f"{asked.title}: {OVER_SEEDS}")
    return figure


def _draw_mean(axes: "Axes", case: Case, curves: Sequence[Curve], colour: str) -> None:
    """The mean over seeds, of those that got so far, and a band from the lowest to the highest."""
    if not curves:
        return
    epochs = range(1, max(map(len, curves)) + 1)
    values = [[curve[epoch - 1] for curve in curves if len(curve) >= epoch] for epoch in epochs]
    axes.plot(epochs, [statistics.mean(at) for at in values], color=colour, linewidth=1.6, label=case.label)
    axes.fill_between(epochs, [min(at) for at in values], [max(at) for at in values], color=colour, alpha=0.15)


def _over_epochs(axes: "Axes") -> None:
    """Whole epochs to the right, a logarithmic scale with plain numbers upwards, and a legend."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.set_yscale("log")
        _plain_numbers(axes)
        axes.legend(frameon=False)


def _plain_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _loss_curves(name: str, results: Sequence[Result], output: Path) -> list[Curve]:
    """The mean training loss of each epoch, a curve a run; it ends with the epoch in which a run diverged."""
    curves = []
    for events in _events(name, results, output):
        losses: Mapping[int, list[float]] = defaultdict(list)
        for event in events:
            if event["event"] == "step":
                losses[event["epoch"]].append(math.nan if event["loss"] is None else event["loss"])
        means = [statistics.mean(epoch) for epoch in losses.values()]
        curves.append([mean for mean in means if math.isfinite(mean)])
    return curves


def _error_curves(name: str, results: Sequence[Result], output: Path) -> list[Curve]:
    """The top-1 validation error after each epoch in per cent, a curve a run."""
    return [
        [100 - event["top1"] for event in events if event["event"] == "validation"]
        for events in _events(name, results, output)
    ]


def _events(name: str, results: Sequence[Result], output: Path) -> list[list[dict[str, Any]]]:
    """The metrics of the case's runs that are over."""
    of_case = [result for result in results if result.training.case.name == name and result.state != "open"]
    return [read_events(output / result.training.folder) for result in of_case]
