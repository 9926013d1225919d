"""What a pack is on the disk: an ImageFolder in a few tar shards, and an index by which any image is one read.

| file | content |
|---|---|
| ``train/00000.tar``, … | WebDataset's convention: ``00000007.jpg`` (bytes of any image format) and ``00000007.cls`` |
| ``train/00000.idx``, … | the shard's index as DALI's ``wds2idx`` writes it |
| ``train/images.npy`` | ``IMAGE``, one for each image in the order of torchvision's ImageFolder |
| ``train/names.npy`` | uint8, the original file names relative to ``train/``, end to end |
| ``pack.json`` | ``Header``, written last: where it is, the pack is whole |

The validation images lie likewise in ``val/`` or ``test/``. No array holds Python objects: reading runs no code.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recipe.config import Count, Section, Size, parse_json, read_text, validate

HEADER, IMAGES, NAMES = "pack.json", "images.npy", "names.npy"

IMAGE = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("shard", "<u4"), ("label", "<u4"), ("name_end", "<u8")])
"""Where an image lies: ``bytes`` from ``offset`` on in shard number ``shard``; its name ends at ``name_end``."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Several = Field(strict=False)


class File(Section):
    file: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]*$")
    """the name of a file beside the others of its part"""

    bytes: Size
    """its size in bytes, a whole number >= 0"""

    sha256: Sha256
    """its SHA-256, 64 hexadecimal digits"""


class BadImage(Section):
    name: str
    """the original file, relative to the folder that was packed, as a message shows it"""

    problem: str
    """why it could not be decoded"""


class Part(Section):
    folder: str = Field(pattern="^(train|val|test)$")
    """ "train", "val" or "test" """

    images: Count
    """its number of images, a whole number >= 1"""

    resized: Size
    """how many of them are not the original bytes, a whole number >= 0"""

    shards: Annotated[tuple[File, ...], Several]
    """a list of objects with file, bytes and sha256, one for each shard"""

    indices: Annotated[tuple[File, ...], Several]
    """a list of objects with file, bytes and sha256: images.npy, names.npy and each shard's .idx"""

    bad_images: Annotated[tuple[BadImage, ...], Several]
    """a list of objects with name and problem: images that are in the pack and cannot be decoded"""

    kept_images: Annotated[tuple[BadImage, ...], Several] = ()
    """a list of objects with name and problem: images that could not be made smaller, and are the original bytes"""


class Making(Section):
    """What decides on the bytes of a pack, besides the source's."""

    version: Literal[1] = 1
    """the format's version, 1; make the pack anew with this checkout"""

    short_side: Size
    """the short side in pixels to which larger images were resized, a whole number; 0: all are the original bytes"""

    jpeg_quality: Count = 92
    """libjpeg's quality of the images that were resized, a whole number"""

    jpeg_subsampling: str = "4:2:0"
    """the chroma subsampling of the images that were resized, a string"""

    pillow: str
    """the version of Pillow that resized and encoded, a string"""

    source_sha256: Sha256
    """the SHA-256 of the source's file names, sizes and times of change"""


class Header(Section):
    making: Making
    """an object with version, short_side and what else decides on the bytes"""

    classes: Annotated[tuple[str, ...], Several]
    """a list of the classes' names, as a message shows them, in the order of their numbers"""

    train: Part
    """an object with folder, images, shards, indices and bad_images"""

    validation: Part
    """an object with folder, images, shards, indices and bad_images"""

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.train, self.validation


def read_header(pack: Path) -> Header:
    """The header of the pack in a folder.

    Raises:
        ValueError: there is none, it cannot be read, or is not one of this version.
    """
    path = pack / HEADER
    if not path.is_file():
        raise ValueError(f"{pack} holds no whole pack, which has a {HEADER}; make one by python -m recipe pack")
    raw = parse_json(read_text(path, "*.json"), str(path))
    header = validate(Header, raw, str(path), "make the pack anew with python -m recipe pack")
    if header.train.folder != "train" or header.validation.folder == "train":
        raise ValueError(f"{path}: train lies in train/, validation in val/ or test/; make the pack anew")
    return header


def open_index(pack: Path, header: Header, part: Part) -> tuple[npt.NDArray, npt.NDArray]:
    """(images, names) of a part, mapped into memory.

    Raises:
        ValueError: they are not what was written, or not what the header speaks of.
    """
    folder, files = pack / part.folder, {file.file: file for file in part.indices}
    for name in (IMAGES, NAMES):
        if name not in files:
            raise ValueError(f"{pack / HEADER}: {part.folder} has no {name}; make the pack anew")
    images = load_array(folder / IMAGES, files[IMAGES], IMAGE)
    names = load_array(folder / NAMES, files[NAMES], np.uint8)
    if (
        len(images) != part.images
        or int(images["label"].max()) + 1 != len(header.classes)
        or int(images["name_end"][-1]) != len(names)
        or [shard.file for shard in part.shards] != list(map(shard_name, range(int(images["shard"].max()) + 1)))
    ):
        raise ValueError(
            f"{folder / IMAGES}: not the index of {part.images:,} images of {len(header.classes):,} classes in "
            f"{len(part.shards)} shards, of which {HEADER} speaks; make the pack anew"
        )
    return images, names


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:05}.tar"


def damage(path: Path, file: File) -> str | None:
    """What a look at its size tells against a file, in words; None if nothing."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    return None if size == file.bytes else f"{size:,} bytes, of {file.bytes:,} that were written"


def sha256_of(path: Path, count: Callable[[int], None] = lambda size: None) -> str:
    """The SHA-256 of a file's content; ``count`` hears of the bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()


def load_array(path: Path, file: File, dtype: npt.DTypeLike) -> npt.NDArray:
    """An index, mapped into memory: the processes of a host share one copy of it.

    Raises:
        ValueError: it is not what was written.
    """
    problem = damage(path, file) or ("another SHA-256 than was written" if sha256_of(path) != file.sha256 else None)
    if problem is None:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype == dtype and array.ndim == 1:
            return array
        problem = f"an array of {array.dtype}"
    raise ValueError(f"{path}: {problem}; copy it again, or make the pack anew")
