"""Makes the shards of a pack, each by one process: a shard that a record speaks of is whole and on the disk.

The bytes of a shard are a function of the source and of ``Making`` alone, never of which process made it or when.
"""

import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms.functional import resize

from recipe.config import printable
from recipe.data import UNREADABLE, Making, TooLargeError, decode, decode_reduced, remedy, sha256_of, shard_name
from recipe.distributed import SIGNALS, heeded

UNFINISHED = ".unfinished"
SMALLEST_SHARD_BYTES = 64 * 2**20
# A rank keeps every shard open, and a process has 1,024 files unless somebody has raised that.
MOST_SHARDS = 256
LONGEST_JPEG_PIXELS = 65_500  # libjpeg's limit, somewhat below the format's 65,535
_LOOK_EVERY_SECONDS = 0.2
_made: Any = None  # in a worker: the images of all workers so far


@dataclass(frozen=True)
class Source:
    """A file to pack: ``path`` relative to its part, ``label`` the number of its class, ``bytes`` its size.

    ``changed_ns`` is its time of change, in nanoseconds.
    """

    path: str
    label: int
    bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Shard:
    """What one process packs: the files of ``root``, the first of which is image ``first`` of the part."""

    root: Path
    pack: Path
    number: int
    first: int
    sources: Sequence[Source]

    @property
    def record(self) -> Path:
        """The file that tells that it is whole."""
        return self.pack / UNFINISHED / f"{self.root.name}-{self.number:05}.json"


@dataclass(frozen=True)
class Record:
    """A shard that is whole: where its images lie in bytes, and its files' sizes and SHA-256.

    ``bad`` has path and problem of each image that could not be decoded, ``kept`` of each that could not be made
    smaller, and is packed as it is.
    """

    offsets: list[int]
    sizes: list[int]
    resized: int
    bad: list[tuple[str, str]]
    kept: list[tuple[str, str]]
    files: list[tuple[str, int, str]]


class TooLongError(Exception):
    """An image, made smaller, has still a side that no JPEG can have."""


