"""Packs an ImageFolder into a few large files, from which any image takes one read, and verifies such packs.

The same call resumes a pack that was interrupted. Every file of a pack appears under its name only once it is complete,
``pack.json`` last.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
from recipe.reporting import Progress

COMPLETE, DAMAGED = 0, 1
MAKING = "making.json"
BAD_IMAGES_SHOWN = 20


def pack(source: Path, destination: Path, short_side: int, workers: int | None = None, *, raw: bool = False) -> int:
    """Pack an ImageFolder on ``workers`` processes, by default one per core; return the exit code.

    Larger images are resized to ``short_side`` pixels, 0 for none; ``raw`` writes pixels instead of image files.
    """
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"DST {destination} is inside SRC {source}; name a folder outside of it")
    begun = destination / UNFINISHED / MAKING
    if destination.is_dir() and not (destination / HEADER).is_file() and not begun.is_file():
        others = sorted(path.name for path in destination.iterdir() if path.name not in (LOCK, UNFINISHED))
        if others:
            raise ValueError(
                f"DST {destination} holds {', '.join(others[:5])}, and no pack; name a new or empty folder"
            )
    folders = list_imagefolder(source)
    parts = [(Path(folder.root), list(_sources(folder))) for folder in folders]
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
            print(printable(f"{destination} is already complete; python -m recipe pack --verify checks every byte"))
            return COMPLETE
        if begun.is_file():
            earlier = validate(Making, parse_json(read_text(begun, MAKING), str(begun)), str(begun), "")
            _compare(destination, earlier, making)
        else:
            begun.parent.mkdir(exist_ok=True)
            write_whole(begun.with_suffix(".new"), begun, making.model_dump_json().encode())
        shards = [shard for root, sources in parts for shard in share_out(root, destination, sources)]
        for root, _ in parts:
            (destination / root.name).mkdir(exist_ok=True)
        records = pack_shards(shards, making, workers or len(os.sched_getaffinity(0)))
        written = list(zip(shards, records, strict=True))
        train, validation = (
            _index(destination, root, sources, [record for shard, record in written if shard.root == root], raw)
            for root, sources in parts
        )
        classes = tuple(map(printable, folders[0].classes))
        header = Header(making=making, classes=classes, train=train, validation=validation)
        text = header.model_dump_json(indent=1) + "\n"
        write_whole(destination / UNFINISHED / HEADER, destination / HEADER, text.encode())
        shutil.rmtree(destination / UNFINISHED)
    _report(destination, header)
    return COMPLETE


def _sources(folder: FolderIndex) -> Iterator[Source]:
    prefix = os.path.join(folder.root, "")
    for index, label in enumerate(folder.labels.tolist()):
        path = folder.path(index)
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; fix or remove it") from None
        yield Source(path.removeprefix(prefix), label, status.st_size, status.st_mtime_ns)


def _compare(destination: Path, begun: Making, making: Making) -> None:
    """Refuse a destination whose pack was made from other files or with other options."""
    old, new = begun.model_dump(), making.model_dump()
    for key in old:  # the source's comes last
        if old[key] != new[key]:
            what = f"with {key} {old[key]}, not {new[key]}; "
            if key == "source_sha256":
                what = "of other files than are in SRC now: names, sizes or modification times differ; restore them, "
            raise ValueError(f"{destination} is a pack {what}name another DST, or remove this one")


def _index(destination: Path, root: Path, sources: Sequence[Source], records: Sequence[Record], raw: bool) -> Part:
    """Write the index arrays of a part, and return its entry in the header."""
    names = [os.fsencode(source.path) for source in sources]
    images = np.empty(len(sources), RAW_IMAGE if raw else IMAGE)
    images["offset"] = [offset for record in records for offset in record.offsets]
    images["bytes"] = [size for record in records for size in record.sizes]
    images["shard"] = [number for number, record in enumerate(records) for _ in record.sizes]
    images["label"] = [source.label for source in sources]
    images["name_end"] = np.cumsum([len(name) for name in names])
    if raw:
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
        print(f"… and {len(bad) - BAD_IMAGES_SHOWN:,} more; {destination / HEADER} lists all of them")
    for image in [image for part in header.parts for image in part.kept_images][:BAD_IMAGES_SHOWN]:
        print(f"kept as it is: {image.name}: {image.problem}")
    size = sum(shard.bytes for part in header.parts for shard in part.shards)
    text = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
    where = printable(str(destination))
    print(
        f"{where}: {header.train.images:,} training images, {header.validation.images:,} validation images, "
        f"{len(header.classes):,} classes, {len(header.train.shards) + len(header.validation.shards)} shards, "
        f"{text}; {header.train.resized + header.validation.resized:,} images resized, {len(bad):,} bad"
    )
    short_side = f'"pack_short_side": {header.making.short_side}, ' if header.making.short_side else ""
    raw = '"pack_raw": true, ' if header.making.raw else ""
    print(f'to train from it: "source": "pack", {short_side}{raw}and --data {where}')


def verify(destination: Path) -> int:
    """Check every byte of a pack against its SHA-256, and the header against the index; return the exit code."""
    header = read_header(destination)
    files = [
        (destination / part.folder / file.file, file) for part in header.parts for file in part.shards + part.indices
    ]
    problems = []
    with Progress(sum(file.bytes for _, file in files)) as progress, ThreadPoolExecutor() as threads:
        found = threads.map(lambda pair: damage(pair[0], pair[1], every_byte=True), files)
        for (path, file), problem in zip(files, found, strict=True):
            progress.add(file.bytes)
            problems += [f"{path}: {problem}"] if problem else []
    if not problems:
        try:
            for part in header.parts:
                open_index(destination, header, part)
        except ValueError as error:
            problems.append(str(error))
    for problem in problems:
        print(f"damaged: {problem}")
    if problems:
        print(f"{destination} is damaged; copy the files above again, or pack anew")
        return DAMAGED
    print(f"{destination}: all {len(files)} files are intact")
    return COMPLETE
