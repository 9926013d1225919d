"""Writes the shards of a pack, one process per shard. A shard with a record is complete and on disk.

The bytes of a shard depend only on the source and on ``Making``, never on which process wrote it or when.
"""

import io
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.transforms.functional import resize

from recipe.config import Section, printable
from recipe.data import UNREADABLE, BadImage, File, Making, decode, describe, sha256_of, shard_name
from recipe.distributed import SIGNALS
from recipe.reporting import Progress

UNFINISHED = ".unfinished"
SMALLEST_SHARD_BYTES = 64 * 2**20
# A rank keeps every shard open, and the default limit is 1,024 open files per process.
MOST_SHARDS = 256
LONGEST_JPEG_PIXELS = 65_500  # libjpeg's limit, slightly below the format's 65,535


class Source(NamedTuple):
    """A file to pack; ``path`` is relative to its part, ``changed_ns`` its modification time."""

    path: str
    label: int
    bytes: int
    changed_ns: int


class Shard(NamedTuple):
    """What one process packs: files of ``root``, starting with image ``first`` of the part."""

    root: Path
    pack: Path
    number: int
    first: int
    sources: Sequence[Source]

    @property
    def record(self) -> Path:
        return self.pack / UNFINISHED / f"{self.root.name}-{self.number:05}.json"


class Packed(NamedTuple):
    """An image as packed: the bytes of an image file, or a .npy file that ends with uint8 pixels (height, width, 3)."""

    content: bytes
    resized: bool = False
    height: int = 0
    width: int = 0

    @property
    def size(self) -> int:
        """The number of bytes that training reads."""
        return 3 * self.height * self.width or len(self.content)


class Record(Section):
    """A complete shard; ``offsets``, ``sizes`` and ``shapes`` have one entry per image."""

    offsets: list[int]
    sizes: list[int]
    shapes: list[tuple[int, int]]  # height and width of raw pixels; 0 for the bytes of an image file
    resized: int
    shard: File
    index: File  # DALI's
    bad_images: list[BadImage]
    kept_images: list[BadImage]


class TooLongError(Exception):
    """A resized image still has a side that is too long for a JPEG."""


def share_out(root: Path, pack: Path, sources: Sequence[Source]) -> list[Shard]:
    """Cut a part into shards of roughly equal size."""
    sizes = [_blocks(source.bytes) + 3 * tarfile.BLOCKSIZE for source in sources]  # two headers, and the label
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


def pack_shards(shards: Sequence[Shard], making: Making, workers: int) -> list[Record]:
    """Write the shards that have no record yet, on ``workers`` processes."""
    # Not fork: this process has threads. The fork server imports torch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(min(workers, len(shards)), context, _end_with_parent)
    try:
        # The processes inherit the mask: a Ctrl-C at the terminal reaches them, too, but they end with this process.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            futures = [executor.submit(_pack_shard, shard, making) for shard in shards]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        images = 0
        with Progress(sum(len(shard.sources) for shard in shards), "images") as progress:
            for number, future in enumerate(as_completed(futures), start=1):
                images += len(future.result().sizes)
                progress.update(images, f"{number:,}/{len(shards):,} shards", f"{progress.speed:,.0f} images/s")
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise ValueError("a packing process was killed (out of memory?); the same command resumes") from None
    except BaseException:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Make a packing process exit with the main process, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pack_shard(shard: Shard, making: Making) -> Record:
    try:  # the record of an earlier launch, if its files are still what was written
        record = Record.model_validate_json(shard.record.read_bytes())
        folder = shard.pack / shard.root.name
        if all(sha256_of(folder / file.file) == file.sha256 for file in (record.shard, record.index)):
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
                # A bad image keeps its place, so that an index refers to the same image as in the folder.
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
    """Return an image as it is packed: its own bytes, a smaller JPEG, or its pixels."""
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
    """Write a file under the name ``unfinished``, and rename it to ``path`` once it is on disk."""
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _read(path: Path, size: int) -> bytes:
    # A read error is a matter of disks or permissions: packed as a bad image, the file would stay bad forever.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; fix it, and the same command resumes") from None
    if len(content) != size:
        raise ValueError(f"{path}: {len(content):,} bytes, but {size:,} when it was listed; pack a folder at rest")
    return content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file and return the offset of its content; owner, time and mode are ``TarInfo``'s constants."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    return archive.offset - _blocks(len(content))


def _blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
