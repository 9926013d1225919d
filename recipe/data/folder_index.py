"""Which images lie below a folder, a folder per class, in the order of torchvision's ImageFolder; kept between runs.

Every rank lists the folder when it starts, all 1.28 million files of ImageNet. So what a scan has found is kept in the
user's cache, with a digest of the state of every folder that it looked into: any name that comes, goes or changes below
them changes the times of one, and the scan is made anew. Nothing here needs torch, whose import takes seconds.
"""

import hashlib
import os
import secrets
import socket
import stat
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recipe.config import printable
from recipe.data.pack_format import HEADER

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of what is taken for an image, as torchvision does."""
FORMAT = 2
SMALLEST_KEPT_IMAGES = 10_000
"""Fewer are listed in about the time in which a file is read."""
SETTLED_SECONDS = 2.0
"""A second change within the granularity of a folder's time, which is 2 s at worst (FAT), would not be seen."""


@dataclass(eq=False)
class FolderIndex:
    """The images below ``root``, class by class."""

    root: str
    """the folder, as it was named"""
    classes: list[str]
    """the names of its folders, sorted"""
    counts: npt.NDArray[np.int64]
    """the number of images of each class"""
    names: npt.NDArray[np.uint8]
    """the images' paths relative to ``root``, each ended by a zero byte. One array: a million strings are a quarter of
    a GB, and are copied by and by into forked workers, as reference counts change"""
    left_out: dict[str, int]
    """the number of files in the classes' folders that are no images by their extension, by that: in lower case with
    its dot, "" for none; the most frequent first. Hidden files do not count"""

    def __post_init__(self) -> None:
        self._ends = np.flatnonzero(self.names == 0)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class of each image."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.path.join(self.root, os.fsdecode(self.names[start : int(self._ends[index])].tobytes()))


def list_imagefolder(path: Path, validation_share: float | None = None) -> tuple[FolderIndex, FolderIndex]:
    """Return what (``path/train``, ``path/val`` or else ``path/test``) hold, of the same classes; no file is read.

    With a ``validation_share`` both are parts of ``path/train`` or, where there is none, of ``path``: see ``split``.
    Refuses a folder that is missing or cannot be listed, a class without an image, parts that differ in their classes.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; it should hold train/ and val/")
    if (path / HEADER).is_file():
        raise ValueError(f'{path} holds a pack of images; write "source": "pack"')
    held_out = held_out_folder(path)
    if validation_share is not None:
        if held_out is not None:
            raise ValueError(f"{held_out} is there; remove recipe.data.validation_share, or move that folder away")
        return split(list_classes(path / "train" if (path / "train").is_dir() else path), validation_share)
    if not (path / "train").is_dir():
        raise ValueError(
            f"{path} has no folder train/; it should hold train/ and val/, each with a folder per class, or a folder "
            "per class itself, of which recipe.data.validation_share 0.1 holds a part out"
        )
    if held_out is None:
        raise ValueError(
            f"{path} has neither val/ nor test/ beside train/; add one, or write recipe.data.validation_share 0.1"
        )

    train, validation = list_classes(path / "train"), list_classes(held_out)
    for one, other in ((train, validation), (validation, train)):
        if missing := set(one.classes) - set(other.classes):
            problem = printable(f"{other.root} lacks classes that {one.root} has: {_some(missing)}")
            seen = {_look(name): name for name in other.classes}
            for name in sorted(missing):
                if twin := seen.get(_look(name)):
                    problem += f"; {name!a} looks like {twin!a}, which it has: give both the same name"
                    break
            raise ValueError(problem)
    return train, validation


def held_out_folder(path: Path) -> Path | None:
    """Return ``path/val`` or else ``path/test``, None where there is neither."""
    return next((path / name for name in ("val", "test") if (path / name).is_dir()), None)


def split(folder: FolderIndex, validation_share: float) -> tuple[FolderIndex, FolderIndex]:
    """Return (training, validation), see ``hold_out``; refuses a class of a single image."""
    names = folder.names.tobytes().split(b"\0")[:-1]
    is_held_out = hold_out(folder.classes, folder.labels, names, validation_share, folder.root)
    train, validation = (
        FolderIndex(
            folder.root,
            folder.classes,
            np.bincount(folder.labels[chosen], minlength=len(folder.classes)),
            np.frombuffer(b"".join(names[index] + b"\0" for index in np.flatnonzero(chosen)), np.uint8),
            left_out,
        )
        for chosen, left_out in ((~is_held_out, folder.left_out), (is_held_out, {}))
    )
    return train, validation


def hold_out(
    classes: Sequence[str], labels: npt.NDArray[np.int64], names: Sequence[bytes], share: float, where: str
) -> npt.NDArray[np.bool_]:
    """Return which images to validate on: of each class the share whose names have the lowest SHA-256.

    A function of the names alone: the same on every rank, in every run, and an image that is added or removed moves at
    most one other per class. Refuses a class of a single image, in the data that is called ``where``.
    """
    order = np.array(sorted(range(len(names)), key=lambda index: hashlib.sha256(names[index]).digest()))
    order = order[np.argsort(labels[order], kind="stable")]
    ends = np.bincount(labels, minlength=len(classes)).cumsum()
    held_out = np.zeros(len(names), np.bool_)
    for name, images in zip(classes, np.split(order, ends[:-1]), strict=True):
        if len(images) == 1:
            raise ValueError(printable(f"{where} holds a single image of {name}, which cannot be split; add some"))
        held_out[images[: max(1, min(len(images) - 1, round(share * len(images))))]] = True
    return held_out


def _look(name: str) -> str:
    """A name without what is hard to see: the Unicode form, which macOS changes, case, spaces, what has no width."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isprintable() and c != " ")


