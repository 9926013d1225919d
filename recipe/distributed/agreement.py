"""What ranks agree on between two optimizer steps: to end, because of a signal, or to write a checkpoint.

A signal lets the current step finish and be saved; a second one ends the process at once. It may reach one rank only,
and the ranks' clocks differ, so that they agree after each step.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from recipe.distributed.signals import SIGNALS, Interrupted, heeded, let_go_of_the_terminal, say

# Ctrl-C reaches a rank twice: from the terminal, and by the launcher, which passes it on at once.
SAME_REQUEST_SECONDS = 2.0
_NO_MORE = b"\0"  # no signal's number

T = TypeVar("T")


class Requests:
    """Collects, while training, what a person, a scheduler or the clock asks for.

    Args:
        save_every: The time between two checkpoints, by rank 0's clock; None for none.
        timeout: After which the ranks' agreement fails.
    """

    def __init__(self, save_every: timedelta | None, timeout: timedelta) -> None:
        self._save_every = save_every
        self._saved_at = time.monotonic()
        self._signum = 0
        self._signalled_at = 0.0
        self._handlers: dict[int, Any] = {}
        self._pipe = 0
        # The agreement is the CPU's business: over NCCL it would make each step wait for the device.
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def __enter__(self) -> Self:
        # Python runs a handler when the main thread comes back from C, and that may wait for a rank that is gone. The
        # pipe is written to at once, and a thread of its own reads it.
        listen_to, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._listener = threading.Thread(target=self._listen, args=(listen_to,), daemon=True)
        self._listener.start()
        signal.set_wakeup_fd(self._pipe)
        for signum in heeded():
            self._handlers[signum] = signal.signal(signum, lambda signum, frame: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that has failed says why, and ends; a signal shall not come before that.
        if kind is None or not issubclass(kind, Exception):
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        # Closing alone would not end it: a loader process may hold a copy of the pipe.
        os.write(self._pipe, _NO_MORE)
        os.close(self._pipe)
        # It must not be the last to hold the process group: destroyed by a thread while Python ends, the group aborts
        # the process.
        self._listener.join()

    def agree(self) -> tuple[int, bool]:
        """The signal that any rank got (0: none), and whether rank 0's clock asks for a checkpoint; on all ranks.

        Every rank calls it at the same moments.
        """
        due = self._save_every is not None and time.monotonic() - self._saved_at >= self._save_every.total_seconds()
        if dist.get_world_size() == 1:
            return self._signum, due
        assert isinstance(self._group, dist.ProcessGroup), "every rank is a member"
        asked = torch.tensor([self._signum, int(due and dist.get_rank() == 0)])
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        signum, save = asked.tolist()
        return signum, bool(save)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """Pass ``items`` on; raise ``Interrupted`` on all ranks between two of them once any has got a signal."""
        for item in items:
            yield item
            signum, _ = self.agree()
            if signum:
                raise Interrupted(signum)

    def saved(self) -> None:
        """A checkpoint was written: the clock starts anew."""
        self._saved_at = time.monotonic()

    def _listen(self, listen_to: int) -> None:
        while (number := os.read(listen_to, 1)) != _NO_MORE:
            if number[0] in SIGNALS:  # DataLoader has a handler for SIGCHLD
                self._take(number[0])
        os.close(listen_to)

    def _take(self, signum: int) -> None:
        name, now = signal.Signals(signum).name, time.monotonic()
        if signum == signal.SIGHUP:
            let_go_of_the_terminal()
        # Who loses the terminal loses the launcher with it, and may be told of both: a hangup is no second request.
        if self._signum in (0, signal.SIGHUP):
            self._signum, self._signalled_at = signum, now
            if dist.get_rank() == 0:
                say(f"{name}: this step is finished and saved; a second signal ends the run at once")
        elif signum != signal.SIGHUP and now - self._signalled_at > SAME_REQUEST_SECONDS:
            say(f"rank {dist.get_rank()}: a second signal, {name}: ended at once")
            os._exit(128 + signum)
