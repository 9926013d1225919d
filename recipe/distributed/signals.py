"""SIGTERM (a scheduler), SIGINT (Ctrl-C) and SIGHUP (the terminal is gone) as an exception that no handler takes."""

import os
import signal
import stat
import sys
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked for the end. No ``Exception``: whoever handles failures shall not take it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum


def end_at_once() -> None:
    """Have a signal end the process: before training, and after it, there is nothing to finish.

    No exception: raised within the import of a library, it may be taken for a failure of that, and pass.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            say(f"{signal.Signals(signum).name}: ended at once; the same command goes on")
        os._exit(128 + signum)

    for signum in heeded():
        signal.signal(signum, interrupt)


def heeded() -> list[signal.Signals]:
    """The signals that ask for the end: nohup has had SIGHUP ignored before the process began."""
    return [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def say(message: str) -> None:
    """Tell a person at the terminal."""
    at_the_terminal(lambda: print(f"recipe: {message}", file=sys.stderr, flush=True))


def at_the_terminal(show: Callable[[], object]) -> None:
    """Show something; where the terminal is gone, or the program that read the output, go on without them."""
    try:
        show()
    except OSError:
        let_go_of_the_terminal()


def let_go_of_the_terminal() -> None:
    """Have what is printed from here on go nowhere, unless to a file: after a hangup, printing would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if not stat.S_ISREG(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)


def ignore_signals() -> None:
    """What comes while the process ends anyway shall not change how: the launcher passes on what a group has got."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
