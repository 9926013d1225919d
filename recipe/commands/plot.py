"""``python -m recipe plot``: loss, error, rate and speed of runs over the epochs, as a picture."""

import itertools
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recipe.commands import refusing
from recipe.commands.figure import COLOURS, add_legend, drawable, line_styles, new_figure, save_figure, set_log_scale
from recipe.commands.run_files import Column, RunFiles, distinct_names, read_run
from recipe.config import printable
from recipe.distributed import say
from recipe.reporting import Parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 1000  # of a curve: more than the picture has pixels for
SMOOTHED_SHARE = 0.01  # of the epochs that are shown, on each side of a point
FEW_POINTS = 60  # that can each have a dot
LEGEND_CHARACTERS = 130  # in a line across the picture
DASHES = ("-", "--", ":", "-.")

CONVERSIONS: dict[str, Callable[[Column], Column]] = {
    "top1": lambda accuracy: 100 - accuracy,
    "data_wait": lambda share: 100 * share,
}


@refusing
def main(argv: Sequence[str]) -> int:
    """Draw the runs; return 0, or 2 where there is nothing to draw."""
    parser = Parser(
        prog="python -m recipe plot",
        description="Draw training and validation loss, top-1 error, rate, images per second and the share of the time "
        "spent waiting for data of one or several runs over the epochs, as PNG and SVG. A run may be in progress; no "
        "display is needed.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="where to write PATH.png and PATH.svg, or a folder for plot.png and plot.svg (default: RUN_DIR of a "
        "single run, the current folder for several)",
    )
    arguments = parser.parse_args(argv)
    output = arguments.output or (arguments.runs[0] if len(arguments.runs) == 1 else Path())
    runs = [read_run(folder) for folder in {os.path.abspath(folder): folder for folder in arguments.runs}.values()]
    for run in runs:
        if not run.steps_done:
            say(f"{run.folder} has no step written down yet")
    runs = [run for run in runs if run.steps_done]
    if not runs:
        raise ValueError("there is nothing to draw yet; wait for the first steps")
    figure = draw(runs)
    output = output / "plot" if output.is_dir() else output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = save_figure(figure, output)
    except OSError as error:
        raise ValueError(f"{error.filename or output}: {error.strerror}; name another --output") from None
    for file in written:
        print(printable(str(file)))
    return 0


def draw(runs: Sequence[RunFiles]) -> "Figure":
    """A panel for each quantity, a colour for each run; every run has at least one step."""
    labels = [
        _label(run, name)
        for run, name in zip(runs, distinct_names([Path(os.path.abspath(run.folder)) for run in runs]), strict=True)
    ]
    has_noise = any(run.events["noise_scale"]["step"].size for run in runs)
    rows = 4 if has_noise else 3
    figure, grid = new_figure(rows, 2, size=(12, 3 * rows + 0.4 + 0.2 * sum(label.count("\n") + 1 for label in labels)))
    loss, validation_loss, rate, error, speed, waiting, *others = grid.flat
    last_epoch = max(float(run.epochs("step")[-1]) for run in runs)
    half_width = SMOOTHED_SHARE * last_epoch
    half_widths = [round(half_width * run.steps_per_epoch) for run in runs]
    for axes, title, event, field, is_smoothed in (
        (loss, "training loss", "step", "loss", True),
        (validation_loss, "validation loss", "validation", "loss", False),
        (error, "top-1 validation error [%]", "validation", "top1", False),
        (speed, "images per second", "step", "images_per_second", True),
        (waiting, "time spent waiting for data [%]", "step", "data_wait", True),
        *((noise, "gradient noise scale [images]", "noise_scale", "noise_scale", False) for noise in others[:1]),
    ):
        axes.set_title(title, loc="left")
        convert = CONVERSIONS.get(field, lambda values: values)
        curves = [(run.epochs(event), convert(run.events[event][field])) for run in runs]
        _draw_curves(axes, curves, half_widths if is_smoothed else [0] * len(runs))
    _draw_rates(rate, runs)
    _mark_steps(loss, runs)
    if has_noise:  # its panel is as wide as the picture
        others[1].remove()
        others[0].set_subplotspec(others[0].get_gridspec()[-1, :])
    for axes in figure.axes:
        axes.set_xlabel("epochs done")
        axes.set_xlim(0, 1.01 * last_epoch)
        if axes not in (speed, waiting):
            _set_scale(axes)
    for axes in (speed, waiting):
        axes.set_ylim(bottom=0)
    if not any(run.events["validation"]["step"].size for run in runs):
        error.set_ylim(0, 100)
        for axes in (error, validation_loss):
            axes.text(0.5, 0.5, "no validation yet", ha="center", va="center", transform=axes.transAxes)
    smoothing = f"mean over ± {half_width:.2g} epochs (faint: each step)"
    sources = " and ".join(sorted({drawable(run.data_source) for run in runs}))
    _name_runs(figure, f"Training on {sources}", labels, smoothing if any(half_widths) else None)
    return figure


def smooth(values: Column, half_width: int) -> tuple[NDArray[np.intp], Column]:
    """Means over ``half_width`` values before and after each of up to ``MOST_POINTS`` evenly spaced ones.

    At both ends there are fewer to average over. NaN does not count; it is the mean only where there is nothing else.
    Returns the indices of the points, and the means there.
    """
    points = _spread(values.size)
    means = np.full(points.size, np.nan)
    for place, index in enumerate(points):
        window = values[max(0, index - half_width) : index + half_width + 1]
        finite = window[~np.isnan(window)]
        if finite.size:
            means[place] = finite.mean()
    return points, means


def thin_out(values: Column) -> NDArray[np.intp]:
    """Indices of few values that draw the same curve: of equal parts of it the lowest and the highest, and the ends."""
    if values.size <= 2 * MOST_POINTS:
        return np.arange(values.size)
    low, high = np.nan_to_num(values, nan=np.inf), np.nan_to_num(values, nan=-np.inf)
    kept = [0, values.size - 1]
    edges = np.linspace(0, values.size, MOST_POINTS + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        kept += [start + int(low[start:end].argmin()), start + int(high[start:end].argmax())]
    return np.unique(kept)


def _spread(size: int) -> NDArray[np.intp]:
    """Up to ``MOST_POINTS`` evenly spaced indices of ``size`` values, with the first and the last."""
    return np.unique(np.linspace(0, size - 1, min(size, MOST_POINTS)).round().astype(np.intp))


def _draw_curves(axes: "Axes", curves: Sequence[tuple[Column, Column]], half_widths: Sequence[int]) -> None:
    """Draw (epochs, values) of each run: as they are, or, with a half width in steps, faint beneath their means."""
    dots = max(values.size for _, values in curves) <= FEW_POINTS
    marked, lines = [], []
    for (epochs, values), half_width, style in zip(curves, half_widths, _styles(), strict=False):
        drawn = thin_out(values)
        if half_width:
            axes.plot(epochs[drawn], values[drawn], **style, alpha=0.25, linewidth=0.8)
            drawn, values = smooth(values, half_width)
        else:
            values = values[drawn]
        marked.append("." if not half_width and (dots or values.size == 1) else None)
        lines.append((epochs[drawn], values))
    for line, marker, style in zip(lines, marked, _told_apart(lines), strict=True):
        axes.plot(*line, **style, marker=marker)


def _draw_rates(axes: "Axes", runs: Sequence[RunFiles]) -> None:
    """Draw the rates, each of which holds from the beginning of its step to its end."""
    axes.set_title("learning rate", loc="left")
    curves = []
    for run in runs:
        ends, rates = run.epochs("step"), run.events["step"]["lr"]
        drawn = thin_out(rates)
        epochs = np.concatenate([ends[:1] - 1 / run.steps_per_epoch, ends[drawn]])
        curves.append((epochs, np.concatenate([rates[:1], rates[drawn]])))
    for curve, style in zip(curves, _told_apart(curves), strict=True):
        axes.plot(*curve, **style, drawstyle="steps-pre")


def _mark_steps(axes: "Axes", runs: Sequence[RunFiles]) -> None:
    """Mark, a row a run, where updates were skipped (at the bottom) and where the loss was not finite (at the top)."""
    from matplotlib.lines import Line2D

    marks: dict[str, str] = {}
    for row, (run, style) in enumerate(zip(runs, _styles(), strict=False)):
        from_edge = 0.02 + 0.02 * (row % len(COLOURS))
        for label, marked, marker, height in (
            ("update skipped", run.events["step"]["skipped"] == 1, "|", from_edge),
            ("loss not finite", np.isnan(run.events["step"]["loss"]), "^", 1 - from_edge),
        ):
            epochs = run.epochs("step")[marked]
            if epochs.size:
                epochs = epochs[_spread(epochs.size)]
                axes.plot(
                    epochs,
                    np.full(epochs.size, height),
                    color=style["color"],
                    linestyle="",
                    marker=marker,
                    transform=axes.get_xaxis_transform(),
                )
                marks[label] = marker
    if marks:
        handles = [Line2D([], [], color="0.3", linestyle="", marker=marker) for marker in marks.values()]
        axes.legend(handles, list(marks), loc="upper right", fontsize="small")


def _set_scale(axes: "Axes") -> None:
    """A logarithmic scale where all values are positive and span more than a factor of ten."""
    curves = [line for line in axes.lines if line.get_transform() == axes.transData]
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in curves] or [np.empty(0)])
    values = values[~np.isnan(values)]
    if values.size and values.min() > 0 and values.max() / 10 > values.min():
        set_log_scale(axes)


