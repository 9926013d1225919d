"""Lists the images in a folder with one folder per class, in the order of torchvision's ImageFolder, without torch."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from recipe.config import printable
from recipe.data.pack_format import HEADER

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The extensions of image files, the same as torchvision's."""


@dataclass(eq=False)
class FolderIndex:
    """The images in ``root``, class by class."""

    root: str
    """the folder, as the user named it"""
    classes: list[str]
    """the names of its folders, sorted"""
    counts: npt.NDArray[np.int64]
    """the number of images of each class"""
    names: npt.NDArray[np.uint8]
    """the images' paths relative to ``root``, each terminated by a zero byte. They are one array, because a million
    strings take a quarter of a GB and would gradually be copied into forked workers as reference counts change"""
    left_out: dict[str, int]
    """the number of files in the class folders that are not images, by their extension in lower case with its dot (""
    for none), most frequent first. Hidden files do not count"""

    def __post_init__(self) -> None:
        self._ends = np.flatnonzero(self.names == 0)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class number of each image."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.path.join(self.root, os.fsdecode(self.names[start : int(self._ends[index])].tobytes()))


def list_imagefolder(path: Path, validation_share: float | None = None) -> tuple[FolderIndex, FolderIndex]:
    """Return the images of ``path/train`` and of ``path/val`` or else ``path/test``, without reading any file.

    With a ``validation_share``, both are parts of ``path/train``, or of ``path`` if that does not exist; see ``split``.
    Raises a ValueError for a folder that is missing or cannot be listed, a class without images, and parts whose
    classes differ.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; it should contain train/ and val/")
    if (path / HEADER).is_file():
        raise ValueError(f'{path} contains a pack of images; use "source": "pack"')
    held_out = held_out_folder(path)
    if validation_share is not None:
        if held_out is not None:
            raise ValueError(f"{held_out} exists; remove recipe.data.validation_share, or move that folder away")
        return split(list_classes(path / "train" if (path / "train").is_dir() else path), validation_share)
    if not (path / "train").is_dir():
        raise ValueError(
            f"{path} has no folder train/; it should contain train/ and val/, each with one folder per class, or one "
            "folder per class itself and recipe.data.validation_share 0.1 to validate on a tenth of the images"
        )
    if held_out is None:
        raise ValueError(
            f"{path} has neither val/ nor test/ beside train/; add one, or set recipe.data.validation_share to 0.1"
        )

    train, validation = list_classes(path / "train"), list_classes(held_out)
    for one, other in ((train, validation), (validation, train)):
        if missing := set(one.classes) - set(other.classes):
            problem = printable(f"{other.root} lacks classes that {one.root} has: {_some(missing)}")
            lookalikes = {_visible(name): name for name in other.classes}
            for name in sorted(missing):
                if lookalike := lookalikes.get(_visible(name)):
                    problem += f"; {name!a} looks like {lookalike!a}, which it has: give both the same name"
                    break
            raise ValueError(problem)
    return train, validation


def held_out_folder(path: Path) -> Path | None:
    """Return ``path/val``, or else ``path/test``, or None if neither exists."""
    return next((path / name for name in ("val", "test") if (path / name).is_dir()), None)


def split(folder: FolderIndex, validation_share: float) -> tuple[FolderIndex, FolderIndex]:
    """Return (training, validation); see ``hold_out``."""
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
    """Return a mask of the images to validate on: of each class, the share whose names have the lowest SHA-256.

    It is a function of the names alone: the same on every rank and in every run. An image that is added or removed
    moves at most one other per class. Raises a ValueError, which names the data as ``where``, for a class with a single
    image.
    """
    order = np.array(sorted(range(len(names)), key=lambda index: hashlib.sha256(names[index]).digest()))
    order = order[np.argsort(labels[order], kind="stable")]
    ends = np.bincount(labels, minlength=len(classes)).cumsum()
    held_out = np.zeros(len(names), np.bool_)
    for name, images in zip(classes, np.split(order, ends[:-1]), strict=True):
        if len(images) == 1:
            raise ValueError(printable(f"{where} has a single image of {name}, which cannot be split; add some"))
        held_out[images[: max(1, min(len(images) - 1, round(share * len(images))))]] = True
    return held_out


def _visible(name: str) -> str:
    """Return a name without hardly visible differences: Unicode form, which macOS changes, case, spaces, zero width."""
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isprintable() and c != " ")


def list_classes(root: Path) -> FolderIndex:
    """Return the images of a folder with one folder per class, without reading any file."""
    try:
        folder = index_folder(str(root))
    except OSError as error:
        raise ValueError(printable(f"{root} cannot be listed: {error}")) from error
    if not folder.classes:
        raise ValueError(f"{root} has no classes; it should contain one folder per class")
    if empty := {name for name, count in zip(folder.classes, folder.counts, strict=True) if count == 0}:
        raise ValueError(printable(f"{root} has no images of {_some(empty)}; fill or remove these folders"))
    return folder


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def index_folder(root: str) -> FolderIndex:
    """List a folder like torchvision's ImageFolder, whose import takes seconds, with three differences.

    Hidden names are skipped (``._x.jpg``, ``.ipynb_checkpoints``). So are links to a folder that contains the link,
    which torchvision follows until the system refuses after 40 levels. A folder that cannot be listed raises an
    OSError, while torchvision would skip its images.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    above_root = Path(root).resolve().parents

    def is_followed(path: str) -> bool:
        return not os.path.islink(path) or not any(
            os.path.samefile(path, folder) for folder in (*Path(path).parents, *above_root)
        )

    def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
            folders[:] = [
                name for name in folders if not name.startswith(".") and is_followed(os.path.join(folder, name))
            ]
            yield folder, folders, [name for name in files if not name.startswith(".")]

    classes = sorted(next(walk(root))[1])
    counts, paths, left_out = [], [], Counter[str]()
    for name in classes:
        images: dict[str, list[str]] = {}
        for folder, _, files in walk(os.path.join(root, name)):
            is_image = {file: file.lower().endswith(IMG_EXTENSIONS) for file in files}
            images[os.path.relpath(folder, root)] = sorted(file for file in files if is_image[file])
            left_out.update(os.path.splitext(file)[1].lower() for file in files if not is_image[file])
        counts.append(sum(map(len, images.values())))
        joined = "".join(f"{os.path.join(folder, file)}\0" for folder in sorted(images) for file in images[folder])
        paths.append(np.frombuffer(os.fsencode(joined), np.uint8))
    all_paths = np.concatenate(paths) if paths else np.empty(0, np.uint8)
    most_frequent_first = dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0])))
    return FolderIndex(root, classes, np.array(counts, np.int64), all_paths, most_frequent_first)
