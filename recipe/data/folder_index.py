"""Which images lie below a folder, a folder a class, in the order of torchvision's ImageFolder; kept between runs.

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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


class FolderIndex:
    """The images below ``root``, class by class.

    Args:
        root: The folder, as it was named.
        classes: The names of its folders, sorted.
        counts: int64, the number of images of each class.
        names: uint8, the images' paths relative to ``root``, each ended by a zero byte. One array: a million strings
            are a quarter of a GB, and are copied by and by into forked workers, as reference counts change.
        left_out: The number of files in the classes' folders that are no images by their extension, by that: in
            lower case with its dot, "" for none; the most frequent first. Hidden files do not count.
    """

    def __init__(
        self,
        root: str,
        classes: list[str],
        counts: npt.NDArray[np.int64],
        names: npt.NDArray[np.uint8],
        left_out: dict[str, int],
    ) -> None:
        self.root = root
        self.classes = classes
        self.counts = counts
        self.names = names
        self.left_out = left_out
        self._ends = np.flatnonzero(names == 0)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class of each image."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def path(self, index: int) -> str:
        """The path of an image."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.path.join(self.root, os.fsdecode(self.names[start : int(self._ends[index])].tobytes()))


def list_imagefolder(path: Path) -> tuple[FolderIndex, FolderIndex]:
    """Return what (``path/train``, ``path/val`` or else ``path/test``) hold, of the same classes; no file is read.

    Raises:
        ValueError: A folder is missing or cannot be listed, an image is a pipe or a device, a class has no image,
            or the two parts differ in their classes. The message says what is wrong with which path.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; it should hold train/ and val/")
    if (path / HEADER).is_file():
        raise ValueError(f'{path} holds a pack of images; write "source": "pack"')
    if not (path / "train").is_dir():
        raise ValueError(f"{path} has no folder train/; it should hold a folder a class")
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if held_out is None:
        raise ValueError(f"{path} has neither val/ nor test/ beside train/")

    train, validation = list_classes(path / "train"), list_classes(held_out)
    for one, other in ((train, validation), (validation, train)):
        if missing := set(one.classes) - set(other.classes):
            raise ValueError(
                printable(f"{other.root} lacks classes that {one.root} has: {_some(missing)}") + _twin(missing, other)
            )
    return train, validation


def _twin(missing: set[str], other: FolderIndex) -> str:
    """What of the classes that ``other`` lacks it has under a name that looks the same, or nearly."""
    seen = {_look(name): name for name in other.classes}
    for name in sorted(missing):
        if twin := seen.get(_look(name)):
            same = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", twin)
            how = "one is composed, the other decomposed, as macOS writes it" if same else "they differ"
            return f"; of {name!a} and its {twin!a} {how}: rename the folders of one as those of the other"
    return ""


def _look(name: str) -> str:
    """A name without what is hard to see: the Unicode form, case, spaces, characters of no width."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isprintable() and c != " ")


def list_classes(root: Path) -> FolderIndex:
    """Return what a folder with a folder per class holds; no file is read.

    Raises:
        ValueError: See ``list_imagefolder``.
    """
    try:
        folder = index_folder(str(root))
    except OSError as error:
        raise ValueError(printable(f"{root} cannot be listed: {error}")) from error
    if not folder.classes:
        raise ValueError(f"{root} holds no class; it should hold a folder a class")
    if empty := {name for name, count in zip(folder.classes, folder.counts, strict=True) if count == 0}:
        raise ValueError(printable(f"{root} holds no image of {_some(empty)}; fill or remove these folders"))
    return folder


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


@dataclass(frozen=True)
class _Watched:
    """What a scan depends on: ``paths``, relative to the root, by a digest of their state before it looked at them.

    They are all the folders, and links that do not lead to one but may some day, as to a disk that is not mounted.
    ``newest_ns`` is the latest time of any folder, in nanoseconds since 1970.
    """

    paths: list[str]
    sha256: bytes
    newest_ns: int


def index_folder(root: str) -> FolderIndex:
    """The images below a folder, by the cache if nothing has changed, else by a scan.

    Raises:
        OSError: A folder below ``root`` cannot be listed.
        ValueError: See ``scan``.
    """
    cache = _cache_file(root)
    index = _read(cache, root)
    if index is None:
        started_ns = time.time_ns()
        index, watched = scan(root)
        settled = watched.newest_ns + SETTLED_SECONDS * 1e9 < started_ns
        # Of the ranks of a host, which all scan, one writes.
        if settled and len(index) >= SMALLEST_KEPT_IMAGES and (os.environ.get("LOCAL_RANK") or "0") == "0":
            _keep(cache, index, watched)
    return index