def list_classes(root: Path) -> FolderIndex:
    """Return what a folder with a folder per class holds; no file is read."""
    try:
        folder = index_folder(str(root))
    except OSError as error:
        raise ValueError(printable(f"{root} cannot be listed: {error}")) from error
    if not folder.classes:
        raise ValueError(f"{root} holds no class; it should hold a folder per class")
    if empty := {name for name, count in zip(folder.classes, folder.counts, strict=True) if count == 0}:
        raise ValueError(printable(f"{root} holds no image of {_some(empty)}; fill or remove these folders"))
    return folder


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


class _Watched(NamedTuple):
    """What a scan depends on, as it was before the scan looked at it."""

    paths: list[str]
    """relative to the root: all folders, and links that do not lead to one but may some day, as to an unmounted disk"""
    sha256: bytes
    newest_ns: int
    """the latest time of any folder, in nanoseconds since 1970"""


def index_folder(root: str) -> FolderIndex:
    """Return the images below a folder, from the cache if nothing has changed, else by a scan."""
    index = _read(root)
    if index is None:
        started_ns = time.time_ns()
        index, watched = scan(root)
        settled = watched.newest_ns + SETTLED_SECONDS * 1e9 < started_ns
        # Of the ranks of a host, which all scan, one writes.
        if settled and len(index) >= SMALLEST_KEPT_IMAGES and (os.environ.get("LOCAL_RANK") or "0") == "0":
            _keep(index, watched)
    return index


