"""Pictures for all commands: one look, PNG and SVG, no display needed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 5.5)) -> "tuple[Figure, Any]":
    """A figure of ``size`` inches and its axes: one, or an array of them with ``rows`` × ``columns``.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        # Not pyplot: it looks for a display, and keeps every figure.
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib, which is not installed: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns)
    for one in [axes] if rows == columns == 1 else axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
        one.set_prop_cycle(color=COLOURS)
    return figure, axes


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
    for file in written:
        figure.savefig(file, dpi=130)
    return written
