"""One process writes to an output folder at a time."""

import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from recipe.checkpoints.manifest import CHECKPOINTS

LOCK = ".lock"


def lock(output: Path, argument: str = "--output") -> IO[str]:
    """Keep other runs out of ``output``, which ``argument`` names, while this process lives and the file is open.

    A POSIX lock: it ends with the process, however that ends, and forked loader processes do not inherit it.
    """
    make_folder(output, argument)
    path = output / LOCK
    while True:
        try:
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            in_the_way = path if os.path.lexists(path) else output
            raise ValueError(
                f"{argument} {output}: {in_the_way}: {error.strerror}; name a folder that can be written"
            ) from None
        is_ours = _acquire(file)
        with suppress(FileNotFoundError):  # a run that was refused has removed it in between
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                if is_ours:
                    return file
                file.close()
                raise ValueError(f"another run is writing to {output}; wait for it, end it, or name another {argument}")
        file.close()


def is_locked(output: Path) -> bool:
    """Whether another process writes to ``output``."""
    try:
        with (output / LOCK).open("r+", encoding="utf-8") as file:
            return not _acquire(file)
    except OSError:
        return False


def _acquire(file: IO[str]) -> bool:
    """Take the lock, unless another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def make_folder(folder: Path, argument: str = "--output") -> list[Path]:
    """Make a folder, and those above it that are missing; return what was made, the innermost first.

    Raises:
        ValueError: it cannot be made; the message names the path that is in the way.
    """
    missing = []
    for there in (folder, *folder.parents):
        if os.path.lexists(there):
            break
        missing.append(there)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if os.path.isdir(there):
            problem, remedy = f"no folder can be made in {there} ({error.strerror})", "name one that can be written"
        else:
            problem, remedy = f"{there} is no folder", "remove it, or name another"
        raise ValueError(f"{argument} {folder}: {problem}; {remedy}") from None
    return missing


def claim(output: Path) -> ExitStack:
    """Make the folder ``output`` and lock it; what is returned takes both back, as far as they are new and empty.

    Raises:
        ValueError: another run writes to it, or it cannot be made.
    """
    with ExitStack() as undone:
        undone.callback(_remove_empty, make_folder(output))
        is_new = not (output / LOCK).exists()
        undone.enter_context(lock(output))
        if is_new:
            undone.callback((output / LOCK).unlink, missing_ok=True)
        undone.callback(_remove_empty, make_folder(output / CHECKPOINTS))
        return undone.pop_all()


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
