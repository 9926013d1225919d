"""``python -m recipe pack``: an ImageFolder in a few large files, from which any image is one read.

The same command, launched again, goes on where it was ended. What lies under the names of a pack is whole: shards come
one by one, ``pack.json`` last.
"""

import argparse
import hashlib
import io
import os
import shutil
import signal
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt
import PIL

from recipe.checkpoints import LOCK, lock
from recipe.commands.pack.shards import UNFINISHED, Record, Source, pack_shards, share_out, write_whole
from recipe.commands.pack.verify import verify
from recipe.config import parse_json, printable, read_text, validate
from recipe.data import (
    HEADER,
    IMAGE,
    IMAGES,
    NAMES,
    BadImage,
    File,
    FolderIndex,
    Header,
    Making,
    Part,
    list_imagefolder,
    read_header,
    sha256_of,
)
from recipe.distributed import Interrupted, heeded, outlive_readers, say
from recipe.reporting import Parser, Progress

COMPLETE, REFUSED = 0, 2
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
            return pack(arguments.source, arguments.destination, arguments.short_side)
        except OSError as error:
            where = arguments.destination or arguments.verify
            say(f"{where}: {error.strerror or error}; mend that, and the same command goes on")
            return REFUSED
        except ValueError as refusal:
            say(str(refusal))
            return REFUSED
        except Interrupted as interruption:
            say(f"ended by {interruption}; the same command goes on")
            return interruption.exit_code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m recipe pack",
        usage="python -m recipe pack SRC DST [--short-side PIXELS]\n       python -m recipe pack --verify DST",
        description="Pack a folder of images into a few large files that are read at random, or verify such a pack.",
    )
    parser.add_argument("source", type=Path, nargs="?", metavar="SRC", help="folder with train/, and val/ or test/")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder of the pack; new or empty")
    parser.add_argument(
        "--short-side",
        type=_pixels,
        metavar="PIXELS",
        help="resize larger images to this short side (default: 0, every image as it is)",
    )
    parser.add_argument("--verify", type=Path, metavar="DST", help="compare every byte of a pack with its SHA-256")
    arguments = parser.parse_args(argv)
    given = [arguments.source, arguments.destination]
    if (None in given) if arguments.verify is None else any(x is not None for x in [*given, arguments.short_side]):
        parser.error("name SRC and DST, or --verify and DST alone")
    arguments.short_side = arguments.short_side or 0
    return arguments


