"""The images of a pack, read at random from its shards: the same samples as from the folder that was packed."""

import errno
import os
import weakref
from pathlib import Path

import numpy as np

from recipe.config import printable
from recipe.data.augment import Crop, evaluation_short_side
from recipe.data.datasets import BadImageError, ImageDataset, OnBadImage
from recipe.data.decoding import UNREADABLE, Decoded, decode
from recipe.data.pack_format import HEADER, Header, Part, damage, open_index, read_header


class PackedImages(ImageDataset):
    """The images of one part of a pack; see ``ImageDataset`` for the other arguments.

    Args:
        pack: The folder of the pack.
        header: What it says of itself.
        part: One of the header's two.

    Raises:
        ValueError: A file is missing or has another size than was written, or see ``open_index``.
    """

    def __init__(
        self,
        pack: Path,
        header: Header,
        part: Part,
        *,
        image_size: int,
        crop: Crop,
        flip: bool,
        seed: int,
        on_bad_image: OnBadImage,
    ) -> None:
        folder = pack / part.folder
        for shard in part.shards:
            if problem := damage(folder / shard.file, shard):
                raise ValueError(f"{folder / shard.file}: {problem}; copy it again, or make the pack anew")
        # Mapped, and no Python objects in them: forked workers, and the other ranks of the host, share them.
        self._images, self._names = open_index(pack, header, part)
        super().__init__(
            self._images["label"].astype(np.int64),
            len(header.classes),
            image_size=image_size,
            crop=crop,
            flip=flip,
            seed=seed,
            on_bad_image=on_bad_image,
        )
        self.class_names = list(header.classes)
        self._folder = folder
        self._shards = [folder / shard.file for shard in part.shards]
        # Opened once and for all: on a network file system each opening would ask the server. Workers inherit them,
        # and read at an offset of their own.
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for path in self._shards:
            try:
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                lacks = error.errno in (errno.EMFILE, errno.ENFILE)
                remedy = "raise ulimit -n: a pack's shards stay open" if lacks else "mend it, or make the pack anew"
                raise ValueError(f"{path}: {error.strerror}; {remedy}") from error

    def file(self, index: int) -> bytes:
        row = self._images[index]
        size = int(row["bytes"])
        file = os.pread(self._files[row["shard"]], size, int(row["offset"]))
        if len(file) < size:
            raise OSError(f"the shard ends {size - len(file):,} bytes too early")
        return file

    def image(self, index: int) -> Decoded:
        try:
            return decode(self.file(index))
        except UNREADABLE as error:
            row = self._images[index]
            raise BadImageError(
                f"{self.name(index)}, {row['bytes']:,} bytes at {row['offset']:,}: not a readable image ({error}); "
                f"python -m recipe pack --verify {self._folder.parent} tells whether the shard is damaged; pack a "
                'mended folder anew, or set recipe.data.on_bad_image to "skip"'
            ) from error

    def name(self, index: int) -> str:
        """Return the shard, and behind a colon the file that was packed, relative to the folder that was."""
        start = int(self._images[index - 1]["name_end"]) if index else 0
        original = os.fsdecode(self._names[start : int(self._images[index]["name_end"])].tobytes())
        return printable(f"{self._shards[self._images[index]['shard']]}: {os.path.join(self._folder.name, original)}")


def open_pack(
    path: str | Path,
    *,
    image_size: int,
    crop: Crop,
    flip: bool,
    seed: int,
    on_bad_image: OnBadImage,
    short_side: int | None = None,
) -> tuple[PackedImages, PackedImages]:
    """Return (training, validation) from the folder of a pack, in the order of the ImageFolder that was packed.

    Args:
        path: The folder.
        image_size, crop, flip, seed, on_bad_image: See ``ImageDataset``.
        short_side: What its larger images were resized to, as who trains on it says; None if nobody says.

    Raises:
        ValueError: There is no whole pack, a file is not as it was written, or its images have another short side,
            or a smaller one than validation resizes them to. ``python -m recipe pack --verify`` looks at every byte,
            this does not.
    """
    path = Path(path)
    if not (path / HEADER).is_file():
        raise ValueError(
            f"recipe.data.path: {path} holds no whole pack, which has a {HEADER}; make one by python -m recipe pack, "
            'or write "source": "imagefolder"'
        )
    header = read_header(path)
    packed_at, needed = header.making.short_side, evaluation_short_side(image_size, crop)
    if 0 < packed_at < needed:
        raise ValueError(
            f"recipe.data.path: {path} is a pack of short side {packed_at}, but at recipe.data.image_size "
            f"{image_size} images are validated at {needed}; pack anew with --short-side {needed} or more"
        )
    if short_side is not None and short_side != packed_at:
        raise ValueError(
            f"recipe.data.pack_short_side = {short_side}: {path} is a pack of short side {packed_at}, whose pixels are "
            f"others; write {packed_at}, or name another pack"
        )
    train, validation = (
        PackedImages(
            path, header, part, image_size=image_size, crop=crop, flip=flip, seed=seed, on_bad_image=on_bad_image
        )
        for part in header.parts
    )
    return train, validation


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
