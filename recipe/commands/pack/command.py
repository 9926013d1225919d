"""``python -m recipe pack``: an ImageFolder in a few large files, from which any image is one read.

The same command, launched again, resumes where it was ended. What lies under the names of a pack is whole: shards come
one by one, ``pack.json`` last.
"""

import argparse
import hashlib
import io
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt
import PIL

from recipe.checkpoints import LOCK, lock
from recipe.commands.pack.shards import UNFINISHED, Record, Source, pack_shards, share_out, write_whole
from recipe.config import parse_json, printable, read_text, validate
from recipe.data import (
    HEADER,
    IMAGE,
    IMAGES,
    NAMES,
    RAW_IMAGE,
    FolderIndex,
    Header,
    Making,
    Part,
    damage,
    describe,
    list_imagefolder,
    open_index,
    read_header,
)
from recipe.distributed import Interrupted, heeded, outlive_readers, say
from recipe.reporting import Parser, Progress

COMPLETE, DAMAGED, REFUSED = 0, 1, 2
MAKING = "making.json"
BAD_IMAGES_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    """Pack, or verify; return 0, 1 for a damaged pack, 2 for what is refused or cannot be written, 128 + signal."""
    outlive_readers()
    arguments = _parse(argv)
    with _interruptible():
        try:
            if arguments.verify is not None:
                return verify(arguments.verify)
            return pack(arguments.source, arguments.destination, arguments.short_side or 0, raw=arguments.raw)
        except OSError as error:
            where = arguments.destination or arguments.verify
            say(f"{where}: {error.strerror or error}; mend that, and the same command resumes")
            return REFUSED
        except ValueError as refusal:
            say(str(refusal))
            return REFUSED
        except Interrupted as interruption:
            say(f"ended by {interruption}; the same command resumes")
            return interruption.exit_code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m recipe pack",
        usage="python -m recipe pack SRC DST [--short-side PIXELS [--raw]]\n       python -m recipe pack --verify DST",
        description="Pack a folder of images into a few large files that are read at random, or verify such a pack.",
    )
    parser.add_argument("source", type=Path, nargs="?", metavar="SRC", help="folder with train/, and val/ or test/")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder of the pack; new or empty")
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="resize larger images to this short side (default: 0, every image as it is)",
    )
    parser.add_argument("--raw", action="store_true", help="write pixels, which take more room and no time to decode")
    parser.add_argument("--verify", type=Path, metavar="DST", help="compare every byte of a pack with its SHA-256")
    arguments = parser.parse_args(argv)
    given = [arguments.source, arguments.destination]
    if (
        (None in given)
        if arguments.verify is None
        else any(x is not None for x in [*given, arguments.short_side, arguments.raw or None])
    ):
        parser.error("name SRC and DST, or --verify and DST alone")
    if arguments.short_side and arguments.short_side < 8:
        parser.error(f"argument --short-side: {arguments.short_side} pixels; 0, or 8 and more")
    if arguments.raw and not arguments.short_side:
        parser.error("--raw needs --short-side PIXELS")
    return arguments


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have the first signal raise ``Interrupted``; the process ends with it, and later ones change nothing."""
    came: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        if len(came) == 1:
            raise Interrupted(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in heeded()}
    yield
    if not came:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def pack(source: Path, destination: Path, short_side: int, workers: int | None = None, *, raw: bool = False) -> int:
    """Pack an ImageFolder on ``workers`` processes, by default one per core; return the exit code.

    Larger images are resized to ``short_side`` pixels, 0 for none; ``raw`` writes pixels in the place of image files.
    """
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"DST {destination} lies in SRC {source}; name a folder outside of it")
    begun = destination / UNFINISHED / MAKING
    if destination.is_dir() and not (destination / HEADER).is_file() and not begun.is_file():
        others = sorted(path.name for path in destination.iterdir() if path.name not in (LOCK, UNFINISHED))
        if others:
            raise ValueError(
                f"DST {destination} holds {', '.join(others[:5])}, and no pack; name a new or empty folder"
            )
    folders = list_imagefolder(source)
    parts = [(Path(folder.root), _sources(folder)) for folder in folders]
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, folders[0].classes)))
    for root, sources in parts:
        for file in sources:
            digest.update(
                b"\0%b\0%d\0%d" % (os.fsencode(os.path.join(root.name, file.path)), file.bytes, file.changed_ns)
            )
    making = Making(short_side=short_side, raw=raw, pillow=PIL.__version__, source_sha256=digest.hexdigest())
    with lock(destination, "DST"):
        if (destination / HEADER).is_file():
            _compare(destination, read_header(destination).making, making)
            shutil.rmtree(destination / UNFINISHED, ignore_errors=True)
            print(printable(f"{destination} is complete already; python -m recipe pack --verify looks at every byte"))
            return COMPLETE
        if begun.is_file():
            earlier = validate(Making, parse_json(read_text(begun, MAKING), str(begun)), str(begun), "")
            _compare(destination, earlier, making)
        else:
            begun.parent.mkdir(exist_ok=True)
            write_whole(begun.with_suffix(".new"), begun, making.model_dump_json().encode())
        workers = workers or len(os.sched_getaffinity(0))
        train, validation = _make_parts(destination, making, parts, workers)
        classes = tuple(map(printable, folders[0].classes))
        header = Header(making=making, classes=classes, train=train, validation=validation)
        text = header.model_dump_json(indent=1) + "\n"
        write_whole(destination / UNFINISHED / HEADER, destination / HEADER, text.encode())
        shutil.rmtree(destination / UNFINISHED)
    _report(destination, header)
    return COMPLETE


def _sources(folder: FolderIndex) -> list[Source]:
    prefix, sources = os.path.join(folder.root, ""), []
    for index, label in enumerate(folder.labels.tolist()):
        path = folder.path(index)
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; mend or remove it") from None
        sources.append(Source(path.removeprefix(prefix), label, status.st_size, status.st_mtime_ns))
    return sources


def _compare(destination: Path, begun: Making, making: Making) -> None:
    old, new = begun.model_dump(), making.model_dump()
    for key in old:  # the source's comes last
        if old[key] != new[key]:
            what = f"with {key} {old[key]}, not {new[key]}; "
            if key == "source_sha256":
                what = "of other files than are in SRC now: names, sizes or times of change differ; restore them, "
            raise ValueError(f"{destination} is a pack {what}name another DST, or remove this one")


def _make_parts(
    destination: Path, making: Making, parts: Sequence[tuple[Path, Sequence[Source]]], workers: int
) -> Iterator[Part]:
    """Write what is not written yet of shards and index; yield what the header says of each part."""
    shards = [shard for root, sources in parts for shard in share_out(root, destination, sources)]
    for root, _ in parts:
        (destination / root.name).mkdir(exist_ok=True)
    with Progress(sum(len(sources) for _, sources in parts), "images") as progress:

        def show(done: int, shards_done: int) -> None:
            progress.update(done, f"{shards_done:,}/{len(shards):,} shards", f"{progress.speed:,.0f} images/s")

        records = pack_shards(shards, making, workers, show)
    for root, sources in parts:
        of_part = [record for shard, record in zip(shards, records, strict=True) if shard.root == root]
        yield _index(destination, root, sources, of_part, RAW_IMAGE if making.raw else IMAGE)


def _index(
    destination: Path, root: Path, sources: Sequence[Source], records: Sequence[Record], dtype: np.dtype
) -> Part:
    """Write the arrays of a part, and return what the header says of it."""
    names = [os.fsencode(source.path) for source in sources]
    images = np.empty(len(sources), dtype)
    images["offset"] = [offset for record in records for offset in record.offsets]
    images["bytes"] = [size for record in records for size in record.sizes]
    images["shard"] = [number for number, record in enumerate(records) for _ in record.sizes]
    images["label"] = [source.label for source in sources]
    images["name_end"] = np.cumsum([len(name) for name in names])
    if dtype == RAW_IMAGE:
        images["height"], images["width"] = zip(*(shape for record in records for shape in record.shapes), strict=True)
    arrays: dict[str, npt.NDArray] = {IMAGES: images, NAMES: np.frombuffer(b"".join(names), np.uint8)}
    for name, array in arrays.items():
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        write_whole(destination / UNFINISHED / name, destination / root.name / name, content.getvalue())
    return Part(
        folder=root.name,
        images=len(sources),
        resized=sum(record.resized for record in records),
        shards=tuple(record.shard for record in records),
        indices=(*(describe(destination / root.name / name) for name in arrays), *(record.index for record in records)),
        bad_images=tuple(image for record in records for image in record.bad_images),
        kept_images=tuple(image for record in records for image in record.kept_images),
    )


def _report(destination: Path, header: Header) -> None:
    bad = [image for part in header.parts for image in part.bad_images]
    for image in bad[:BAD_IMAGES_SHOWN]:
        print(f"bad image: {image.name}: {image.problem}")
    if len(bad) > BAD_IMAGES_SHOWN:
        print(f"… and {len(bad) - BAD_IMAGES_SHOWN:,} more; all stand in {destination / HEADER}")
    for image in [image for part in header.parts for image in part.kept_images][:BAD_IMAGES_SHOWN]:
        print(f"kept as it is: {image.name}: {image.problem}")
    size = sum(shard.bytes for part in header.parts for shard in part.shards)
    text = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
    where = printable(str(destination))
    print(
        f"{where}: {header.train.images:,} training images, {header.validation.images:,} for validation, "
        f"{len(header.classes):,} classes, {len(header.train.shards) + len(header.validation.shards)} shards, "
        f"{text}; {header.train.resized + header.validation.resized:,} images resized, {len(bad):,} bad"
    )
    short_side = f'"pack_short_side": {header.making.short_side}, ' if header.making.short_side else ""
    raw = '"pack_raw": true, ' if header.making.raw else ""
    print(f'to train from it: "source": "pack", {short_side}{raw}and --data {where}')


def verify(destination: Path) -> int:
    """Compare every byte of a pack with what was written, and the header with the index; return the exit code."""
    header = read_header(destination)
    files = [
        (destination / part.folder / file.file, file) for part in header.parts for file in part.shards + part.indices
    ]
    with (
        Progress(sum(file.bytes for _, file in files)) as progress,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        problems = []
        for (path, file), problem in zip(
            files, threads.map(lambda pair: damage(pair[0], pair[1], every_byte=True), files), strict=True
        ):
            progress.add(file.bytes)
            problems += [f"{path}: {problem}"] if problem else []
    for problem in problems:
        print(f"damaged: {problem}")
    if problems:
        print(
            f"{destination}: {len(problems)} of {len(files)} files are damaged; copy them again, or make the pack anew"
        )
        return DAMAGED
    try:
        for part in header.parts:
            open_index(destination, header, part)
    except ValueError as error:
        print(f"damaged: {error}")
        return DAMAGED
    print(f"{destination}: {len(files)} files, whole")
    return COMPLETE
