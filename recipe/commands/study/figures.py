"""The pictures of a study: errors against the batch size, and curves over the epochs."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands.figure import COLOURS, add_legend, drawable, new_figure, save_figure
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
# A loss on its way to infinity would press all others together: it leaves the frame at so many times their highest.
FRAME = 2.0


@dataclass(frozen=True)
class Curve:
    """A run's values, one an epoch from the first on, NaN where there is none; ``left_in`` is the epoch, counted from
    1, in which it diverged.
    """

    values: list[float]
    left_in: int | None = None


@dataclass(frozen=True)
class Line:
    """A case in a picture: the curves of its runs, and what the legend says."""

    label: str
    curves: list[Curve]


def draw_figures(study: Study, results: Sequence[Result], output: Path) -> list[Path | None]:
    """Draw what the study asks for as PNG and SVG; return the PNG of each figure, None where there is nothing to draw.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: they cannot be written.
    """
    drawing: dict[str, Callable[[Figure, dict[str, list[Result]], Path], Any]] = {
        "error_by_batch_size": _error_by_batch_size,
        "beside_baseline": _beside_baseline,
        "curves": _curves,
    }
    cases = {case.name: [r for r in results if r.training.case.name == case.name] for case in study.file.cases}
    figures = [drawing[asked.draw](asked, cases, output) for asked in study.file.figures]
    return [
        None if figure is None else save_figure(figure, output / asked.draw)[0]
        for asked, figure in zip(study.file.figures, figures, strict=True)
    ]


def _error_by_batch_size(asked: Figure, cases: dict[str, list[Result]], output: Path) -> Any:
    """The paper's Figure 1; a line for each scaling rule."""
    lines: dict[str, dict[int, list[Result]]] = defaultdict(dict)
    for name in asked.cases:
        plan = cases[name][0].training.plan
        lines[plan.config.recipe.schedule.scaling_rule][plan.global_batch] = cases[name]
    batches = sorted({batch for points in lines.values() for batch in points})
    means: list[float] = []
    figure, axes = new_figure()
    for colour, (rule, points) in zip(COLOURS, lines.items(), strict=False):
        spreads = {batch: spread(run.median_error for run in runs) for batch, runs in sorted(points.items())}
        # NaN is a gap: a line from one neighbour to the other would tell of an error that nobody has seen.
        errors = [math.nan if one.mean is None else one.mean for one in spreads.values()]
        without = "; ".join(f"{batch:,}: {missing(points[batch])}" for batch in spreads if missing(points[batch]))
        label = _legend(f"{SCALING[rule]} scaling", without)
        stds = [one.std or 0.0 for one in spreads.values()]
        axes.errorbar(list(spreads), errors, yerr=stds, marker="o", capsize=4, color=colour, label=label)
        for batch, one in spreads.items():
            if one.mean is not None:
                means.append(one.mean)
                beside = {"xytext": (-6, 6), "textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{one.mean:.2f}", (batch, one.mean), fontsize=9, **beside)
            if any(run.state == "diverged" for run in points[batch]):
                _mark_above(axes, batch, colour)
    if not means:
        return None
    axes.set_xscale("log", base=2)
    axes.set_xlim(batches[0] / 1.4, batches[-1] * 1.4)  # half a doubling of room
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    if 0 < 10 * min(means) < max(means):
        axes.set_yscale("log")
        _plain_numbers(axes)
    of = last_epochs(run.training for name in asked.cases for run in cases[name])
    axes.set(xlabel="global batch", ylabel=f"{VALIDATION_ERROR}: median of {of},\nmean ± std over the seeds")
    axes.set_title(drawable(asked.title), pad=12, parse_math=False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _beside_baseline(asked: Figure, cases: dict[str, list[Result]], output: Path) -> Any:
    """The paper's Figure 2: the training loss of each case in a panel of its own, with the baseline's."""
    assert asked.baseline is not None, "the study's file has been checked"
    baseline, *others = [_losses(cases[name], output) for name in (asked.baseline, *asked.cases)]
    figure, panels = new_figure(columns=len(others), size=(4.2 * len(others), 4.4))
    panels = [panels] if len(others) == 1 else list(panels)
    for panel in panels[1:]:
        panel.sharey(panels[0])
    drawn = [_draw(panel, _within_frame([baseline, line])) for panel, line in zip(panels, others, strict=True)]
    panels[0].set_ylabel(TRAINING_LOSS)
    figure.suptitle(f"{drawable(asked.title)}: {OVER_SEEDS}", parse_math=False)
    return figure if any(drawn) else None


def _curves(asked: Figure, cases: dict[str, list[Result]], output: Path) -> Any:
    """The paper's Figure 4: training and validation of all cases over the epochs."""
    figure, (left, right) = new_figure(columns=2, size=(11, 5))
    losses = _draw(left, _within_frame([_losses(cases[name], output) for name in asked.cases]))
    errors = _draw(right, [_errors(cases[name], output) for name in asked.cases])
    left.set_ylabel(TRAINING_LOSS)
    right.set_ylabel(VALIDATION_ERROR)
    figure.suptitle(f"{drawable(asked.title)}: {OVER_SEEDS}", parse_math=False)
    return figure if losses or errors else None


def _draw(axes: "Axes", lines: Sequence[Line]) -> bool:
    """Draw the mean over seeds, of those that got so far, with a band from the lowest to the highest and a cross above
    the frame where a run diverged; tell whether there was anything to draw.
    """
    from matplotlib.ticker import MaxNLocator

    drawn, handles = False, []
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        epochs = range(1, max((len(curve.values) for curve in line.curves), default=0) + 1)
        values = [[curve.values[epoch - 1] for curve in line.curves if len(curve.values) >= epoch] for epoch in epochs]
        known = {
            epoch: finite
            for epoch, at in zip(epochs, values, strict=True)
            if (finite := [value for value in at if math.isfinite(value)])
        }
        means = [statistics.mean(at) for at in known.values()]
        marker = "o" if len(known) == 1 else None  # a line of one point is none
        handles += axes.plot(list(known), means, color=colour, linewidth=1.6, marker=marker)
        lowest, highest = [min(at) for at in known.values()], [max(at) for at in known.values()]
        axes.fill_between(list(known), lowest, highest, color=colour, alpha=0.15)
        for curve in line.curves:
            if curve.left_in is not None:
                _mark_above(axes, curve.left_in, colour)
        drawn = drawn or bool(known)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if drawn:
        axes.set_yscale("log")
        _plain_numbers(axes)
    add_legend(axes, handles, [line.label for line in lines])
    return drawn


def _mark_above(axes: "Axes", x: float, colour: str) -> None:
    """A cross on the upper edge of the frame: what would be drawn here lies beyond it."""
    axes.plot([x], [1], "x", color=colour, markersize=8, transform=axes.get_xaxis_transform(), clip_on=False)


def _plain_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _within_frame(lines: Sequence[Line]) -> list[Line]:
    """The lines with each run that diverged cut where it leaves the frame, which the others make."""
    others = [curve.values for line in lines for curve in line.curves if curve.left_in is None]
    frame = FRAME * max((value for values in others for value in values if not math.isnan(value)), default=math.inf)
    return [Line(line.label, [_cut(curve, frame) for curve in line.curves]) for line in lines]


def _cut(curve: Curve, frame: float) -> Curve:
    if curve.left_in is None:
        return curve
    inside = next((i for i, value in enumerate(curve.values) if value > frame), None)
    return curve if inside is None else Curve(curve.values[:inside], inside + 1)


def _losses(runs: Sequence[Result], output: Path) -> Line:
    """The mean training loss of each epoch, a curve a run, without the updates that fp16's loss scale skipped."""
    curves = []
    for run in runs:
        steps = [event for event in read_events(output / run.training.folder) if event["event"] == "step"]
        losses: dict[int, list[float]] = {event["epoch"]: [] for event in steps}
        for event in steps:
            losses[event["epoch"]] += [] if event["loss"] is None else [event["loss"]]
        means = [statistics.mean(epoch) if epoch else math.nan for epoch in losses.values()]
        left_in = _left_in(run, steps)
        curves.append(Curve(means if left_in is None else means[: left_in - 1], left_in))
    return Line(_label(runs), curves)


def _errors(runs: Sequence[Result], output: Path) -> Line:
    """The top-1 validation error after each epoch in per cent, a curve a run."""
    curves = []
    for run in runs:
        events = read_events(output / run.training.folder)
        errors = [100 - event["top1"] for event in events if event["event"] == "validation"]
        curves.append(Curve(errors, _left_in(run, events)))
    return Line(_label(runs), curves)


def _left_in(run: Result, events: Sequence[dict[str, Any]]) -> int | None:
    """The epoch, counted from 1, in which a run diverged, if it did."""
    return int(events[-1]["epoch"]) + 1 if run.state == "diverged" else None


def _label(runs: Sequence[Result]) -> str:
    return _legend(drawable(str(runs[0].training.case)), missing(runs))


def _legend(name: str, without: str) -> str:
    """A name with what is missing of it, on lines that fit a panel."""
    return "\n".join(wrap(f"{name} ({without})", LEGEND_WIDTH)) if without else name
