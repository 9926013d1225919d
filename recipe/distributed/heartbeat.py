"""Ends all ranks soon after one has failed, and reports which failed first and why.

Without it, the others wait in a collective until a connection breaks or the group times out, and then report that
instead of the cause. A thread per rank checks every second whether another rank has failed. A rank that raises writes
the cause to the rendezvous store; a rank that was killed, or whose host is gone, does not answer there. One rank
reports: the first that raised, or else the lowest one left. The thread also ends a rank whose data loader hangs.
"""

import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TypeVar

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store

from recipe.config import printable
from recipe.distributed.rendezvous import Meeting, name_ranks, open_store
from recipe.distributed.signals import ignore, say, take_by

FAILED = 1
LOOK_EVERY_SECONDS = 1.0
GRACE_SECONDS = 3.0  # a live rank answers within this time
# Share of the group's timeout that a rank waits for data, so that it reports before the others time out.
PATIENCE = 0.75
_FAILED, _CAUSE, _SYMPTOM = "failed", "cause", "symptom"  # keys in the store
_TORCH_DISTRIBUTED = str(Path(dist.__file__ or "").parent)

T = TypeVar("T")


class Watch:
    """A context manager that ends this process if another rank fails, and notifies the others if this one does.

    An ``Exception`` that leaves the block is printed, and the process exits with ``FAILED``. If the launcher is gone,
    this rank sends itself SIGTERM. ``step`` is the current optimizer step, for messages.

    Args:
        meeting: The rendezvous of the ranks.
        timeout: The timeout of the process groups.
        launchers: The processes on this machine that started this rank, each with its ``open_process`` descriptor.
        known: Exceptions whose message is enough for a user; others are shown with their traceback.
        log: The file to which the first failure is appended.
    """

    def __init__(
        self,
        meeting: Meeting,
        timeout: timedelta,
        launchers: Mapping[int, int],
        known: tuple[type[Exception], ...],
        log: Path | None = None,
    ) -> None:
        self.step: int | None = None
        self.launchers = launchers
        self._meeting = meeting
        self._timeout_seconds = timeout.total_seconds()
        self._known = known
        self._log = log
        self._waits_since: float | None = None
        self._error = ""  # type and message of the exception that ends this rank
        self._is_cause = False
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):
            self.close()
            return
        # The launcher ends a host's ranks once one of them has ended; this one ends soon, and must report first.
        take_by(ignore)
        self._is_cause = is_cause(error)
        if self._is_cause and not isinstance(error, self._known):
            traceback.print_exception(error)
        is_over = not self._thread.is_alive()  # training is over, and the watch is closed
        self._error = f"{type(error).__name__}: {error}"
        self._wake.set()
        # The thread reports and ends the process, unless a call to the store hangs because a host is gone or busy. If
        # only this rank knows the cause, it waits longer: ranks outside a collective learn it in no other way.
        self._thread.join(self._timeout_seconds if self._is_cause else 2 * GRACE_SECONDS + LOOK_EVERY_SECONDS)
        say(self._failure(self._error) if self._is_cause or is_over else self._silent([0], self._error))
        end_process()

    def close(self) -> None:
        """Stop watching: from now on other ranks may leave."""
        self._over.set()
        self._wake.set()
        self._thread.join(GRACE_SECONDS)  # a call to a host that is gone may hang

    def leave_process_group(self) -> None:
        """Leave together: a rank that leaves early makes gloo abort the others."""
        dist.barrier()  # until the last rank gets here, failures are reported
        self.close()
        dist.barrier()
        dist.destroy_process_group()

    def awaited(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``; if one takes too long, end the process before the other ranks time out."""
        iterator = iter(items)
        while True:
            self._waits_since = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waits_since = None
            yield item

    def _look(self) -> None:
        """Run the thread, which is the only one that calls the store."""
        rank, hosts = self._meeting.rank, self._meeting.hosts
        store: Store | None = None
        launcher_ended = select.poll()
        for process in self.launchers.values():
            launcher_ended.register(process, select.POLLIN)
        try:
            if len(hosts) > 1:
                # The main thread's connection may be waiting for another rank, so this thread opens its own. A busy
                # host may be slow to accept it; later calls get less time.
                store = open_store(timedelta(seconds=self._timeout_seconds), holds_it=False)
                store.set_timeout(timedelta(seconds=GRACE_SECONDS))
                store = PrefixStore(f"watch/{self._meeting.name}", store)
            while not self._error and not (store is not None and store.check([_FAILED])):
                self._wake.wait(LOOK_EVERY_SECONDS)
                if not self._error and self._over.is_set():
                    return
                self._look_at_data()
                if launcher_ended.poll(0):
                    launcher_ended = select.poll()  # polls nothing, so that it is reported once
                    say(f"rank {rank}: the launcher is gone")
                    os.kill(os.getpid(), signal.SIGTERM)
            take_by(ignore)
            first, speaks = (self._failure(self._error), True) if store is None else self._settle(store)
        except RuntimeError as error:
            if self._over.is_set():
                return
            # The store went away with rank 0: a rank that knows the cause reports it, else one rank per host reports
            # that rank 0 is gone.
            here = [other for other, host in enumerate(hosts) if host == hosts[rank] and other != 0]
            speaks = self._is_cause or rank == min(here, default=0)
            own = self._error or f"{type(error).__name__}: {error}"
            first, store = self._failure(own) if self._is_cause else self._silent([0], own), None
        if speaks:
            say(first)
        if self._log is not None and (rank == 0 or (speaks and not self._is_cause)):
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # the disk may be what failed
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(first)}\n")
        if store is not None:
            with suppress(RuntimeError):  # the store has gone with rank 0
                # All end together, because the launcher ends a host's ranks once one of them has ended.
                store.set(f"read/{rank}", "")
                _wait(partial(store.check, [f"read/{other}" for other in range(len(hosts))]))
        end_process()

    def _look_at_data(self) -> None:
        since = self._waits_since
        waited = 0.0 if since is None else time.monotonic() - since
        if not self._error and waited > PATIENCE * self._timeout_seconds:
            self._is_cause = True
            self._error = f"TimeoutError: no images from the data loader for {waited:.0f} s"

    def _settle(self, store: Store) -> tuple[str, bool]:
        """Notify the others that this rank ends; return the first failure, and whether this rank reports it."""
        rank, ranks = self._meeting.rank, range(len(self._meeting.hosts))
        own = self._failure(self._error) if self._is_cause else ""
        if self._is_cause:
            store.compare_set(_CAUSE, "", own)
        elif self._error:
            store.compare_set(_SYMPTOM, "", self._failure(_brief(self._error)))
        store.set(f"heard/{rank}", "")
        store.set(_FAILED, "")
        _wait(lambda: store.check([_CAUSE]) or store.check([f"heard/{other}" for other in ranks]))
        if store.check([_CAUSE]):
            first = store.get(_CAUSE).decode()
            return first, self._is_cause and first == own
        silent = [other for other in ranks if not store.check([f"heard/{other}"])]
        if silent:
            first = self._silent(silent, self._error)
        else:
            symptom = store.get(_SYMPTOM).decode() if store.check([_SYMPTOM]) else "a rank lost the others"
            first = (
                f"{symptom}; all ranks are alive, so one was slow, or cut off for a while: they wait "
                f"{self._timeout_seconds:g} s for each other (recipe.distributed.timeout_seconds)"
            )
        return first, rank == min(set(ranks) - set(silent))

    def _silent(self, ranks: list[int], seen: str) -> str:
        seen = _brief(seen)
        silent = f"{name_ranks(ranks, self._meeting.hosts)} exited without reporting an error{self._at_step()}"
        observed = seen and f"; rank {self._meeting.rank} saw {seen}"
        return f"{silent}: killed (out of memory?), or the host is gone or cut off{observed}"

    def _failure(self, text: str) -> str:
        return f"{name_ranks([self._meeting.rank], self._meeting.hosts)} failed{self._at_step()}: {printable(text)}"

    def _at_step(self) -> str:
        return "" if self.step is None else f" at step {self.step}"


def _brief(error: str) -> str:
    """gloo's message, without the position in its source and the sentences that follow."""
    return re.sub(r"\[/\S+\] ", "", error).partition("\n")[0].partition(". ")[0]


def is_cause(error: BaseException) -> bool:
    """Whether an exception is the cause of a failure, rather than the loss of other ranks."""
    frames = traceback.extract_tb(error.__traceback__)
    is_collective = bool(frames) and frames[-1].filename.startswith(_TORCH_DISTRIBUTED)
    # An asynchronous collective, as under ZeRO, fails elsewhere, but its message shows it.
    return not isinstance(error, DistError) and not is_collective and "/gloo/transport/" not in str(error)


def end_process() -> NoReturn:
    """Exit at once: a normal exit would wait for loader processes and destroy broken process groups."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and not until():
        time.sleep(0.1)
