"""Pictures for all commands: one look, PNG and SVG, no display needed."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; matplotlib calls them C0, C1 and so on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
PLAIN_NUMBERS = "{x:,.10g}"


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 5.5)) -> "tuple[Figure, Any]":
    """A figure of ``size`` inches and its axes: one, or an array of them with ``rows`` × ``columns``."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps every figure

    matplotlib.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "savefig.dpi": 130,
            "text.parse_math": False,  # a $ in the name of a run is no formula
        }
    )
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in figure.axes:
        one.yaxis.set_major_formatter(PLAIN_NUMBERS)
    return figure, axes


def scale_y(axes: "Axes") -> None:
    """A logarithmic y axis, labelled with plain numbers, if what is drawn is positive and spans more than tenfold."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.dataLim.intervaly
    if not 0 < 10 * low < high:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)


def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """Write ``path`` as PNG and as SVG, whichever of these suffixes it has, or none; return both paths.

    Raises:
        ValueError: its suffix is that of another kind of picture.
        OSError: they cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix in (".png", ".svg"):
        path = path.with_suffix("")
    elif suffix[1:] in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: pictures are written as PNG and SVG; name {path.with_suffix('.png')}")
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    with warnings.catch_warnings():
        # matplotlib's font lacks most of the world's letters; the names of classes are in the CSV beside the picture.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for file in written:
            figure.savefig(file)
    return written
