"""SIGTERM (a scheduler), SIGINT (Ctrl-C) and SIGHUP (the terminal is gone), handled by a thread that waits for them.

A Python handler runs only when the main thread comes back from C, where it may be waiting for a rank that is gone, and
does not learn who sent the signal.
"""

import io
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from recipe.config import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNKNOWN_SENDER = -1

Taker = Callable[[int, int], None]
"""Gets the number of a signal and the process that sent it: 0 for the kernel, as where Ctrl-C was typed."""


class Interrupted(BaseException):
    """A signal asked for the end. Not an ``Exception``, so that code that handles failures does not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


def end_at_once(signum: int, sender: int, undo: Callable[[], None] = lambda: None) -> None:
    """End the process: before training, and after it, there is nothing to finish, but something to ``undo``.

    Not by an exception: raised during the import of a library, it may be caught as a failure of that library.
    """
    with suppress(OSError):
        undo()
    if os.environ.get("RANK", "0") == "0":
        say(f"{signal.Signals(signum).name}: ended at once; the same command resumes")
    os._exit(128 + signum)


def ignore(signum: int, sender: int) -> None:
    """A signal during the process's end must not change its exit code: the launcher passes on what a group received."""


_take: Taker = end_at_once
_listens = False


def listen() -> None:
    """Have a thread handle the signals from here on, at first by ``end_at_once``.

    To be called before other threads start: an existing one would let them through to a Python handler.
    """
    global _listens
    if _listens:
        return
    _listens = True
    signals = heeded()
    for signum in signals:
        signal.signal(signum, lambda signum, frame: _take(signum, UNKNOWN_SENDER))
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            came = signal.sigwaitinfo(signals)
            _take(came.si_signo, came.si_pid)

    threading.Thread(target=wait, daemon=True).start()


def take_by(taker: Taker) -> None:
    """Let ``taker`` handle the signals."""
    global _take
    _take = taker


def heeded() -> list[signal.Signals]:
    """The signals that ask for the end: not SIGHUP where nohup has set it to be ignored."""
    return [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def say(message: str) -> None:
    """Print a message on one line of standard error; on a terminal wrapped at its width, in place of a progress bar."""
    text = f"recipe: {printable(message)}"
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        text = "\r\x1b[2K" + "\n".join(lines)  # back to the beginning of the line, and erase it
    print(text, file=sys.stderr, flush=True)


class _Outlived(io.FileIO):
    """Standard output or error whose reader may go away before the process ends: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Keep printing from failing when the terminal is gone, or the same Ctrl-C has ended a ``tee``.

    That holds for all that Python writes, including what libraries print, log and warn about.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(_Outlived(number, "w", closefd=False))
            replaced = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, replaced)
