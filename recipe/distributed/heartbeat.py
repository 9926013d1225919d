"""Has all ranks end soon after one has failed, and say which was the first, and why.

A rank that fails leaves the others waiting in a collective until a connection breaks or the group's timeout has
passed, and what they then say of it is not what happened. So each rank has a thread that looks every second whether
another one has failed. A rank that raises says so at the store of the meeting; one that merely lost the others finds
out there who does not answer: killed, or on a host that is gone. The thread also ends a rank whose data does not come.
"""

import json
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
from dataclasses import asdict, dataclass
from datetime import timedelta
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
GRACE_SECONDS = 3.0  # in which a rank that lives answers
# Of the timeout after which the other ranks give up: a rank without data shall be the first to speak.
PATIENCE = 0.75
_FAILED, _CAUSE, _SAID = "failed", "cause", "said"  # keys at the store
_TALK_BETWEEN_RANKS = str(Path(dist.__file__ or "").parent)

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What ended a rank, for people: ``text`` is type and message of the exception; ``step`` where, if known."""

    rank: int
    host: str
    step: int | None
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed{_at(self.step)}: {self.text}"


class Watch:
    """While ``with`` lasts: ends this process if another rank fails, and tells the others if this one does.

    An ``Exception`` that leaves the block is printed, and the process ends with ``FAILED``. Where the launcher is
    gone, nobody else ends its ranks: they get SIGTERM. ``step`` is the optimizer step under way, for messages.

    Args:
        meeting: Where the ranks have met.
        timeout: Of the process groups.
        launchers: What started the ranks, as far as it is on this machine: each process with its descriptor of
            ``open_process``.
        known: Exceptions whose message says all that a person needs; others are shown with their traceback.
        log: File for the last word, beside the terminal; None for none.
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
        self._meeting = meeting
        self._patience_seconds = PATIENCE * timeout.total_seconds()
        self._known = known
        self._log = log
        self.launchers = launchers
        self._has_launchers = bool(launchers)
        self._waits_since: float | None = None
        self._own: Failure | None = None
        self._is_cause = False
        self._wake, self._over, self._settled = threading.Event(), threading.Event(), threading.Event()
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
        # The launcher ends the ranks of a host once one of them has ended; this one ends soon, and shall speak first.
        take_by(ignore)
        own = self._failure(f"{type(error).__name__}: {error}")
        if is_cause(error):
            self._is_cause = True
            tell(error, own, self._known)
        self._own = own
        self._wake.set()
        if not self._thread.is_alive():  # training is over, and with it the watch
            say(str(own))
        elif not self._settled.wait(2 * GRACE_SECONDS + LOOK_EVERY_SECONDS) and not self._is_cause:
            # It hangs in a call to the store: the host that holds it is gone, or this one is.
            say(self._silent([0], error))
        end_process()

    def close(self) -> None:
        """Watch no longer: from here on other ranks may leave."""
        self._over.set()
        self._wake.set()
        self._thread.join(GRACE_SECONDS)  # it may hang in a call to a host that is gone

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
        store = None
        try:
            store = self._meet_again() if self._meeting.world_size > 1 else None
            while True:
                self._wake.wait(LOOK_EVERY_SECONDS)
                if self._own is None and self._over.is_set():
                    return
                self._look_at_data()
                self._look_at_launchers()
                if self._own is not None or (store is not None and store.check([_FAILED])):
                    break
            first, speaks = self._settle(store)
        except RuntimeError as error:
            if self._over.is_set():
                return
            first = self._silent([0], error)
            # Rank 0 held the store: nobody is left to speak for all, but one on each host.
            hosts = self._meeting.hosts
            here = [rank for rank, host in enumerate(hosts) if host == hosts[self._meeting.rank]]
            speaks = self._meeting.rank == min(rank for rank in here if rank != 0)
        if speaks:
            self._write_down(first)
            if not (self._is_cause and first == str(self._own)):
                say(first)
        with suppress(RuntimeError):  # it may be gone with rank 0
            self._leave(store)
        self._settled.set()
        end_process()

    def _write_down(self, last_word: str) -> None:
        if self._log is not None:
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:  # the disk may be what failed
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(last_word)}\n")

    def _leave(self, store: Store | None) -> None:
        """Let rank 0 have the last word: the launcher ends it when another rank of its host has ended."""
        if store is not None and self._meeting.rank == 0:
            store.set(_SAID, "")
        elif store is not None:
            _wait(lambda: store.check([_SAID]))

    def _look_at_data(self) -> None:
        since = self._waits_since
        waited = 0.0 if since is None else time.monotonic() - since
        if self._own is None and waited > self._patience_seconds:
            self._own = self._failure(f"TimeoutError: no images have come from the data for {waited:.0f} s")
            self._is_cause = True
            say(str(self._own))

    def _look_at_launchers(self) -> None:
        poll = select.poll()
        for pidfd in self.launchers.values():
            poll.register(pidfd, select.POLLIN)
        if self._has_launchers and poll.poll(0):
            self._has_launchers = False
            say(f"rank {self._meeting.rank}: the launcher is gone")
            os.kill(os.getpid(), signal.SIGTERM)

    def _meet_again(self) -> Store:
        # A connection of the thread's own: on the main thread's a call may wait for another rank.
        store = open_store(timedelta(seconds=GRACE_SECONDS), holds_it=False)
        return PrefixStore(f"watch/{self._meeting.name}", store)

    def _settle(self, store: Store | None) -> tuple[str, bool]:
        """Tell the others that this rank ends; give what was the first failure, and whether to speak for all."""
        if store is None:
            return str(self._own), True
        rank, ranks = self._meeting.rank, range(self._meeting.world_size)
        if self._is_cause:
            assert self._own is not None
            store.compare_set(_CAUSE, "", json.dumps(asdict(self._own)))
        store.set(f"heard/{rank}", "")
        store.set(_FAILED, "")
        all_heard = [f"heard/{other}" for other in ranks]
        # Rank 0 may hold the store, which goes with it.
        _wait(lambda: store.check(all_heard) or (rank != 0 and store.check([_CAUSE])))
        silent = [other for other in ranks if not store.check([f"heard/{other}"])]
        speaks = rank == 0
        if store.check([_CAUSE]):
            first = str(Failure(**json.loads(store.get(_CAUSE))))
        else:
            first = self._silent(silent, None) if silent else str(self._own or "a rank lost the others")
            speaks = rank == min(set(ranks) - set(silent))
        store.set(f"read/{rank}", "")
        if rank == 0:
            _wait(lambda: store.check([f"read/{other}" for other in ranks if other not in silent]))
        return first, speaks

    def _silent(self, ranks: list[int], error: Exception | None) -> str:
        seen = self._own.text if self._own is not None else f"{type(error).__name__}: {error}" if error else ""
        return (
            f"{name_ranks(ranks, self._meeting.hosts)} ended without a word{_at(self.step)}: killed (out of memory?), "
            f"or the host is gone or cut off{seen and f'; rank {self._meeting.rank} saw {_essence(seen)}'}"
        )

    def _failure(self, text: str) -> Failure:
        return Failure(self._meeting.rank, self._meeting.hosts[self._meeting.rank], self.step, printable(text))


def is_cause(error: BaseException) -> bool:
    """Whether an exception says what happened, and not merely that other ranks are gone."""
    frames = traceback.extract_tb(error.__traceback__)
    is_talk = bool(frames) and frames[-1].filename.startswith(_TALK_BETWEEN_RANKS)
    # Where something is waited for that was begun before, as under ZeRO, the place tells nothing, but the words do.
    return not isinstance(error, DistError) and not is_talk and "/gloo/transport/" not in str(error)


def tell(error: Exception, failure: Failure, known: tuple[type[Exception], ...]) -> None:
    """Print a failure, with its traceback unless the message alone says what to do."""
    if not isinstance(error, known):
        traceback.print_exception(error)
    say(str(failure))


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


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _essence(text: str) -> str:
    """gloo's messages without the place in its source and without consolation."""
    return re.sub(r"\[/\S+\] ", "", text).partition("\n")[0].partition(". ")[0]
