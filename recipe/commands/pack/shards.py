"""Writes the shards of a pack, each by one process; where there is a record of a shard, it is whole and on the disk.

The bytes of a shard are a function of the source and of ``Making`` alone, never of which process wrote it or when.
"""

import io
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision.transforms.functional import resize

from recipe.config import Section, printable
from recipe.data import UNREADABLE, BadImage, File, Making, decode, describe, sha256_of, shard_name
from recipe.distributed import SIGNALS, Interrupted, heeded

UNFINISHED = ".unfinished"
SMALLEST_SHARD_BYTES = 64 * 2**20
# A rank keeps every shard open, and a process has 1,024 files unless somebody has raised that.
MOST_SHARDS = 256
LONGEST_JPEG_PIXELS = 65_500  # libjpeg's limit, somewhat below the format's 65,535
_made: Any = None  # in a worker: the images of all workers so far


class Source(NamedTuple):
    """A file to pack."""

    path: str
    """relative to its part"""
    label: int
    bytes: int
    changed_ns: int
    """its time of change, in nanoseconds"""


class Shard(NamedTuple):
    """What one process packs: the files of ``root``, the first of which is image ``first`` of the part."""

    root: Path
    pack: Path
    number: int
    first: int
    sources: Sequence[Source]

    @property
    def record(self) -> Path:
        return self.pack / UNFINISHED / f"{self.root.name}-{self.number:05}.json"


class Packed(NamedTuple):
    """What stands for an image: its bytes, or an array file that ends with uint8 pixels (height, width, 3)."""

    content: bytes
    resized: bool = False
    height: int = 0
    width: int = 0

    @property
    def size(self) -> int:
        """Of what is read of it in training, in bytes."""
        return 3 * self.height * self.width or len(self.content)


class Record(Section):
    """A shard that is whole: where its images lie, its files, the images that are bad or could not be made smaller."""

    offsets: list[int]
    """where each image begins in the shard, in bytes"""

    sizes: list[int]
    """the bytes of each image"""

    shapes: list[tuple[int, int]]
    """height and width of the raw pixels of each image; 0 for the bytes of a file"""

    resized: int
    """how many of them were resized"""

    shard: File
    """the tar file"""

    index: File
    """DALI's index of it"""

    bad_images: list[BadImage]
    """images that cannot be decoded"""

    kept_images: list[BadImage]
    """images that could not be made smaller, and are the original bytes"""


class TooLongError(Exception):
    """An image, made smaller, has still a side that no JPEG can have."""


