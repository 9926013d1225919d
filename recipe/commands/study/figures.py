"""The pictures of a study: errors against the batch size, and curves over the epochs."""

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

TRAINING_LOSS, VALIDATION_ERROR = "training loss, mean of an epoch", "top-1 validation error, %"
OVER_SEEDS = "mean and range over the seeds"
SCALING = {"linear": "linear", "sqrt": "square-root", "none": "no"}
LEGEND_WIDTH = 32  # characters
PANELS_IN_A_ROW = 3

Cases = dict[str, list[Result]]


def draw_figures(study: Study, results: Sequence[Result], output: Path) -> list[Path | None]:
    """Draw what the study asks for as PNG and SVG; return the PNG of each figure, None where there is nothing to draw.

    Raises:
        OSError: they cannot be written.
    """
    cases = {case.name: [run for run in results if run.training.case.name == case.name] for case in study.file.cases}
    written = []
    for asked in study.file.figures:
        draw = _error_by_batch_size if asked.draw == "error_by_batch_size" else _curves
        figure = draw(asked, cases, output)
        written.append(None if figure is None else save_figure(figure, output / asked.draw)[0])
    return written


def _error_by_batch_size(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 1: a line for each scaling rule."""
    lines: dict[str, list[tuple[int, list[Result]]]] = defaultdict(list)
    for name in asked.cases:
        plan = cases[name][0].training.plan
        lines[plan.config.recipe.schedule.scaling_rule].append((plan.global_batch, cases[name]))
    figure, axes = new_figure()
    ticks = set()
    for rule, points in lines.items():
        points.sort(key=lambda point: point[0])
        batches = [batch for batch, _ in points]
        means, stds = zip(*(spread(runs) for _, runs in points), strict=True)
        without = "; ".join(f"{batch:,}: {missing(runs)}" for batch, runs in points if missing(runs))
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
    of = last_epochs(run.training for name in asked.cases for run in cases[name])
    axes.set(xlabel="global batch", ylabel=f"{VALIDATION_ERROR}: median of {of},\nmean ± std over the seeds")
    axes.set_title(printable(asked.title), pad=12)
    axes.legend(loc="upper left")
    return figure


def _curves(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 4: training and validation of all cases over the epochs; with a baseline its Figure 2: the
    training loss of each case in a panel of its own, with the baseline's.
    """
    drawn = [cases[name] for name in asked.cases]
    panels = [(TRAINING_LOSS, _losses, drawn), (VALIDATION_ERROR, _errors, drawn)]
    if asked.baseline is not None:
        panels = [(TRAINING_LOSS, _losses, [cases[asked.baseline], runs]) for runs in drawn]
    columns = min(PANELS_IN_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, _ = new_figure(rows, columns, size=(5 * columns, 4.6 * rows))
    for spare in figure.axes[len(panels) :]:
        spare.remove()
    for axes, (label, values, of_cases) in zip(figure.axes, panels, strict=True):
        if asked.baseline is not None and axes is not figure.axes[0]:
            axes.sharey(figure.axes[0])
        _draw(axes, of_cases, values, output)
        axes.set_ylabel(label)
    figure.suptitle(f"{printable(asked.title)}: {OVER_SEEDS}")
    return figure if any(axes.collections for axes in figure.axes) else None


def _draw(
    axes: "Axes", cases: Sequence[list[Result]], values: Callable[[Result, Path], list[float]], output: Path
) -> None:
    """Draw for each case the mean over the seeds that got so far, and a band from the lowest to the highest."""
    from matplotlib.ticker import MaxNLocator

    handles = []
    for number, runs in enumerate(cases):
        of_seeds = zip_longest(*(values(run, output) for run in runs), fillvalue=math.nan)
        finite = ([value for value in of_epoch if math.isfinite(value)] for of_epoch in of_seeds)
        epochs = {epoch: of_epoch for epoch, of_epoch in enumerate(finite, start=1) if of_epoch}
        means = [statistics.mean(of_epoch) for of_epoch in epochs.values()]
        # A line through one point cannot be seen.
        handles += axes.plot(list(epochs), means, color=f"C{number}", marker="o" if len(epochs) == 1 else None)
        if epochs:
            ranges = list(map(min, epochs.values())), list(map(max, epochs.values()))
            axes.fill_between(list(epochs), *ranges, color=f"C{number}", alpha=0.15)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    scale_y(axes)
    axes.legend(handles, [_legend(printable(str(runs[0].training.case)), missing(runs)) for runs in cases])


def _losses(run: Result, output: Path) -> list[float]:
    """The mean training loss of each epoch, but for the one in which the run diverged."""
    losses: dict[int, list[float]] = defaultdict(list)
    for event in read_events(output / run.training.folder):
        if event["event"] == "step":
            losses[event["epoch"]] += [] if event["loss"] is None else [event["loss"]]
    means = [statistics.mean(of_epoch) if of_epoch else math.nan for of_epoch in losses.values()]
    return means[:-1] if run.state == "diverged" else means


def _errors(run: Result, output: Path) -> list[float]:
    """The top-1 validation error after each epoch in per cent."""
    events = read_events(output / run.training.folder)
    return [100 - event.get("ema_top1", event["top1"]) for event in events if event["event"] == "validation"]


def _legend(name: str, without: str) -> str:
    """A name with what is missing of it, on lines that fit a panel."""
    return textwrap.fill(f"{name} ({without})", LEGEND_WIDTH) if without else name