def _styles() -> Iterator[dict[str, Any]]:
    """Looks of curves, of which the first few dozen can be told apart."""
    return itertools.cycle([{"color": colour, "linestyle": dash} for dash in DASHES for colour in COLOURS])


def _told_apart(curves: Sequence[tuple[Column, Column]]) -> list[dict[str, Any]]:
    """``_styles``, but for curves that would hide each other."""
    return [style | shared for style, shared in zip(_styles(), line_styles(curves), strict=False)]


def _label(run: RunFiles, name: str) -> str:
    """A run's name in the legend, its model and batch, in lines that the picture has room for."""
    label = f"{drawable(name)}: {drawable(run.model)}, batch {run.global_batch:,}"
    if run.summary is None:
        label += f" ({run.steps_done / run.steps_per_epoch:.4g} of {run.total_steps // run.steps_per_epoch} epochs)"
    return textwrap.fill(label, LEGEND_CHARACTERS)


def _name_runs(figure: "Figure", title: str, labels: Sequence[str], smoothing: str | None) -> None:
    """Name the runs below the title, and say how their curves are smoothed, if they are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for _, style in zip(labels, _styles(), strict=False)]
    if smoothing is not None:
        handles.append(Line2D([], [], color="0.3"))
        labels = [*labels, smoothing]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), LEGEND_CHARACTERS // (longest + 8)))
    add_legend(
        figure,
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        title=title,
        title_fontsize="x-large",
        alignment="left",
    )
