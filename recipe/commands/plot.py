"""``python -m recipe plot``: loss, error, learning rate and speed of runs over the epochs, as a picture."""

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recipe.commands import refusing
from recipe.commands.figure import new_figure, save_figure, scale_y
from recipe.commands.run_files import Column, RunFiles, read_run
from recipe.config import printable
from recipe.distributed import say
from recipe.reporting import Parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 300  # per curve; a longer one is averaged down to as many
FEW_POINTS = 60  # up to this number each point has a marker
LEGEND_CHARACTERS = 130  # in a line across the picture
LOSS, SPEED, WAITING = "training loss", "images per second", "time spent waiting for data [%]"

PANELS: tuple[tuple[str, str, str, Callable[[Column], Column]], ...] = (
    (LOSS, "step", "loss", lambda loss: loss),
    ("validation loss", "validation", "loss", lambda loss: loss),
    ("learning rate", "step", "lr", lambda rate: rate),
    ("top-1 validation error [%]", "validation", "top1", lambda accuracy: 100 - accuracy),
    (SPEED, "step", "images_per_second", lambda speed: speed),
    (WAITING, "step", "data_wait", lambda share: 100 * share),
    ("gradient noise scale [images]", "noise_scale", "noise_scale", lambda images: images),
)
"""title, event, its field, and how its values are converted"""


@refusing
def main(argv: Sequence[str]) -> int:
    """Draw the runs; return 0, or 2 if there is nothing to draw."""
    parser = Parser(
        prog="python -m recipe plot",
        description="Draw training and validation loss, top-1 error, learning rate, images per second and the share "
        "of time spent waiting for data over the epochs of one or more runs, as PNG and SVG. A run can be in progress; "
        "no display is needed.",
    )
    output_help = "name of the PNG and SVG, or a folder for plot.png and plot.svg (default: RUN_DIR, or . for several)"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--output", type=Path, metavar="PATH", help=output_help)
    arguments = parser.parse_args(argv)
    output = arguments.output or (arguments.runs[0] if len(arguments.runs) == 1 else Path())
    runs = [read_run(folder) for folder in {os.path.abspath(folder): folder for folder in arguments.runs}.values()]
    for run in runs:
        if not run.steps_done:
            say(f"{run.folder} has no steps yet")
    runs = [run for run in runs if run.steps_done]
    if not runs:
        raise ValueError("there is nothing to draw yet; wait for the first steps")
    figure = draw(runs)
    output = output / "plot" if output.is_dir() else output
    output.parent.mkdir(parents=True, exist_ok=True)
    for file in save_figure(figure, output):
        print(printable(str(file)))
    return 0


def draw(runs: Sequence[RunFiles]) -> "Figure":
    """Draw one panel per quantity, with one colour per run; every run must have a step."""
    panels = [panel for panel in PANELS if panel[1] != "noise_scale" or any(_has(run, panel[1]) for run in runs)]
    labels = [_label(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    legend_inches = 0.2 * sum(label.count("\n") + 1 for label in labels)
    rows = (len(panels) + 1) // 2
    figure, grid = new_figure(rows, 2, size=(12, 3 * rows + 0.5 + legend_inches))
    for axes, (title, event, field, convert) in zip(grid.flat, panels, strict=False):
        axes.set_title(title, loc="left")
        axes.set_xlabel("epochs done")
        for run, width in zip(runs, np.linspace(min(1.3 * len(runs), 4.0), 1.3, len(runs)), strict=True):
            # The first run has the widest line, so that it shows below one that coincides with it.
            _draw_curve(axes, run.epochs(event), convert(run.events[event][field]), width)
        axes.set_xlim(0, 1.01 * max(run.epochs("step")[-1] for run in runs))
        if title in (SPEED, WAITING):
            axes.set_ylim(bottom=0)
        else:
            scale_y(axes)
        if title == LOSS:
            _mark_lost_steps(axes, runs)
        if not any(_has(run, event) for run in runs):
            axes.text(0.5, 0.5, "no validation yet", ha="center", va="center", transform=axes.transAxes)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    sources = " and ".join(sorted({run.plan.config.recipe.data.source for run in runs}))
    handles = grid.flat[0].lines[: len(runs)]
    title = f"Training on {sources}"
    figure.legend(handles, labels, loc="outside upper left", title=title, title_fontsize="x-large", alignment="left")
    return figure


def condense(epochs: Column, values: Column) -> tuple[Column, Column, Column, Column]:
    """Epochs, means, minima and maxima of up to ``MOST_POINTS`` segments of a curve; NaN only if all values are."""
    if values.size <= MOST_POINTS:
        return epochs, values, values, values
    starts = np.linspace(0, values.size, MOST_POINTS, endpoint=False).astype(int)
    is_number = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(is_number, values, 0), starts) / np.add.reduceat(is_number, starts, dtype=int)
    lengths = np.diff(starts, append=values.size)
    return (
        np.add.reduceat(epochs, starts) / lengths,
        means,
        np.fmin.reduceat(values, starts),
        np.fmax.reduceat(values, starts),
    )


def _draw_curve(axes: "Axes", epochs: Column, values: Column, width: float) -> None:
    """Draw a curve, or if it has many points their means with a band from the lowest to the highest value."""
    epochs, means, lowest, highest = condense(epochs, values)
    (line,) = axes.plot(epochs, means, linewidth=width, marker="." if epochs.size <= FEW_POINTS else None)
    if means is not values:
        axes.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel("epochs done (line: means; band: lowest to highest value)")


def _mark_lost_steps(axes: "Axes", runs: Sequence[RunFiles]) -> None:
    """Mark steps with a skipped update or a loss that is not finite on the upper edge."""
    for number, run in enumerate(runs):
        steps = run.events["step"]
        lost = run.epochs("step")[np.isnan(steps["loss"]) | (steps["skipped"] == 1)]
        if lost.size:
            upper_edge = np.ones(lost.size)
            axes.plot(lost, upper_edge, f"C{number}x", transform=axes.get_xaxis_transform(), clip_on=False)
            axes.set_title("×: update skipped, or loss not finite", loc="right", fontsize="small")


def _has(run: RunFiles, event: str) -> bool:
    return run.events[event]["step"].size > 0


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """The folders of the runs, relative to what they have in common."""
    folders = [Path(os.path.abspath(run.folder)) for run in runs]
    return [os.path.relpath(folder, os.path.commonpath([folder.parent for folder in folders])) for folder in folders]


def _label(run: RunFiles, name: str) -> str:
    """A run's legend entry: its name, model, batch and, if it is not complete, progress."""
    plan = run.plan
    batches = " to ".join(f"{batch:,}" for batch in dict.fromkeys(plan.config.batches))
    label = printable(f"{name}: {plan.config.recipe.model.name}, batch {batches}")
    if run.summary is None:
        label += f" ({plan.timeline.epochs_done(run.steps_done):.4g} of {plan.epochs} epochs)"
    return textwrap.fill(label, LEGEND_CHARACTERS)
