"""Pictures for all commands: one look, PNG and SVG, no display needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
DASH = 4  # line widths
BENEATH = 1.9  # just below matplotlib's 2 for lines


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
        one.yaxis.set_major_formatter(_tick)
    return figure, axes


def set_log_scale(axes: "Axes") -> None:
    """A logarithmic y axis whose ticks are numbers like those of a linear one."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_tick)


def drawable(text: str) -> str:
    """Characters that the font lacks, as escapes: boxes would all look alike."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in printable(text))


def add_legend(parent: "Axes | Figure", handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """A legend that says the labels as they are."""
    legend = parent.legend(handles, [str(number) for number in range(len(labels))], frameon=False, **options)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        # Not given to legend(), which hides labels that begin with an underscore; a $ in a name is no formula.
        text.set_parse_math(False)
        text.set_text(label)
    legend.get_title().set_parse_math(False)


def line_styles(curves: "Sequence[tuple[ArrayLike, ArrayLike]]") -> list[dict[str, Any]]:
    """A look for each (x, y), empty but where curves lie on each other, so that each shows.

    Of those the longest is solid, and the others are dashes above it that take turns: where a shorter one ends, its
    dashes do, and none leaves a gap.
    """
    groups: list[list[int]] = []
    for place, curve in enumerate(curves):
        group = next((group for group in groups if _coincide(curves[group[0]], curve)), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    styles: list[dict[str, Any]] = [{} for _ in curves]
    for group in groups:
        longest, *others = sorted(group, key=lambda place: _extent(curves[place]), reverse=True)
        for turn, place in enumerate(others, start=1):
            styles[longest] = {"linestyle": "-", "zorder": BENEATH}
            styles[place] = {"linestyle": (turn * DASH, (DASH, (len(group) - 1) * DASH))}
    return styles


def _extent(curve: "tuple[ArrayLike, ArrayLike]") -> float:
    """How far a curve goes."""
    import numpy as np

    x = np.asarray(curve[0])
    return float(x[-1] - x[0]) if x.size else 0.0


def _coincide(a: "tuple[ArrayLike, ArrayLike]", b: "tuple[ArrayLike, ArrayLike]") -> bool:
    """Whether two curves differ by 1 % at most, but for a few places, as far as both go."""
    import numpy as np

    (a_x, a_y), (b_x, b_y) = (tuple(map(np.asarray, curve)) for curve in (a, b))
    if not a_x.size or not b_x.size or max(a_x[0], b_x[0]) > min(a_x[-1], b_x[-1]):
        return False
    x = np.linspace(max(a_x[0], b_x[0]), min(a_x[-1], b_x[-1]), 200)
    near = np.isclose(np.interp(x, a_x, a_y), np.interp(x, b_x, b_y), rtol=0.01, atol=0, equal_nan=True)
    return bool(near.mean() > 0.95)


def _tick(value: float, position: float | None = None) -> str:
    return f"{value:,.10g}"


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