def share_out(root: Path, pack: Path, sources: Sequence[Source]) -> list[Shard]:
    """Cut a part into shards of about equally many bytes of the source."""
    sizes = [_blocks(source.bytes) + 3 * tarfile.BLOCKSIZE for source in sources]  # two heads, and the label
    limit = max(SMALLEST_SHARD_BYTES, -(-sum(sizes) // MOST_SHARDS))
    firsts, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled and filled + size > limit:
            firsts.append(index)
            filled = 0
        filled += size
    ends = [*firsts[1:], len(sources)]
    return [
        Shard(root, pack, number, first, sources[first:end])
        for number, (first, end) in enumerate(zip(firsts, ends, strict=True))
    ]


def pack_shards(
    shards: Sequence[Shard], making: Making, workers: int, show: Callable[[int, int], None]
) -> list[Record]:
    """Write the shards that have no record, on ``workers`` processes; ``show`` takes images and shards done so far."""
    # Not fork: this process has threads. The server imports torch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    made = context.Value("Q")
    with _signals_noted() as came:
        executor = ProcessPoolExecutor(min(workers, len(shards)), context, _begin, (made,))
        try:
            # The processes inherit the mask: a Ctrl-C at the terminal reaches them, too, but this one ends them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                futures = [executor.submit(_pack_shard, shard, making) for shard in shards]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            waiting = set(futures)
            while waiting:
                over, waiting = wait(waiting, 0.2, FIRST_COMPLETED)
                for future in over:
                    future.result()
                if came:
                    raise Interrupted(came[0])
                show(made.value, len(shards) - len(waiting))
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise ValueError("a process that packs was killed (out of memory?); the same command resumes") from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Put signals off: an exception within the executor would lose a process, or leave locks that its end needs."""
    came: list[int] = []
    handlers = {signum: signal.signal(signum, lambda signum, frame: came.append(signum)) for signum in heeded()}
    try:
        yield came
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _begin(made: Any) -> None:
    global _made
    _made = made
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _pack_shard(shard: Shard, making: Making) -> Record:
    try:  # the record of an earlier launch, if its files are still what was written
        record = Record.model_validate_json(shard.record.read_bytes())
        folder = shard.pack / shard.root.name
        if all(sha256_of(folder / file.file) == file.sha256 for file in (record.shard, record.index)):
            _count(len(shard.sources))
            return record
    except (OSError, ValueError):
        pass
    return _write_shard(shard, making)


def _write_shard(shard: Shard, making: Making) -> Record:
    offsets, sizes, shapes, dali_lines, bad, kept, resized = [], [], [], [], [], [], 0
    unfinished = shard.record.with_suffix(".tar")
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, source in enumerate(shard.sources, shard.first):
                # A bad image keeps its place, so that an index means the same image as in the folder.
                image = Packed(_read(shard.root / source.path, source.bytes))
                name = printable(os.path.join(shard.root.name, source.path))
                try:
                    image = packed(image.content, making)
                except UNREADABLE as error:
                    remedy = getattr(error, "remedy", "")
                    bad.append(BadImage(name=name, problem=printable(f"{error}; {remedy}" if remedy else str(error))))
                except TooLongError as error:
                    kept.append(BadImage(name=name, problem=str(error)))
                resized += image.resized
                kind, label = "npy" if image.height else "jpg", str(source.label).encode()
                start, length = _add(archive, f"{number:08}.{kind}", image.content), len(image.content)
                offsets.append(start + length - image.size)
                sizes.append(image.size)
                shapes.append((image.height, image.width))
                label_offset = _add(archive, f"{number:08}.cls", label)
                dali_lines.append(
                    f"{kind} {start} {length} {number:08}.{kind} cls {label_offset} {len(label)} {number:08}.cls\n"
                )
                _count(1)
        file.flush()
        os.fsync(file.fileno())
    path = shard.pack / shard.root.name / shard_name(shard.number)
    os.replace(unfinished, path)
    dali_index = path.with_suffix(".idx")
    write_whole(shard.record.with_suffix(".idx"), dali_index, f"v1.2 {len(sizes)}\n{''.join(dali_lines)}".encode())
    record = Record(
        offsets=offsets,
        sizes=sizes,
        shapes=shapes,
        resized=resized,
        shard=describe(path),
        index=describe(dali_index),
        bad_images=bad,
        kept_images=kept,
    )
    write_whole(shard.record.with_suffix(".record"), shard.record, record.model_dump_json().encode())
    return record


def packed(original: bytes, making: Making) -> Packed:
    """Return what stands for an image: its own bytes, those of a smaller JPEG, or its pixels."""
    pixels = decode(original).pixels
    resized = 0 < making.short_side < min(pixels.shape[:2])
    if not (resized or making.raw):
        return Packed(original)
    image, content = Image.fromarray(pixels.numpy()), io.BytesIO()
    if resized:
        image = resize(image, making.short_side)
    if making.raw:
        np.save(content, np.asarray(image), allow_pickle=False)
        return Packed(content.getvalue(), resized, image.height, image.width)
    if max(image.size) > LONGEST_JPEG_PIXELS:
        raise TooLongError(f"{max(image.size):,} pixels are too long for a JPEG")
    image.save(content, "JPEG", quality=making.jpeg_quality, subsampling=making.jpeg_subsampling)
    return Packed(content.getvalue(), resized)


def write_whole(unfinished: Path, path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, under the name that it has until then."""
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, size: int) -> bytes:
    # What cannot be read is the disk's trouble or a matter of rights: packed as a bad image it would be one for ever.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; mend it, and the same command resumes") from None
    if len(content) != size:
        raise ValueError(
            f"{path}: {len(content):,} bytes, but {size:,} when it was listed; pack what no longer changes"
        )
    return content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file, and return the offset of its content; owner, time and mode are ``TarInfo``'s constants."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    return archive.offset - _blocks(len(content))


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _count(images: int) -> None:
    with _made.get_lock():
        _made.value += images
