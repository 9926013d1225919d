"""The files of a pack: an ImageFolder in a few tar shards, and an index that locates every image for a single read.

| file | content |
|---|---|
| ``train/00000.tar``, … | WebDataset's convention: ``00000007.jpg`` (bytes of any image format) and ``00000007.cls`` |
| ``train/00000.idx``, … | the shard's index as DALI's ``wds2idx`` writes it |
| ``train/images.npy`` | ``IMAGE`` or ``RAW_IMAGE`` for each image, in the order of torchvision's ImageFolder |
| ``train/names.npy`` | uint8, the original file names relative to ``train/``, concatenated |
| ``pack.json`` | ``Header``, written last: a pack that has it is complete |

Raw pixels are ``00000007.npy`` instead of ``.jpg``. The validation images are stored likewise in ``val/`` or ``test/``.
No array contains Python objects, so reading one runs no code.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recipe.config import Count, Section, Size, parse_json, read_text, validate

HEADER, IMAGES, NAMES = "pack.json", "images.npy", "names.npy"

IMAGE = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("shard", "<u4"), ("label", "<u4"), ("name_end", "<u8")])
"""The location of an image: ``bytes`` from ``offset`` on in shard number ``shard``; its name ends at ``name_end``."""

RAW_IMAGE = np.dtype([*IMAGE.descr, ("height", "<u4"), ("width", "<u4")])
"""The location of an image's pixels, uint8 (height, width, 3), or, with height 0, of the bytes of a bad image."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Several = Field(strict=False)


class File(Section):
    file: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]*$")
    """the file name, in the folder of its part"""
    bytes: Size
    """its size in bytes, a whole number >= 0"""
    sha256: Sha256
    """its SHA-256, 64 hexadecimal digits"""


class BadImage(Section):
    name: str
    """the original file, relative to the folder that was packed, with escapes for unprintable characters"""
    problem: str
    """why it could not be decoded"""


class Part(Section):
    folder: str = Field(pattern="^(train|val|test)$")
    """ "train", "val" or "test" """
    images: Count
    """its number of images, a whole number >= 1"""
    resized: Size
    """how many of them were resized, a whole number >= 0"""
    shards: Annotated[tuple[File, ...], Several]
    """a list of objects with file, bytes and sha256, one for each shard"""
    indices: Annotated[tuple[File, ...], Several]
    """a list of objects with file, bytes and sha256: images.npy, names.npy and each shard's .idx"""
    bad_images: Annotated[tuple[BadImage, ...], Several]
    """a list of objects with name and problem: images that are in the pack and cannot be decoded"""
    kept_images: Annotated[tuple[BadImage, ...], Several] = ()
    """a list of objects with name and problem: images that could not be made smaller and keep their original bytes"""


class Making(Section):
    """The settings and the source that determine the bytes of a pack."""

    version: Literal[1] = 1
    """the format's version, 1; recreate the pack with this checkout"""
    short_side: Size
    """the short side in pixels to which larger images were resized, a whole number; 0: all keep their original bytes"""
    raw: bool = False
    """true or false: whether the images are stored as pixels, which need no decoding"""
    jpeg_quality: Count = 92
    """libjpeg's quality for resized images, a whole number"""
    jpeg_subsampling: str = "4:2:0"
    """the chroma subsampling of resized images, a string"""
    pillow: str
    """the version of Pillow that resized and encoded, a string"""
    source_sha256: Sha256
    """the SHA-256 of the source's file names, sizes and modification times"""


class Header(Section):
    making: Making
    """an object with version, short_side and whatever else determines the bytes"""
    classes: Annotated[tuple[str, ...], Several]
    """a list of the class names, with escapes for unprintable characters, in the order of their numbers"""
    train: Part
    """an object with folder, images, shards, indices and bad_images"""
    validation: Part
    """an object with folder, images, shards, indices and bad_images"""

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.train, self.validation


def read_header(pack: Path) -> Header:
    """Return the header of the pack in a folder."""
    path = pack / HEADER
    if not path.is_file():
        raise ValueError(f"{pack} is not a complete pack, which has a {HEADER}; create one with python -m recipe pack")
    raw = parse_json(read_text(path, "*.json"), str(path))
    header = validate(Header, raw, str(path), "recreate the pack with python -m recipe pack")
    if header.train.folder != "train" or header.validation.folder == "train":
        raise ValueError(f"{path}: train must be in train/, validation in val/ or test/; recreate the pack")
    return header


def open_index(pack: Path, header: Header, part: Part) -> tuple[npt.NDArray, npt.NDArray]:
    """Return (images, names) of a part, memory-mapped, so that the processes of a host share one copy."""
    folder, files, arrays = pack / part.folder, {file.file: file for file in part.indices}, []
    for name, dtype in ((IMAGES, RAW_IMAGE if header.making.raw else IMAGE), (NAMES, np.dtype(np.uint8))):
        if name not in files:
            raise ValueError(f"{pack / HEADER}: {part.folder} has no {name}; recreate the pack")
        problem = damage(folder / name, files[name], every_byte=True)
        if problem is None:
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            problem = f"an array of {array.dtype}" if array.dtype != dtype or array.ndim != 1 else None
        if problem is not None:
            raise ValueError(f"{folder / name}: {problem}; copy it again, or recreate the pack")
        arrays.append(array)
    images, names = arrays
    if (
        len(images) != part.images
        or int(images["label"].max()) + 1 != len(header.classes)
        or int(images["name_end"][-1]) != len(names)
        or [shard.file for shard in part.shards] != list(map(shard_name, range(int(images["shard"].max()) + 1)))
    ):
        raise ValueError(
            f"{folder / IMAGES}: not the index of the {part.images:,} images of {len(header.classes):,} classes in "
            f"{len(part.shards)} shards that {HEADER} lists; recreate the pack"
        )
    return images, names


def shard_name(number: int) -> str:
    return f"{number:05}.tar"


def describe(path: Path) -> File:
    """Return a file's entry in the header."""
    return File(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def damage(path: Path, file: File, every_byte: bool = False) -> str | None:
    """Return how a file's size, or with ``every_byte`` its content, differs from its entry in the header, or None."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    if size != file.bytes:
        return f"{size:,} bytes instead of {file.bytes:,}"
    return "its SHA-256 differs from the original's" if every_byte and sha256_of(path) != file.sha256 else None


def sha256_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
