"""The figures of a study: errors against the batch size, and curves over the epochs."""

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands.figure import new_figure, save_figure, scale_y
from recipe.commands.study.file import Figure, Study
from recipe.commands.study.results import Result, last_epochs, missing, spread
from recipe.config import printable
from recipe.reporting import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_LOSS, VALIDATION_ERROR = "training loss, mean per epoch", "top-1 validation error, %"
SCALING = {"linear": "linear", "sqrt": "square-root", "none": "no"}
LEGEND_WIDTH = 32  # characters
PANELS_PER_ROW = 3

Cases = dict[str, list[Result]]


def draw_figures(study: Study, results: Sequence[Result], output: Path) -> list[Path | None]:
    """Draw the study's figures as PNG and SVG; return the PNG of each, or None if there is nothing to draw.

    Raises:
        OSError: a file cannot be written.
    """
    cases = {case.name: [result for result in results if result.run.case == case] for case in study.file.cases}
    written = []
    for asked in study.file.figures:
        draw = _error_by_batch_size if asked.draw == "error_by_batch_size" else _curves
        figure = draw(asked, cases, output)
        written.append(None if figure is None else save_figure(figure, output / asked.draw)[0])
    return written


def _error_by_batch_size(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 1: one line per scaling rule."""
    lines: dict[str, list[tuple[int, list[Result]]]] = defaultdict(list)
    for name in asked.cases:
        plan = cases[name][0].run.plan
        lines[plan.config.recipe.schedule.scaling_rule].append((plan.global_batch, cases[name]))
    figure, axes = new_figure()
    ticks = set()
    for rule, points in lines.items():
        points.sort(key=lambda point: point[0])
        batches = [batch for batch, _ in points]
        means, stds = zip(*(spread(results) for _, results in points), strict=True)
        without = "; ".join(f"{batch:,}: {missing(results)}" for batch, results in points if missing(results))
        # A mean of NaN is a gap: a line across it would suggest an error that has not been measured.
        axes.errorbar(batches, means, stds, marker="o", capsize=4, label=_legend(f"{SCALING[rule]} scaling", without))
        for batch, mean in zip(batches, means, strict=True):
            if not math.isnan(mean):
                ticks.add(batch)
                axes.annotate(f"{mean:.2f}", (batch, mean), (-6, 6), textcoords="offset points", ha="right")
    if not ticks:
        return None
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{batch:,}" for batch in sorted(ticks)])
    axes.minorticks_off()
    axes.margins(x=0.1)
    scale_y(axes)
    epochs = last_epochs(result.run for name in asked.cases for result in cases[name])
    axes.set(xlabel="global batch", ylabel=f"{VALIDATION_ERROR}: median of {epochs},\nmean ± std over the seeds")
    axes.set_title(printable(asked.title), pad=12)
    axes.legend(loc="upper left")
    return figure


def _curves(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 4, training loss and validation error of all cases over the epochs, or with a baseline its
    Figure 2, the training loss of each case in its own panel, next to the baseline's.
    """
    drawn = [cases[name] for name in asked.cases]
    panels = [(TRAINING_LOSS, _losses, drawn), (VALIDATION_ERROR, _errors, drawn)]
    if asked.baseline is not None:
        panels = [(TRAINING_LOSS, _losses, [cases[asked.baseline], results]) for results in drawn]
    columns = min(PANELS_PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, _ = new_figure(rows, columns, size=(5 * columns, 4.6 * rows))
    for spare in figure.axes[len(panels) :]:
        spare.remove()
    for axes, (label, values, of_cases) in zip(figure.axes, panels, strict=True):
        if asked.baseline is not None and axes is not figure.axes[0]:
            axes.sharey(figure.axes[0])
        _draw(axes, of_cases, values, output)
        axes.set_ylabel(label)
    figure.suptitle(f"{printable(asked.title)}: mean and range over the seeds")
    return figure if any(axes.collections for axes in figure.axes) else None


def _draw(
    axes: "Axes", cases: Sequence[list[Result]], values: Callable[[Result, Path], list[float]], output: Path
) -> None:
    """Draw for each case the mean over the seeds that reached an epoch, and a band from the lowest to the highest."""
    from matplotlib.ticker import MaxNLocator

    handles = []
    for number, results in enumerate(cases):
        of_seeds = zip_longest(*(values(result, output) for result in results), fillvalue=math.nan)
        finite = ([value for value in of_epoch if math.isfinite(value)] for of_epoch in of_seeds)
        epochs = {epoch: of_epoch for epoch, of_epoch in enumerate(finite, start=1) if of_epoch}
        means = [statistics.mean(of_epoch) for of_epoch in epochs.values()]
        # A line through a single point would be invisible.
        handles += axes.plot(list(epochs), means, color=f"C{number}", marker="o" if len(epochs) == 1 else None)
        if epochs:
            ranges = list(map(min, epochs.values())), list(map(max, epochs.values()))
            axes.fill_between(list(epochs), *ranges, color=f"C{number}", alpha=0.15)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    scale_y(axes)
    axes.legend(handles, [_legend(printable(str(results[0].run.case)), missing(results)) for results in cases])


def _losses(result: Result, output: Path) -> list[float]:
    """The mean training loss of each epoch, without the one in which the run diverged."""
    losses: dict[int, list[float]] = defaultdict(list)
    for event in read_events(output / result.run.folder):
        if event["event"] == "step":
            losses[event["epoch"]] += [] if event["loss"] is None else [event["loss"]]
    means = [statistics.mean(of_epoch) if of_epoch else math.nan for of_epoch in losses.values()]
    return means[:-1] if result.state == "diverged" else means


def _errors(result: Result, output: Path) -> list[float]:
    """The top-1 validation error after each epoch, in per cent."""
    events = read_events(output / result.run.folder)
    return [100 - event.get("ema_top1", event["top1"]) for event in events if event["event"] == "validation"]


def _legend(name: str, without: str) -> str:
    """A name with its missing runs, wrapped to the width of a panel."""
    return textwrap.fill(f"{name} ({without})", LEGEND_WIDTH) if without else name
