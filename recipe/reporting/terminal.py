"""Tables, progress bars (plain lines without a terminal) and the command-line parser.

rich is imported only where it is needed, so that a refused config does not wait for it.
"""

import argparse
import difflib
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from io import StringIO
from typing import NoReturn, Self, TypeVar

from recipe.plan import columns, fields, is_terminal, wrap

SHORTEST_BAR = 8
REFRESH_SECONDS = 0.1
LINE_EVERY_SECONDS = 60.0  # without a terminal
LONGEST_SECONDS = timedelta.max.total_seconds() / 2  # that can be shown as the time left

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the closest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        # argparse complains about a missing required option before it looks at unknown ones.
        words = sys.argv if "required: --" in message else message.partition("unrecognized arguments: ")[2].split()
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        options = [option for option in options if option not in self._option_string_actions]
        close = [
            name for option in options for name in difflib.get_close_matches(option, self._option_string_actions, 1)
        ]
        super().error(f"{message}; did you mean {' '.join(close)}?" if close else message)


def within(low: Number, high: Number) -> Callable[[str], Number]:
    """An argument type: a number from ``low`` to ``high``, an integer if both are."""
    kind = type(low)

    def number(text: str) -> Number:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {whole} from {low:,} to {high:,}")

    return number


def table(rows: Sequence[Sequence[str]], width: int) -> str:
    """Rows in columns, titles first; cells wrap to fit ``width``.

    If even the longest words do not fit, each row becomes a block of lines.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(*rows[0], padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*(Text(cell, overflow="fold") for cell in row))
    console = Console(file=StringIO(), width=width, force_terminal=False)
    if console.measure(grid, options=console.options.update(width=10_000)).minimum > width:
        return "\n".join(fields(list(zip(rows[0], row, strict=True)), width) for row in rows[1:])
    with console.capture() as captured:
        console.print(grid)
    return "".join(line.rstrip() + "\n" for line in captured.get().splitlines())


class Progress:
    """Progress: a bar if standard error is a terminal, otherwise a line once a minute.

    Args:
        unit: The plural noun of what is counted; "" shows a percentage instead of the numbers.
        done: How many were done before; the estimate of the time left ignores them.
    """

    def __init__(self, total: int, unit: str = "", done: int = 0) -> None:
        from rich import progress
        from rich.console import Console

        self.total, self.unit, self.done = total, unit, done
        self._shown_at = time.monotonic()
        self._lock = threading.Lock()
        self._console = Console(stderr=True, force_terminal=is_terminal(sys.stderr))
        self._has_bar = self._console.is_terminal and not self._console.is_dumb_terminal
        # No refresh thread and no redirection, because the data loader forks processes meanwhile.
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            progress.TextColumn("{task.fields[details]}", markup=False),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=math.inf,  # the last 1,000 updates
            get_time=time.monotonic,
            disable=not self._has_bar,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done, details="")
        self._bar.start()
        self._console.show_cursor(True)  # a killed process could not restore it

    @property
    def speed(self) -> float:
        """The recent rate per second; 0 while it is unknown."""
        return self._bar.tasks[0].speed or 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, number: int) -> None:
        """Count ``number`` more as done. Thread-safe."""
        with self._lock:
            self.update(self.done + number)

    def update(self, done: int, description: str = "", *figures: str) -> None:
        """Set how many are done in total. A narrow terminal omits the last of the figures."""
        self.done = done
        self._bar.update(self._task, completed=done, description=description)
        seconds = self._bar.tasks[0].time_remaining
        left = "-:--:--" if seconds is None else timedelta(seconds=min(seconds, LONGEST_SECONDS))
        count = f"{done:,}/{self.total:,} {self.unit}" if self.unit else f"{done / max(1, self.total):.0%}"
        details, *others = f"{left} left", count, *figures
        room = self._console.width - len(description) - SHORTEST_BAR - 2 if self._has_bar else math.inf
        for figure in others:
            if len(details) + 2 + len(figure) > room:
                break
            details += f", {figure}"
        self._bar.update(self._task, details=details)
        if time.monotonic() - self._shown_at < (REFRESH_SECONDS if self._has_bar else LINE_EVERY_SECONDS):
            return
        if self._has_bar:
            self._bar.refresh()
        else:
            print(f"{description}: {details}" if description else details, flush=True)
        self._shown_at = time.monotonic()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        from rich.control import Control, ControlType

        if self._has_bar:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        print("\n".join(wrap(message, columns())) if is_terminal(sys.stdout) else message, flush=True)
        if is_terminal(sys.stdout):  # otherwise a pipe such as tee may not have printed the line yet
            self._bar.refresh()
        self._shown_at = time.monotonic()

    def close(self) -> None:
        """Stop the bar where it is."""
        self._bar.stop()