def share_out(root: Path, pack: Path, sources: Sequence[Source]) -> list[Shard]:
    """Cut a part into shards of about equally many bytes of the source."""
    sizes = [_in_tar(source.bytes) for source in sources]
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
    """Make what is not made already, on ``workers`` processes; ``show`` hears of images and shards done so far.

    Raises:
        ValueError: a file cannot be read, or changes; a process was killed.
        OSError: the pack cannot be written.
    """
    # Not fork: this process has threads. The server imports torch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    made = context.Value("Q")
    executor = ProcessPoolExecutor(min(workers, len(shards)), context, _begin, (made,))
    try:
        with _signals_wait():
            futures = [executor.submit(_pack_shard, shard, making) for shard in shards]
        done, waiting = set(), set(futures)
        while waiting:
            with _signals_wait():
                over, waiting = wait(waiting, _LOOK_EVERY_SECONDS, FIRST_COMPLETED)
            done |= over
            for future in over:
                future.result()
            show(made.value, len(done))
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise ValueError("a process that packs was killed (out of memory?); the same command goes on") from None
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Put signals off: an exception between the start of a process and the note that it was started would lose it.

    One within ``wait`` would leave locks behind that ``shutdown`` needs.
    """
    came: list[int] = []
    handlers = {signum: signal.signal(signum, lambda signum, frame: came.append(signum)) for signum in heeded()}
    # The processes inherit the mask: a Ctrl-C at the terminal reaches them, too, but it is this one that ends them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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
    record = _read_record(shard)
    if record is None:
        record = _write_shard(shard, making)
    else:
        _count(len(shard.sources))
    return record


def _read_record(shard: Shard) -> Record | None:
    """The record of a shard that an earlier launch has made, if its files are still what was written."""
    try:
        record = Record(**json.loads(shard.record.read_text(encoding="utf-8")))
        folder = shard.pack / shard.root.name
        whole = all(sha256_of(folder / name) == sha256 for name, _, sha256 in record.files)
    except (OSError, ValueError, TypeError):
        return None
    return record if whole else None


def _write_shard(shard: Shard, making: Making) -> Record:
    offsets, sizes, bad, kept, resized = [], [], [], [], 0
    unfinished = shard.record.with_suffix(".tar")
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index, source in enumerate(shard.sources, shard.first):
                original = _read(shard.root / source.path, source.bytes)
                name = printable(os.path.join(shard.root.name, source.path))
                try:
                    image = packed(original, making)
                except UNREADABLE as error:
                    # It keeps its place, so that an index means the same image as in the folder.
                    image = original
                    bad.append((name, printable(f"{error}; {remedy(error)}" if remedy(error) else str(error))))
                except TooLongError as error:
                    image = original
                    kept.append((name, str(error)))
                resized += image is not original
                offsets.append(_add(archive, f"{index:08}.jpg", image))
                sizes.append(len(image))
                _add(archive, f"{index:08}.cls", str(source.label).encode())
                _count(1)
        file.flush()
        os.fsync(file.fileno())
    name = shard_name(shard.number)
    lines = list(_dali_lines(shard, offsets, sizes))
    dali_index = f"v1.2 {len(lines)}\n" + "".join(lines)
    folder = shard.pack / shard.root.name
    os.replace(unfinished, folder / name)
    write_whole(shard.record.with_suffix(".idx"), folder / Path(name).with_suffix(".idx"), dali_index.encode())
    files = [
        (path.name, path.stat().st_size, sha256_of(path))
        for path in (folder / name, folder / Path(name).with_suffix(".idx"))
    ]
    record = Record(offsets, sizes, resized, bad, kept, files)
    write_whole(shard.record.with_suffix(".record"), shard.record, json.dumps(asdict(record)).encode())
    return record


def packed(original: bytes, making: Making) -> bytes:
    """The bytes that stand for an image: its own, or those of a smaller JPEG.

    Raises:
        DecodingError: See ``decode``.
        TooLongError: It cannot be written as a JPEG.
    """
    try:
        pixels = decode(original).pixels
    except TooLargeError:
        if making.short_side == 0:
            raise
        pixels = decode_reduced(original, making.short_side)
    if making.short_side == 0 or min(pixels.shape[:2]) <= making.short_side:
        return original
    smaller = io.BytesIO()
    image = resize(Image.fromarray(pixels.numpy()), making.short_side)
    if max(image.size) > LONGEST_JPEG_PIXELS:
        raise TooLongError(f"{max(image.size):,} pixels are too long for a JPEG")
    image.save(smaller, "JPEG", quality=making.jpeg_quality, subsampling=making.jpeg_subsampling)
    return smaller.getvalue()


def write_whole(unfinished: Path, path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, under the name that it has until then."""
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, size: int) -> bytes:
    # What cannot be read is the disk's trouble or a matter of rights: packed as a bad image it would be one for ever.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; mend it, and the same command goes on") from None
    if len(content) != size:
        raise ValueError(
            f"{path}: {len(content):,} bytes, but {size:,} when it was listed; pack what no longer changes"
        )
    return content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file, and give the offset of its content; owner, time and mode are ``TarInfo``'s constants."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    return archive.offset - _blocks(len(content))


def _dali_lines(shard: Shard, offsets: list[int], sizes: list[int]) -> Iterator[str]:
    for number, (source, offset, size) in enumerate(zip(shard.sources, offsets, sizes, strict=True), shard.first):
        label_offset = offset + _blocks(size) + tarfile.BLOCKSIZE
        label_size = len(str(source.label))
        yield f"jpg {offset} {size} {number:08}.jpg cls {label_offset} {label_size} {number:08}.cls\n"


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _in_tar(size: int) -> int:
    """Bytes that an image of ``size`` bytes takes: two heads, itself, and its label."""
    return _blocks(size) + 3 * tarfile.BLOCKSIZE


def _count(images: int) -> None:
    with _made.get_lock():
        _made.value += images