def scan(root: str) -> tuple[FolderIndex, _Watched]:
    """List a folder as torchvision's ImageFolder does, which does not tell what folders it has looked into.

    But for hidden names, which a desktop or a notebook leaves (``._x.jpg``, ``.ipynb_checkpoints``), and for links to
    a folder that they lie in: torchvision follows them, until after 40 times the system refuses.

    Raises:
        OSError: A folder below ``root`` cannot be listed, where torchvision would leave out what is in it.
        ValueError: What is called an image is a pipe, a socket or a device.
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

    entries, status_of_root = look("")
    classes = sorted(entry.name for entry in entries if _is_folder(entry))
    counts, names, others = [], bytearray(), Counter[str]()
    for name in classes:
        images: dict[str, list[str]] = {}
        pending: list[tuple[str, tuple[os.stat_result, ...]]] = [(name, (status_of_root,))]
        while pending:
            folder, above = pending.pop()
            entries, status = look(folder)
            above, files = (*above, status), []
            for entry in entries:
                if _is_folder(entry):
                    if not (entry.is_symlink() and any(os.path.samestat(entry.stat(), one) for one in above)):
                        pending.append((os.path.join(folder, entry.name), above))
                elif not entry.name.lower().endswith(IMG_EXTENSIONS):
                    others[os.path.splitext(entry.name)[1].lower()] += 1
                elif _can_be_read(entry):
                    files.append(entry.name)
                else:
                    raise ValueError(printable(f"{entry.path}: not a regular file; remove it"))
            images[folder] = sorted(files)
        paths = [os.path.join(folder, file) for folder in sorted(images) for file in images[folder]]
        counts.append(len(paths))
        names += _joined(paths)
    left_out = dict(sorted(others.items(), key=lambda item: (-item[1], item[0])))
    index = FolderIndex(root, classes, np.array(counts, np.int64), np.frombuffer(names, np.uint8), left_out)
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


def _joined(names: list[str]) -> bytes:
    return os.fsencode("".join(f"{name}\0" for name in names))


def _split(names: npt.NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(names.tobytes()).split("\0")[:-1]


def _cache_file(root: str) -> Path | None:
    """Where the index of a folder is kept; None for a user without a home.

    A name a host: the same path may be another disk there, or have other inodes.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    key = (FORMAT, IMG_EXTENSIONS, sys.getfilesystemencoding(), socket.gethostname(), os.path.realpath(root))
    return caches / "large-batch-recipe" / f"images-{hashlib.sha256(ascii(key).encode()).hexdigest()}.npz"


def _read(cache: Path | None, root: str) -> FolderIndex | None:
    """What is kept of a folder, if that is still its state."""
    if cache is None:
        return None
    try:
        # Not mapped: whoever clears a cache on a network file system would kill the runs that have it mapped. Each
        # array has a CRC-32, which is looked at here.
        with cache.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            watched = _split(file["watched"])
            if _digest(_status(os.path.join(root, path)) for path in watched) != file["sha256"].tobytes():
                return None
            left_out = dict(zip(_split(file["left_out"]), file["left_out_counts"].tolist(), strict=True))
            index = FolderIndex(root, _split(file["classes"]), file["counts"], file["names"], left_out)
        return index if len(index.counts) == len(index.classes) and index.counts.sum() == len(index) else None
    except Exception:  # numpy and zipfile have many for what is damaged, or something else
        return None


def _keep(cache: Path | None, index: FolderIndex, watched: _Watched) -> None:
    """Keep an index, whole or not at all; where nothing can be written, the next run scans again."""
    if cache is None:
        return
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile's, which nobody else may read, whatever the umask says.
        unfinished = cache.with_suffix(f".{secrets.token_hex(8)}.unfinished")
        try:
            with unfinished.open("wb") as file:
                np.savez(
                    file,
                    watched=np.frombuffer(_joined(watched.paths), np.uint8),
                    sha256=np.frombuffer(watched.sha256, np.uint8),
                    classes=np.frombuffer(_joined(index.classes), np.uint8),
                    counts=index.counts,
                    names=index.names,
                    left_out=np.frombuffer(_joined(list(index.left_out)), np.uint8),
                    left_out_counts=np.array(list(index.left_out.values()), np.int64),
                )
            os.replace(unfinished, cache)
        finally:
            unfinished.unlink(missing_ok=True)
