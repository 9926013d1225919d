"""One process writes to an output folder at a time."""

import fcntl
from pathlib import Path
from typing import IO

LOCK = ".lock"


def lock(output: Path, argument: str = "--output") -> IO[str]:
    """Keep any other run out of ``output`` for as long as this process lives and the file is open.

    ``argument`` is the one of the command line that names the folder, for messages.

    A POSIX lock: it ends with the process, however that ends, and forked loader processes do not inherit it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{argument} {output}: {LOCK}: {error.strerror}; name a folder that can be written") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another run is writing to {output}; wait for it, end it, or name another {argument}"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def is_locked(output: Path) -> bool:
    """Whether another process writes to ``output``."""
    try:
        with (output / LOCK).open("a", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # there is no such folder, or a file system without locks
    return False
