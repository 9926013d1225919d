"""The pictures of a study: errors against the batch size, and curves over the epochs."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands.figure import COLOURS, add_legend, drawable, new_figure, save_figure, set_log_scale
from recipe.commands.study.file import Figure, Study
from recipe.commands.study.results import Result, last_epochs, missing, spread
from recipe.plan import wrap
from recipe.reporting import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_LOSS, VALIDATION_ERROR = "training loss, mean of an epoch", "top-1 validation error, %"
OVER_SEEDS = "mean and range over the seeds"
SCALING = {"linear": "linear", "sqrt": "square-root", "none": "no"}
LEGEND_WIDTH = 32  # characters
# A loss on its way to infinity would press all others together: the frame ends at this multiple of their highest.
FRAME = 2.0

Cases = dict[str, list[Result]]


@dataclass(frozen=True)
class Curve:
    """A run's value for each epoch from the first on, NaN where there is none; ``diverged_in`` is the epoch, counted
    from 1, in which it diverged.
    """

    values: list[float]
    diverged_in: int | None = None


@dataclass(frozen=True)
class Line:
    """A case in a picture: the curves of its runs, and its label in the legend."""

    label: str
    curves: list[Curve]


def draw_figures(study: Study, results: Sequence[Result], output: Path) -> list[Path | None]:
    """Draw what the study asks for as PNG and SVG; return the PNG of each figure, None where there is nothing to draw.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: they cannot be written.
    """
    drawing: dict[str, Callable[[Figure, Cases, Path], Any]] = {
        "error_by_batch_size": _error_by_batch_size,
        "beside_baseline": _beside_baseline,
        "curves": _curves,
    }
    cases = {case.name: [run for run in results if run.training.case.name == case.name] for case in study.file.cases}
    figures = [drawing[asked.draw](asked, cases, output) for asked in study.file.figures]
    return [
        None if figure is None else save_figure(figure, output / asked.draw)[0]
        for asked, figure in zip(study.file.figures, figures, strict=True)
    ]


def _error_by_batch_size(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 1; a line for each scaling rule."""
    lines: dict[str, dict[int, list[Result]]] = defaultdict(dict)
    for name in asked.cases:
        plan = cases[name][0].training.plan
        lines[plan.config.recipe.schedule.scaling_rule][plan.global_batch] = cases[name]
    figure, axes = new_figure()
    drawn: list[float] = []
    for colour, (rule, points) in zip(COLOURS, lines.items(), strict=False):
        batches = sorted(points)
        means, stds = zip(*(spread(points[batch]) for batch in batches), strict=True)
        without = "; ".join(f"{batch:,}: {missing(points[batch])}" for batch in batches if missing(points[batch]))
        label = _legend(f"{SCALING[rule]} scaling", without)
        # A mean of NaN is a gap: a line across it would suggest an error that has not been measured.
        axes.errorbar(batches, means, yerr=stds, marker="o", capsize=4, color=colour, label=label)
        for batch, mean in zip(batches, means, strict=True):
            if not math.isnan(mean):
                beside = {"xytext": (-6, 6), "textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{mean:.2f}", (batch, mean), fontsize=9, **beside)
                drawn.append(mean)
            if any(run.state == "diverged" for run in points[batch]):
                _mark_above(axes, batch, colour)
    if not drawn:
        return None
    ticks = sorted({batch for points in lines.values() for batch in points})
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)  # half a doubling of room
    axes.set_xticks(ticks, [f"{batch:,}" for batch in ticks])
    axes.minorticks_off()
    if 0 < 10 * min(drawn) < max(drawn):
        set_log_scale(axes)
    of = last_epochs(run.training for name in asked.cases for run in cases[name])
    axes.set(xlabel="global batch", ylabel=f"{VALIDATION_ERROR}: median of {of},\nmean ± std over the seeds")
    axes.set_title(drawable(asked.title), pad=12, parse_math=False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _beside_baseline(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 2: the training loss of each case in a panel of its own, with the baseline's."""
    assert asked.baseline is not None, "the study's file has been checked"
    baseline, *others = lines = [_losses(cases[name], output) for name in (asked.baseline, *asked.cases)]
    figure, axes = new_figure(columns=len(others), size=(4.2 * len(others), 4.4))
    panels = [axes] if len(others) == 1 else list(axes)
    for panel in panels[1:]:
        panel.sharey(panels[0])
    drawn = [_draw(panel, [baseline, line], _frame(lines)) for panel, line in zip(panels, others, strict=True)]
    panels[0].set_ylabel(TRAINING_LOSS)
    figure.suptitle(f"{drawable(asked.title)}: {OVER_SEEDS}", parse_math=False)
    return figure if any(drawn) else None


def _curves(asked: Figure, cases: Cases, output: Path) -> Any:
    """The paper's Figure 4: training and validation of all cases over the epochs."""
    figure, (left, right) = new_figure(columns=2, size=(11, 5))
    losses = [_losses(cases[name], output) for name in asked.cases]
    errors = [_errors(cases[name], output) for name in asked.cases]
    drawn = [_draw(left, losses, _frame(losses)), _draw(right, errors)]
    left.set_ylabel(TRAINING_LOSS)
    right.set_ylabel(VALIDATION_ERROR)
    figure.suptitle(f"{drawable(asked.title)}: {OVER_SEEDS}", parse_math=False)
    return figure if any(drawn) else None


def _draw(axes: "Axes", lines: Sequence[Line], highest: float | None = None) -> bool:
    """Draw the mean over the seeds that got so far, with a band from the lowest to the highest, and a cross above the
    frame, which ends at ``highest``, where a run diverged; return whether there was anything to draw.
    """
    from matplotlib.ticker import MaxNLocator

    has_drawn, handles = False, []
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        known: dict[int, list[float]] = defaultdict(list)
        for curve in line.curves:
            for epoch, value in enumerate(curve.values, start=1):
                known[epoch] += [value] if math.isfinite(value) else []
            if curve.diverged_in is not None:
                _mark_above(axes, curve.diverged_in, colour)
        epochs = sorted(epoch for epoch in known if known[epoch])
        means = [statistics.mean(known[epoch]) for epoch in epochs]
        marker = "o" if len(epochs) == 1 else None  # a line through one point cannot be seen
        handles += axes.plot(epochs, means, color=colour, linewidth=1.6, marker=marker)
        ranges = [min(known[epoch]) for epoch in epochs], [max(known[epoch]) for epoch in epochs]
        axes.fill_between(epochs, *ranges, color=colour, alpha=0.15)
        has_drawn = has_drawn or bool(epochs)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if has_drawn:
        axes.set_yscale("log")
        if highest is not None:
            axes.set_ylim(top=highest)
        set_log_scale(axes)
    add_legend(axes, handles, [line.label for line in lines])
    return has_drawn


def _mark_above(axes: "Axes", x: float, colour: str) -> None:
    """A cross on the upper edge of the frame: what would be drawn here lies beyond it."""
    axes.plot([x], [1], "x", color=colour, markersize=8, transform=axes.get_xaxis_transform(), clip_on=False)


def _frame(lines: Sequence[Line]) -> float | None:
    """Where the frame ends that the runs that have not diverged make; None if that need not be said."""
    curves = [curve for line in lines for curve in line.curves]
    finite = [v for curve in curves if curve.diverged_in is None for v in curve.values if math.isfinite(v)]
    above = [v for curve in curves if curve.diverged_in is not None for v in curve.values]
    return FRAME * max(finite) if finite and max(above, default=0.0) > FRAME * max(finite) else None


def _losses(runs: Sequence[Result], output: Path) -> Line:
    """The mean training loss of each epoch, without the updates that fp16's loss scale skipped."""
    curves = []
    for run in runs:
        steps = [event for event in read_events(output / run.training.folder) if event["event"] == "step"]
        losses: dict[int, list[float]] = {event["epoch"]: [] for event in steps}
        for event in steps:
            losses[event["epoch"]] += [] if event["loss"] is None else [event["loss"]]
        means = [statistics.mean(epoch) if epoch else math.nan for epoch in losses.values()]
        diverged_in = _diverged_in(run, steps)
        curves.append(Curve(means if diverged_in is None else means[: diverged_in - 1], diverged_in))
    return Line(_label(runs), curves)


def _errors(runs: Sequence[Result], output: Path) -> Line:
    """The top-1 validation error after each epoch in per cent."""
    curves = []
    for run in runs:
        events = read_events(output / run.training.folder)
        errors = [100 - event["top1"] for event in events if event["event"] == "validation"]
        curves.append(Curve(errors, _diverged_in(run, events)))
    return Line(_label(runs), curves)


def _diverged_in(run: Result, events: Sequence[dict[str, Any]]) -> int | None:
    """The epoch, counted from 1, in which a run diverged, if it did."""
    return int(events[-1]["epoch"]) + 1 if run.state == "diverged" else None


def _label(runs: Sequence[Result]) -> str:
    return _legend(drawable(str(runs[0].training.case)), missing(runs))


def _legend(name: str, without: str) -> str:
    """A name with what is missing of it, on lines that fit a panel."""
    return "\n".join(wrap(f"{name} ({without})", LEGEND_WIDTH)) if without else name
