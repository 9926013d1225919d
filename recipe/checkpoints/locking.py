"""A lock that lets only one process at a time write to an output folder."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"


def lock(output: Path, argument: str = "--output") -> IO[str]:
    """Create the folder ``output``, given as ``argument``, and lock it for as long as the returned file is open.

    This is a POSIX lock: it ends with the process, however that ends, and forked loader processes do not inherit it.

    Raises:
        ValueError: another run is writing to the folder, or it cannot be created or written to.
    """
    path = output / LOCK
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        in_the_way = next(existing for existing in (path, *path.parents) if os.path.lexists(existing))
        raise ValueError(
            f"{argument} {output}: cannot write to {in_the_way} ({error.strerror}); name another folder"
        ) from None
    if not _acquire(file) or not _is_at(path, file):
        file.close()
        raise ValueError(f"another run is writing to {output}; wait for it, end it, or name another {argument}")
    return file


def unlock(output: Path, file: IO[str] | None) -> None:
    """Remove the lock of a run that does not start after all, and the folder if it is empty; None: there is no lock."""
    if file is not None:
        (output / LOCK).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):
            output.rmdir()


def is_locked(output: Path) -> bool:
    """Whether another process is writing to ``output``."""
    try:
        with (output / LOCK).open("r+", encoding="utf-8") as file:
            return not _acquire(file)
    except OSError:
        return False


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
