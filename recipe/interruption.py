"""SIGTERM (Slurm's preemption, a scheduler) and SIGINT (Ctrl-C) as an exception that no handler of failures takes."""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked for the end. No ``Exception``: whoever handles failures shall not take it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


def end_at_once() -> None:
    """Have a signal end the process: before training, and after it, there is nothing to finish.

    No exception: raised within the import of a library, it may be taken for a failure of that, and pass.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(signum).name
            print(f"recipe: {name}: ended at once; the same command goes on", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    for signum in SIGNALS:
        signal.signal(signum, interrupt)


def ignore_signals() -> None:
    """What comes while the process ends anyway shall not change how: the launcher passes on what a group has got."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
