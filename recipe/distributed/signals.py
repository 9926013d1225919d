"""SIGTERM (a scheduler), SIGINT (Ctrl-C) and SIGHUP (the terminal is gone), handled by a dedicated thread.

A Python signal handler runs only when the main thread returns from C, where it may be waiting for a rank that is gone,
and it does not learn who sent the signal.
"""

import io
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

from recipe.config import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNKNOWN_SENDER = -1

Taker = Callable[[int, int], None]
"""Called with the signal number and the sender's process ID, which is 0 for the kernel, as when Ctrl-C is typed."""


class Interrupted(BaseException):
    """A signal asked the run to end. Not an ``Exception``, so code that handles failures does not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


def end_at_once(signum: int, sender: int) -> None:
    """End the process: before and after training there is nothing to finish.

    This does not raise: during a library's import an exception could be caught as a failure of that library.
    """
    if os.environ.get("RANK", "0") == "0":
        say(f"{signal.Signals(signum).name}: ended at once; the same command resumes")
    os._exit(128 + signum)


def ignore(signum: int, sender: int) -> None:
    """Ignore a signal, so that it does not change the exit code of a process that is already ending."""


_take: Taker = end_at_once
_listens = False


def listen() -> None:
    """Start the thread that handles signals, at first with ``end_at_once``.

    Call this before other threads start: a thread that exists already would receive the signals itself.
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
    """Make ``taker`` handle signals from now on."""
    global _take
    _take = taker


def heeded() -> list[signal.Signals]:
    """The signals that ask a run to end; without SIGHUP if it is ignored, as under nohup."""
    return [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def say(message: str) -> None:
    """Print a message to stderr: one line, or on a terminal wrapped at its width and in place of a progress bar."""
    text = f"recipe: {printable(message)}"
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        text = "\r\x1b[2K" + "\n".join(lines)  # return to the start of the line and erase it
    print(text, file=sys.stderr, flush=True)


class _Outlived(io.FileIO):
    """stdout or stderr whose reader may go away before the process ends: output that cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Keep printing from failing when the terminal is gone, or when the same Ctrl-C has ended a ``tee``.

    This covers everything that Python writes, including libraries' logs and warnings.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(_Outlived(number, "w", closefd=False))
            replaced = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, replaced)
