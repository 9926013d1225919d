"""The images of a pack, read at random from its shards, with the same samples as the folder that was packed."""

import json
import os
import weakref
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch

from recipe.config import printable
from recipe.data.augment import evaluation_short_side
from recipe.data.datasets import ImageDataset, Options
from recipe.data.decoding import Decoded
from recipe.data.pack_format import HEADER, Header, Part, damage, open_index, read_header


class PackedImages(ImageDataset):
    """The images of one part of a pack; raises a ValueError if a file is missing or has a different size."""

    def __init__(self, pack: Path, header: Header, part: Part, **options: Unpack[Options]) -> None:
        self._folder = pack / part.folder
        self._shards = [self._folder / shard.file for shard in part.shards]
        for path, shard in zip(self._shards, part.shards, strict=True):
            if problem := damage(path, shard):
                raise ValueError(f"{path}: {problem}; copy it again, or recreate the pack")
        # Memory-mapped and without Python objects, so forked workers and the host's other ranks share them.
        self._images, self._names = open_index(pack, header, part)
        self._raw = header.making.raw
        super().__init__(self._images["label"].astype(np.int64), header.classes, self._names, **options)
        # Opened only once, because each opening on a network file system is a request to the server. Workers inherit
        # the descriptors and pass an offset with each read.
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for path in self._shards:
            try:
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}; fix that, or recreate the pack") from error

    def file(self, index: int) -> bytes:
        return self._content(index).tobytes()

    def decoded(self, index: int) -> Decoded:
        if not (self._raw and self._images[index]["height"]):
            return super().decoded(index)
        height, width = int(self._images[index]["height"]), int(self._images[index]["width"])
        return Decoded(torch.from_numpy(self._content(index).reshape(height, width, 3)))

    def _content(self, index: int) -> npt.NDArray[np.uint8]:
        # Read, not mapped: a failing disk then raises an error instead of killing the process.
        row = self._images[index]
        content = np.empty(row["bytes"], np.uint8)
        read = os.preadv(self._files[row["shard"]], [content.data], int(row["offset"]))
        if read < len(content):
            raise OSError(f"the shard ends {len(content) - read:,} bytes too early")
        return content

    def _where_and_remedy(self, index: int) -> tuple[str, str]:
        row = self._images[index]
        return (
            f"{self.name(index)}, {row['bytes']:,} bytes at {row['offset']:,}",
            f"python -m recipe pack --verify {self._folder.parent} tells whether the shard is damaged; if not, fix the "
            "original and recreate the pack",
        )

    def name(self, index: int) -> str:
        """Return the shard and, after a colon, the original file, relative to the folder that was packed."""
        start = int(self._images[index - 1]["name_end"]) if index else 0
        original = os.fsdecode(self._names[start : int(self._images[index]["name_end"])].tobytes())
        return printable(f"{self._shards[self._images[index]['shard']]}: {os.path.join(self._folder.name, original)}")


def open_pack(
    path: str | Path, *, short_side: int | None = None, raw: bool | None = None, **options: Unpack[Options]
) -> tuple[PackedImages, PackedImages]:
    """Return (training, validation) of a pack, in the order of the ImageFolder that was packed.

    Raises a ValueError if the pack does not have the given ``short_side`` or kind (``raw`` or not), or if its images
    are smaller than validation resizes them to. Unlike ``python -m recipe pack --verify``, it does not read every byte.
    """
    path = Path(path)
    if not (path / HEADER).is_file():
        raise ValueError(
            f"{path} is not a complete pack, which has a {HEADER}; create one with python -m recipe pack, or use "
            '"source": "imagefolder"'
        )
    header = read_header(path)
    packed_at = header.making.short_side
    if short_side is not None and short_side != packed_at:
        raise ValueError(
            f"{path} is a pack of short side {packed_at}, but recipe.data.pack_short_side = {short_side}, so the "
            f"pixels differ; set it to {packed_at}, or name a different pack"
        )
    if raw is not None and raw != header.making.raw:
        kind = "raw pixels" if header.making.raw else "image files"
        raise ValueError(
            f"{path} is a pack of {kind}, but recipe.data.pack_raw = {json.dumps(raw)}, so the pixels differ; set it "
            f"to {json.dumps(header.making.raw)}, or name a different pack"
        )
    train, validation = (PackedImages(path, header, part, **options) for part in header.parts)
    image_size = validation.sizes.validation
    needed = evaluation_short_side(image_size, options["crop"])
    if 0 < packed_at < needed:
        raise ValueError(
            f"{path} is a pack of short side {packed_at}, but validation at {image_size} px resizes to {needed}; "
            f"recreate the pack with --short-side {needed} or more"
        )
    return train, validation


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
