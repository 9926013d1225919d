"""Lays out labelled text to the width of the terminal, wrapped between words."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

WIDTH = 110
LABEL_WIDTH = 16
NO_BREAK = "\N{NO-BREAK SPACE}"


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def columns(most: int = WIDTH) -> int:
    """The width of the terminal, at most ``most``; exactly ``most`` if standard output is not a terminal."""
    return min(most, shutil.get_terminal_size((most, 24)).columns) if is_terminal(sys.stdout) else most


def wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Lines of at most ``width`` characters; words that are longer, such as paths, are not split."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def counted(number: float, noun: str, plural: str = "s") -> str:
    """A number with its noun, such as "1 step" or "14,040 steps"."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else plural}"


def fields(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Labels on the left, wrapped texts on the right; a ``NO_BREAK`` space keeps a number with its unit."""
    lines = []
    for label, text in rows:
        for number, paragraph in enumerate(text.split("\n")):
            head = f"  {'' if number else label:<{LABEL_WIDTH - 1}} "
            lines += wrap(paragraph, width, head, " " * (LABEL_WIDTH + 2))
    return "\n".join(lines).replace(NO_BREAK, " ") + "\n"
