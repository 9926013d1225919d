"""Tables, progress bars (plain lines where there is no terminal) and the parser of command lines.

rich is imported where it is needed: a refused config should not wait for it.
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

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """A command line that names the option that was probably meant by an unknown one."""

    def error(self, message: str) -> NoReturn:
        # argparse misses a required option before it looks at one that it does not know.
        words = sys.argv if "required: --" in message else message.partition("unrecognized arguments: ")[2].split()
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        options = [option for option in options if option not in self._option_string_actions]
        close = [
            name for option in options for name in difflib.get_close_matches(option, self._option_string_actions, 1)
        ]
        super().error(f"{message}; did you mean {' '.join(close)}?" if close else message)


def within(low: Number, high: Number) -> Callable[[str], Number]:
    """A type for options of a ``Parser``: a number from ``low`` to ``high``, whole if these are."""
    kind = type(low)

    def number(text: str) -> Number:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {whole} from {low:,} to {high:,}")

    return number


def table(rows: Sequence[Sequence[str]], width: int) -> str:
    """Rows in columns, titles first; cells are wrapped where ``width`` is too small.

    Where it is too small even for the longest words, each row becomes a block of lines.
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


LONGEST_SECONDS = timedelta.max.total_seconds() / 2
"""what a bar can say, not a run's end"""


class Progress:
    """Progress: a bar where standard error is a terminal, elsewhere a line now and then.

    Args:
        unit: What is counted, in the plural; "" shows a percentage instead of the numbers.
        done: What was done before; the time left is not estimated from it.
    """

    def __init__(self, total: int, unit: str = "", done: int = 0, line_every_seconds: float = 60.0) -> None:
        from rich import progress
        from rich.console import Console

        self.total, self.unit, self.done = total, unit, done
        self._line_every_seconds, self._shown_at = line_every_seconds, time.monotonic()
        self._lock = threading.Lock()
        self._console = Console(stderr=True, force_terminal=is_terminal(sys.stderr))
        self._has_bar = self._console.is_terminal and not self._console.is_dumb_terminal
        # No thread refreshes it, and nothing is redirected: the loader's processes are forked beside it.
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
        self._console.show_cursor(True)  # a process that is killed could not bring it back

    @property
    def speed(self) -> float:
        """How many are done per second, recently; 0 while that is not known."""
        return self._bar.tasks[0].speed or 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, number: int) -> None:
        """Count ``number`` more as done; any thread may call it."""
        with self._lock:
            self.update(self.done + number)

    def update(self, done: int, description: str = "", *figures: str) -> None:
        """Set how many are done in all. On a narrow terminal the last of the figures are left out."""
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
        if time.monotonic() - self._shown_at < (REFRESH_SECONDS if self._has_bar else self._line_every_seconds):
            return
        line = f"{description}: {details}" if description else details
        if self._has_bar:
            self._bar.refresh()
        else:
            print(line, flush=True)
        self._shown_at = time.monotonic()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        from rich.control import Control, ControlType

        if self._has_bar:
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        print("\n".join(wrap(message, columns())) if is_terminal(sys.stdout) else message, flush=True)
        if is_terminal(sys.stdout):  # else a program between, such as tee, may have yet to print the line
            self._bar.refresh()
        self._shown_at = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()
