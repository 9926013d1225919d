"""Whether every byte of a pack is what was written, and its header that of its index."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipe.data import File, damage, open_index, read_header, sha256_of
from recipe.distributed import Interrupted
from recipe.reporting import Progress

WHOLE, DAMAGED = 0, 1


def verify(destination: Path) -> int:
    """Compare every byte of a pack with what was written, and the header with the index; return the exit code.

    Raises:
        ValueError: there is no pack, or its header cannot be read.
    """
    header = read_header(destination)
    files = [(destination / part.folder / file.file, file) for part in header.parts for file in part.shards]
    files += [(destination / part.folder / file.file, file) for part in header.parts for file in part.indices]
    damaged = 0
    with Progress(sum(file.bytes for _, file in files)) as progress:

        def look(path: Path, file: File) -> str | None:
            problem = damage(path, file)
            if problem is None and sha256_of(path, progress.add) != file.sha256:
                problem = "another SHA-256 than was written"
            return problem

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            try:
                problems = list(threads.map(lambda pair: look(*pair), files))
            except Interrupted:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
    for (path, _), problem in zip(files, problems, strict=True):
        if problem is not None:
            damaged += 1
            print(f"damaged: {path}: {problem}")
    if damaged:
        print(f"{destination}: {damaged} of {len(files)} files are damaged; copy them again, or make the pack anew")
        return DAMAGED
    try:
        for part in header.parts:
            open_index(destination, header, part)
    except ValueError as error:
        print(f"damaged: {error}")
        return DAMAGED
    print(f"{destination}: {len(files)} files, whole")
    return WHOLE
