"""Ends all ranks soon after one has failed, and reports which failed first and why.

Otherwise the others wait in a collective until a connection breaks or the group's timeout has passed, and what they
then report is not what happened. A thread per rank checks every second whether another one has failed: one that raises
writes the cause to the rendezvous store; one that was killed, or whose host is gone, is the one that does not answer
there. One rank reports: the first that raised, else the lowest that is left. The thread also ends a rank whose data
does not come.
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
GRACE_SECONDS = 3.0  # within which a live rank answers
# Share of the timeout after which the other ranks give up: a rank without data must be the first to report.
PATIENCE = 0.75
_FAILED, _CAUSE = "failed", "cause"  # keys at the store
_TALK_BETWEEN_RANKS = str(Path(dist.__file__ or "").parent)

T = TypeVar("T")


class Watch:
    """While ``with`` lasts: ends this process if another rank fails, and tells the others if this one does.

    An ``Exception`` that leaves the block is printed, and the process ends with ``FAILED``. Where the launcher is
    gone, nobody else ends its ranks: they receive SIGTERM. ``step`` is the optimizer step under way, for messages.

    Args:
        meeting: The rendezvous of the ranks.
        timeout: The timeout of the process groups.
        launchers: The processes on this machine that started the ranks, each with its descriptor of ``open_process``.
        known: Exceptions whose message says all that a user needs; others are shown with their traceback.
        log: File to which rank 0 adds what failed first.
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
        self._error = ""  # type and message of what ends this rank
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
        # The launcher ends the ranks of a host once one of them has ended; this one ends soon, and must report first.
        take_by(ignore)
        self._is_cause = is_cause(error)
        if self._is_cause and not isinstance(error, self._known):
            traceback.print_exception(error)
        is_over = not self._thread.is_alive()  # training is, and with it the watch
        self._error = f"{type(error).__name__}: {error}"
        self._wake.set()
        # The thread reports and ends the process, but a call to the store may hang: the host that holds it is gone, or
        # this one is, or it is merely busy. Only this rank knows the cause, and others that are not in a collective
        # wait for no one: it must be reported.
        self._thread.join(self._timeout_seconds if self._is_cause else 2 * GRACE_SECONDS + LOOK_EVERY_SECONDS)
        say(self._failure(self._error) if self._is_cause or is_over else self._silent([0], self._error))
        end_process()

    def close(self) -> None:
        """Stop watching: from here on other ranks may leave."""
        self._over.set()
        self._wake.set()
        self._thread.join(GRACE_SECONDS)  # it may hang in a call to a host that is gone

    def leave_process_group(self) -> None:
        """End together: a rank that leaves early makes gloo abort the others."""
        dist.barrier()  # until the last rank has come here, a failure is reported
        self.close()
        dist.barrier()
        dist.destroy_process_group()

    def awaited(self, items: Iterable[T]) -> Iterator[T]:
        """Pass ``items`` on; one that does not come ends the process before the other ranks' timeout does."""
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
        """The thread; all calls to the store are its own."""
        rank, hosts = self._meeting.rank, self._meeting.hosts
        store: Store | None = None
        launcher_ended = select.poll()
        for process in self.launchers.values():
            launcher_ended.register(process, select.POLLIN)
        try:
            if len(hosts) > 1:
                # A connection of its own: on the main thread's a call may wait for another rank.
                # A busy host may be slow to connect at first; a store that has answered before is given less time.
                store = open_store(timedelta(seconds=self._timeout_seconds), holds_it=False)
                store.set_timeout(timedelta(seconds=GRACE_SECONDS))
                store = PrefixStore(f"watch/{self._meeting.name}", store)
            while not self._error and not (store is not None and store.check([_FAILED])):
                self._wake.wait(LOOK_EVERY_SECONDS)
                if not self._error and self._over.is_set():
                    return
                self._look_at_data()
                if launcher_ended.poll(0):
                    launcher_ended = select.poll()  # of nothing: it is reported once
                    say(f"rank {rank}: the launcher is gone")
                    os.kill(os.getpid(), signal.SIGTERM)
            take_by(ignore)
            first, speaks = (self._failure(self._error), True) if store is None else self._settle(store)
        except RuntimeError as error:
            if self._over.is_set():
                return
            # Rank 0 held the store: the cause is reported by who knows it, what became of rank 0 once per host.
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
            with suppress(RuntimeError):  # it has gone with rank 0
                # All end together: the launcher ends those of its host once one of them has ended.
                store.set(f"read/{rank}", "")
                _wait(partial(store.check, [f"read/{other}" for other in range(len(hosts))]))
        end_process()

    def _look_at_data(self) -> None:
        since = self._waits_since
        waited = 0.0 if since is None else time.monotonic() - since
        if not self._error and waited > PATIENCE * self._timeout_seconds:
            self._is_cause = True
            self._error = f"TimeoutError: no images have come from the data for {waited:.0f} s"

    def _settle(self, store: Store) -> tuple[str, bool]:
        """Tell the others that this rank ends; return the first failure, and whether this rank reports it."""
        rank, ranks = self._meeting.rank, range(self._meeting.world_size)
        own = self._failure(self._error) if self._error else "a rank lost the others"
        if self._is_cause:
            store.compare_set(_CAUSE, "", own)
        store.set(f"heard/{rank}", "")
        store.set(_FAILED, "")
        _wait(lambda: store.check([_CAUSE]) or store.check([f"heard/{other}" for other in ranks]))
        if store.check([_CAUSE]):
            first = store.get(_CAUSE).decode()
            return first, self._is_cause and first == own
        silent = [other for other in ranks if not store.check([f"heard/{other}"])]
        return self._silent(silent, self._error) if silent else own, rank == min(set(ranks) - set(silent))

    def _silent(self, ranks: list[int], seen: str) -> str:
        # gloo's messages without the place in its source and without consolation.
        seen = re.sub(r"\[/\S+\] ", "", seen).partition("\n")[0].partition(". ")[0]
        return (
            f"{name_ranks(ranks, self._meeting.hosts)} ended without a word{self._at_step()}: killed (out of memory?), "
            f"or the host is gone or cut off{seen and f'; rank {self._meeting.rank} saw {seen}'}"
        )

    def _failure(self, text: str) -> str:
        return f"{name_ranks([self._meeting.rank], self._meeting.hosts)} failed{self._at_step()}: {printable(text)}"

    def _at_step(self) -> str:
        return "" if self.step is None else f" at step {self.step}"


def is_cause(error: BaseException) -> bool:
    """Whether an exception says what happened, and not merely that other ranks are gone."""
    frames = traceback.extract_tb(error.__traceback__)
    is_talk = bool(frames) and frames[-1].filename.startswith(_TALK_BETWEEN_RANKS)
    # Where a collective was begun earlier, as under ZeRO, the place tells nothing, but the words do.
    return not isinstance(error, DistError) and not is_talk and "/gloo/transport/" not in str(error)


def end_process() -> NoReturn:
    """End at once: Python's own end would wait for loader processes and destroy groups that are broken."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and not until():
        time.sleep(0.1)