def scan(root: str) -> tuple[FolderIndex, _Watched]:
    """List a folder as torchvision's ImageFolder does, which does not tell what folders it has looked into.

    But for hidden names, which a desktop or a notebook leaves (``._x.jpg``, ``.ipynb_checkpoints``), and for links to
    a folder that they lie in: torchvision follows them, until after 40 times the system refuses. Refuses a folder that
    cannot be listed, where torchvision would leave out what is in it, and an image that is a pipe or a device.
    """
    before: dict[str, os.stat_result | None] = {}

    def look(folder: str) -> tuple[list[os.DirEntry[str]], os.stat_result]:
        path = os.path.join(root, folder)
        before[folder] = status = os.stat(path)
        with os.scandir(path) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            if entry.is_symlink() and not _is_folder(entry):
                before[os.path.join(folder, entry.name)] = None
        return found, status

    def leads_back(entry: os.DirEntry[str], above: Iterable[os.stat_result]) -> bool:
        return entry.is_symlink() and any(os.path.samestat(entry.stat(), one) for one in above)

    entries, _ = look("")
    real_root = Path(root).resolve()
    roots = tuple(os.stat(folder) for folder in (real_root, *real_root.parents))
    classes = sorted(entry.name for entry in entries if _is_folder(entry) and not leads_back(entry, roots))
    counts, paths, others = [], [], Counter[str]()
    for name in classes:
        images: dict[str, list[str]] = {}
        pending: list[tuple[str, tuple[os.stat_result, ...]]] = [(name, roots)]
        while pending:
            folder, above = pending.pop()
            entries, status = look(folder)
            above, files = (*above, status), []
            for entry in entries:
                if _is_folder(entry):
                    if not leads_back(entry, above):
                        pending.append((os.path.join(folder, entry.name), above))
                elif not entry.name.lower().endswith(IMG_EXTENSIONS):
                    others[os.path.splitext(entry.name)[1].lower()] += 1
                elif _can_be_read(entry):
                    files.append(entry.name)
                else:
                    raise ValueError(printable(f"{entry.path}: not a regular file; remove it"))
            images[folder] = sorted(files)
        counts.append(sum(map(len, images.values())))
        paths.append(_joined(os.path.join(folder, file) for folder in sorted(images) for file in images[folder]))
    left_out = dict(sorted(others.items(), key=lambda item: (-item[1], item[0])))
    all_paths = np.concatenate(paths) if paths else np.empty(0, np.uint8)
    index = FolderIndex(root, classes, np.array(counts, np.int64), all_paths, left_out)
    newest_ns = max(max(status.st_mtime_ns, status.st_ctime_ns) for status in before.values() if status is not None)
    return index, _Watched(list(before), _digest(before.values()), newest_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _can_be_read(entry: os.DirEntry[str]) -> bool:
    """Whether what is no folder is no pipe, socket or device, either: to open a pipe would wait for a writer."""
    try:
        return entry.is_file() or not entry.stat()
    except OSError:  # a link to nowhere, which says so when it is read
        return True


def _status(path: str) -> os.stat_result | None:
    """That of a folder; None if there is no folder."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISDIR(status.st_mode) else None


def _digest(folders: Iterable[os.stat_result | None]) -> bytes:
    """The SHA-256 of what changes with the names in folders. A device's number may be another after each mount."""
    digest = hashlib.sha256()
    for status in folders:
        state = status and (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(repr(state).encode())
    return digest.digest()


def _joined(names: Iterable[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(os.fsencode("".join(f"{name}\0" for name in names)), np.uint8)


def _split(names: npt.NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(names.tobytes()).split("\0")[:-1]


def _cache_file(root: str) -> Path:
    """A name per host: the same path may be another disk there, or have other inodes."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = (FORMAT, IMG_EXTENSIONS, sys.getfilesystemencoding(), socket.gethostname(), os.path.realpath(root))
    return caches / "large-batch-recipe" / f"images-{hashlib.sha256(ascii(key).encode()).hexdigest()}.npz"


def _read(root: str) -> FolderIndex | None:
    """What is kept of a folder, if that is still its state."""
    try:
        # Not mapped: whoever clears a cache on a network file system would kill the runs that have it mapped. Each
        # array has a CRC-32, which is looked at here.
        with _cache_file(root).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if (
                _digest(_status(os.path.join(root, path)) for path in _split(file["watched"]))
                != file["sha256"].tobytes()
            ):
                return None
            left_out = dict(zip(_split(file["left_out"]), file["left_out_counts"].tolist(), strict=True))
            index = FolderIndex(root, _split(file["classes"]), file["counts"], file["names"], left_out)
        return index if len(index.counts) == len(index.classes) and index.counts.sum() == len(index) else None
    except Exception:  # numpy and zipfile have many for what is damaged, or something else
        return None


def _keep(index: FolderIndex, watched: _Watched) -> None:
    """Keep an index, whole or not at all; where nothing can be written, the next run scans again."""
    with suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
        cache = _cache_file(index.root)
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile's, which nobody else may read, whatever the umask says.
        unfinished = cache.with_suffix(f".{secrets.token_hex(8)}.unfinished")
        try:
            with unfinished.open("wb") as file:
                np.savez(
                    file,
                    watched=_joined(watched.paths),
                    sha256=np.frombuffer(watched.sha256, np.uint8),
                    classes=_joined(index.classes),
                    counts=index.counts,
                    names=index.names,
                    left_out=_joined(index.left_out),
                    left_out_counts=np.array(list(index.left_out.values()), np.int64),
                )
            os.replace(unfinished, cache)
        finally:
            unfinished.unlink(missing_ok=True)
