"""Figures for all commands, in one style, as PNG and SVG; no display is needed."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour blindness; matplotlib calls the colours C0, C1 and so on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
PLAIN_NUMBERS = "{x:,.10g}"


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 5.5)) -> "tuple[Figure, Any]":
    """A figure of ``size`` inches, and its axes: a single one, or an array of ``rows`` × ``columns``."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure  # pyplot looks for a display and keeps every figure

    matplotlib.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "savefig.dpi": 130,
            "text.parse_math": False,  # a $ in the name of a run does not begin a formula
        }
    )
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in figure.axes:
        one.yaxis.set_major_formatter(PLAIN_NUMBERS)
    return figure, axes


def scale_y(axes: "Axes") -> None:
    """Make the y axis logarithmic, with plain numbers, if the data is positive and spans more than a factor of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.dataLim.intervaly
    if not 0 < 10 * low < high:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)


def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, whether ``path`` has one of these suffixes or none; return both paths.

    Raises:
        ValueError: ``path`` has the suffix of another image format.
        OSError: a file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix in (".png", ".svg"):
        path = path.with_suffix("")
    elif suffix[1:] in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: pictures are written as PNG and SVG; name {path.with_suffix('.png')}")
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    with warnings.catch_warnings():
        # matplotlib's font lacks many scripts; the CSV next to a figure has the names of the classes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for file in written:
            figure.savefig(file)
    return written