def _pixels(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 6 else -1
    if number != 0 and number < 8:
        raise argparse.ArgumentTypeError("expected a whole number of pixels, 0 or 8 to 99999")
    return number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have the first signal raise ``Interrupted``; the process ends with it, and others change nothing of how."""
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


def pack(source: Path, destination: Path, short_side: int, workers: int | None = None) -> int:
    """Pack an ImageFolder; larger images are resized to ``short_side`` pixels, 0 for none.

    ``workers`` is the number of processes; None for one a core. Returns the exit code.

    Raises:
        ValueError: a folder will not do, or the pack was begun otherwise.
        OSError: the pack cannot be written.
    """
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"DST {destination} lies in SRC {source}; name a folder outside of it")
    _check_destination(destination)
    folders = list_imagefolder(source)
    parts = [(Path(folder.root), _sources(folder)) for folder in folders]
    making = Making(
        short_side=short_side, pillow=PIL.__version__, source_sha256=_source_sha256(folders[0].classes, parts)
    )
    with lock(destination, "DST"):
        if _begin(destination, making):
            print(printable(f"{destination} is complete already; python -m recipe pack --verify looks at every byte"))
            return COMPLETE
        header = _make(destination, making, folders[0].classes, parts, workers or len(os.sched_getaffinity(0)))
    _report(destination, header)
    return COMPLETE


def _check_destination(destination: Path) -> None:
    """Refuse a folder with anything but a pack that is complete or under way."""
    if not destination.is_dir() or (destination / HEADER).is_file() or (destination / UNFINISHED / MAKING).is_file():
        return
    others = sorted(path.name for path in destination.iterdir() if path.name not in (LOCK, UNFINISHED))
    if others:
        raise ValueError(f"DST {destination} holds {', '.join(others[:5])}, and no pack; name a new or an empty folder")


def _sources(folder: FolderIndex) -> list[Source]:
    prefix, sources = os.path.join(folder.root, ""), []
    for index, label in enumerate(folder.labels.tolist()):
        path = folder.path(index)
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; mend or remove it") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: not a regular file; remove it")  # to open a pipe would wait for a writer
        sources.append(Source(path.removeprefix(prefix), label, status.st_size, status.st_mtime_ns))
    return sources


def _source_sha256(classes: Sequence[str], parts: Sequence[tuple[Path, Sequence[Source]]]) -> str:
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, classes)))
    for root, sources in parts:
        for source in sources:
            name = os.fsencode(os.path.join(root.name, source.path))
            digest.update(b"\0%b\0%d\0%d" % (name, source.bytes, source.changed_ns))
    return digest.hexdigest()


def _begin(destination: Path, making: Making) -> bool:
    """Whether the pack is complete already; if not, the folder is ready for it, or for its rest."""
    _check_destination(destination)
    if (destination / HEADER).is_file():
        _compare(destination, read_header(destination).making, making)
        shutil.rmtree(destination / UNFINISHED, ignore_errors=True)
        return True
    path = destination / UNFINISHED / MAKING
    if path.is_file():
        _compare(destination, validate(Making, parse_json(read_text(path, MAKING), str(path)), str(path), ""), making)
        for leftover in path.parent.glob("*.tar"):
            leftover.unlink()
        return False
    path.parent.mkdir(exist_ok=True)
    write_whole(path.with_suffix(".new"), path, making.model_dump_json().encode())
    return False


def _compare(destination: Path, begun: Making, making: Making) -> None:
    remedy = "name another DST, or remove this one"
    old, new = begun.model_dump(), making.model_dump()
    differing = [key for key in old if old[key] != new[key]]
    if differing == ["source_sha256"]:
        raise ValueError(
            f"{destination} is a pack of other files than are in SRC now: names, sizes or times of change differ; "
            f"restore them, {remedy}"
        )
    if differing:
        key = differing[0]
        raise ValueError(f"{destination} is a pack with {key} {old[key]}, not {new[key]}; {remedy}")


def _make(
    destination: Path,
    making: Making,
    classes: Sequence[str],
    parts: Sequence[tuple[Path, Sequence[Source]]],
    workers: int,
) -> Header:
    shards = [share_out(root, destination, sources) for root, sources in parts]
    for root, _ in parts:
        (destination / root.name).mkdir(exist_ok=True)
    total = sum(len(sources) for _, sources in parts)
    together = [shard for of_part in shards for shard in of_part]
    with Progress(total, "images") as progress:

        def show(done: int, shards_done: int) -> None:
            progress.update(done, f"{shards_done:,}/{len(together):,} shards", f"{progress.speed:,.0f} images/s")

        try:
            records = pack_shards(together, making, workers, show)
        except BaseException:
            for leftover in (destination / UNFINISHED).glob("*.tar"):
                leftover.unlink(missing_ok=True)
            raise
    cut = len(shards[0])
    train, validation = (
        _index(destination, root, sources, of_part)
        for (root, sources), of_part in zip(parts, (records[:cut], records[cut:]), strict=True)
    )
    header = Header(making=making, classes=tuple(map(printable, classes)), train=train, validation=validation)
    text = header.model_dump_json(indent=1) + "\n"
    write_whole(destination / UNFINISHED / HEADER, destination / HEADER, text.encode())
    shutil.rmtree(destination / UNFINISHED)
    return header


def _index(destination: Path, root: Path, sources: Sequence[Source], records: Sequence[Record]) -> Part:
    """Write the arrays of a part, and give what the header says of it."""
    names = [os.fsencode(source.path) for source in sources]
    images = np.empty(len(sources), IMAGE)
    images["offset"] = [offset for record in records for offset in record.offsets]
    images["bytes"] = [size for record in records for size in record.sizes]
    images["shard"] = [number for number, record in enumerate(records) for _ in record.sizes]
    images["label"] = [source.label for source in sources]
    images["name_end"] = np.cumsum([len(name) for name in names])
    arrays: dict[str, npt.NDArray] = {IMAGES: images, NAMES: np.frombuffer(b"".join(names), np.uint8)}
    indices = []
    for name, array in arrays.items():
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        path = destination / root.name / name
        write_whole(destination / UNFINISHED / name, path, content.getvalue())
        indices.append(File(file=name, bytes=path.stat().st_size, sha256=sha256_of(path)))
    files = [File(file=name, bytes=size, sha256=sha256) for record in records for name, size, sha256 in record.files]
    return Part(
        folder=root.name,
        images=len(sources),
        resized=sum(record.resized for record in records),
        shards=tuple(file for file in files if file.file.endswith(".tar")),
        indices=(*indices, *(file for file in files if file.file.endswith(".idx"))),
        bad_images=tuple(BadImage(name=name, problem=problem) for record in records for name, problem in record.bad),
        kept_images=tuple(BadImage(name=name, problem=problem) for record in records for name, problem in record.kept),
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
    print(f'to train from it: "source": "pack", {short_side}and --data {where}')
