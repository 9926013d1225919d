"""Requests to stop (a signal) or to write a checkpoint (the clock), on which the ranks agree after each step.

They need to agree because a signal may reach only one rank, and because their clocks differ. After a signal the current
step is finished and saved; a second signal ends the process at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from recipe.distributed.launcher import kills_late_ranks
from recipe.distributed.signals import Interrupted, end_at_once, ignore, listen, say, take_by

# The same request may reach a rank several times: from the terminal, from a launcher, from a pkill.
SAME_REQUEST_SECONDS = 2.0
# Less than the 30 s after which DeepSpeed's launcher kills a rank that it has sent SIGTERM.
LAUNCHER_LIVES_SECONDS = 20.0

T = TypeVar("T")


class Requests:
    """Collects requests from users, schedulers and the clock during training.

    Args:
        save_every: The time between two checkpoints, by rank 0's clock.
        timeout: The time within which all ranks must agree.
        launchers: The processes on this machine that started this rank, each with its ``open_process`` descriptor.
    """

    def __init__(
        self, save_every: timedelta | None, timeout: timedelta, launchers: Mapping[int, int] | None = None
    ) -> None:
        self._save_every = save_every
        self._saved_at = time.monotonic()
        self._launchers = launchers or {}
        self._signum = 0
        self._signalled_at = 0.0
        self._outliving: threading.Timer | None = None
        # With NCCL instead of gloo, each step would wait for the device.
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def __enter__(self) -> Self:
        listen()
        take_by(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that failed or was saved reports it and ends; a signal must not interrupt that.
        take_by(end_at_once if kind is None else ignore)
        if self._outliving is not None:
            self._outliving.cancel()

    def agree(self) -> tuple[int, bool]:
        """Return the signal that any rank has received (0: none), and whether rank 0's clock asks for a checkpoint."""
        due = self._save_every is not None and time.monotonic() - self._saved_at >= self._save_every.total_seconds()
        if dist.get_world_size() == 1:
            return self._signum, due
        assert isinstance(self._group, dist.ProcessGroup), "every rank is a member"
        asked = torch.tensor([self._signum, int(due and dist.get_rank() == 0)])
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        signum, save = asked.tolist()
        return signum, bool(save)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``; once any rank has received a signal, raise ``Interrupted`` on all ranks before the next."""
        for item in items:
            yield item
            signum, _ = self.agree()
            if signum:
                raise Interrupted(signum)

    def saved(self) -> None:
        """Restart the clock: a checkpoint was written."""
        self._saved_at = time.monotonic()

    def _take(self, signum: int, sender: int) -> None:
        name, now = signal.Signals(signum).name, time.monotonic()
        if sender in self._launchers and self._outliving is None and kills_late_ranks(sender):
            self._outlive(sender)
        # A hangup is not a second request: a terminal that closes also ends the launcher, and both may be reported.
        # Nor is a SIGTERM that a launcher forwards, or that the watch sends when the launcher is gone.
        if self._signum in (0, signal.SIGHUP):
            self._signum, self._signalled_at = signum, now
            if dist.get_rank() == 0:
                say(f"{name}: finishing this step, then saving; a second signal ends the run at once")
        elif signum == signal.SIGHUP or (signum == signal.SIGTERM and sender in (os.getpid(), *self._launchers)):
            return
        elif now - self._signalled_at > SAME_REQUEST_SECONDS:
            say(f"rank {dist.get_rank()}: a second signal, {name}: ended at once")
            os._exit(128 + signum)

    def _outlive(self, launcher: int) -> None:
        """Kill the launcher, before it kills this rank, if the current step takes that long."""

        def end() -> None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._launchers[launcher], signal.SIGKILL)

        self._outliving = threading.Timer(LAUNCHER_LIVES_SECONDS, end)
        self._outliving.daemon = True
        self._outliving.start()
