"""A lock that lets only one process at a time write to an output folder."""

import fcntl
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Self

LOCK = ".lock"


@dataclass(frozen=True)
class Lock:
    """A lock on an output folder, held until it is closed or the process ends."""

    file: IO[str]
    created: tuple[Path, ...]
    """the folders that were created for it, innermost first"""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def lock(output: Path, argument: str = "--output", subfolder: str = "") -> Lock:
    """Create the folder ``output``, given as ``argument``, with a subfolder if named, and lock it.

    This is a POSIX lock: it ends with the process, however that ends, and forked loader processes do not inherit it.

    Raises:
        ValueError: another run is writing to the folder, or it cannot be created or written to.
    """
    path, folder = output / LOCK, output / subfolder
    created = tuple(takewhile(lambda missing: not os.path.lexists(missing), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        blocked = Path(error.filename)
        in_the_way = next(existing for existing in (blocked, *blocked.parents) if os.path.lexists(existing))
        problem = f"cannot write to {in_the_way} ({error.strerror}); name another folder"
        if in_the_way != path and not in_the_way.is_dir():
            problem = f"{in_the_way} is not a folder; remove it, or name another folder"
        _remove_empty(created)
        raise ValueError(f"{argument} {output}: {problem}") from None
    if not _acquire(file) or not _is_at(path, file):
        file.close()
        _remove_empty(created)
        raise ValueError(f"another run is writing to {output}; wait for it, end it, or name another {argument}")
    return Lock(file, created)


def unlock(lock: Lock | None) -> None:
    """Release the lock of a run that does not start after all, and remove what was created for it."""
    if lock is not None:
        Path(lock.file.name).unlink(missing_ok=True)
        lock.file.close()
        _remove_empty(lock.created)


def is_locked(output: Path) -> bool:
    """Whether another process is writing to ``output``; asks only, so that a run that starts now finds it free."""
    whole_file = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
    try:
        with (output / LOCK).open("rb") as file:
            obstacle = fcntl.fcntl(file, fcntl.F_GETLK, whole_file)
    except OSError:
        return False
    return bool(struct.unpack_from("h", obstacle)[0] != fcntl.F_UNLCK)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it may have been put to use meanwhile
            folder.rmdir()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether ``file`` is still at ``path``: a run that was refused may have removed it before it was locked here."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _acquire(file: IO[str]) -> bool:
    """Take the lock unless another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # the file system has no locks
    return True
