"""A folder of images, a folder a class, as torchvision's ImageFolder has it, with errors that a user can act on."""

import errno
from pathlib import Path

from recipe.config import printable
from recipe.data.augment import Crop
from recipe.data.datasets import BadImageError, ImageDataset, OnBadImage
from recipe.data.decoding import UNREADABLE, Decoded, decode, remedy
from recipe.data.folder_index import FolderIndex, list_imagefolder


class ImageFiles(ImageDataset):
    """The images under one folder, read when asked for; see ``ImageDataset`` for the other arguments."""

    def __init__(
        self,
        folder: FolderIndex,
        *,
        image_size: int,
        crop: Crop,
        flip: bool,
        seed: int,
        on_bad_image: OnBadImage,
    ) -> None:
        super().__init__(
            folder.labels,
            len(folder.classes),
            image_size=image_size,
            crop=crop,
            flip=flip,
            seed=seed,
            on_bad_image=on_bad_image,
        )
        self.class_names = folder.classes
        self._folder = folder

    def file(self, index: int) -> bytes:
        with open(self._folder.path(index), "rb") as file:
            return file.read()

    def image(self, index: int) -> Decoded:
        try:
            return decode(self.file(index))
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the fault of the process, not of the image
            raise BadImageError(
                f"{self.name(index)}: not a readable image ({error}); {remedy(error) or 'mend it'}, or set "
                'recipe.data.on_bad_image to "skip"'
            ) from error

    def name(self, index: int) -> str:
        return printable(self._folder.path(index))


def open_imagefolder(
    path: str | Path, *, image_size: int, crop: Crop, flip: bool, seed: int, on_bad_image: OnBadImage
) -> tuple[ImageFiles, ImageFiles]:
    """Return (training, validation): ``path/train``, and ``path/val`` or, where there is none, ``path/test``.

    Raises:
        ValueError: See ``list_imagefolder``.
    """
    try:
        folders = list_imagefolder(Path(path))
    except ValueError as error:
        raise ValueError(f"recipe.data.path: {error}") from error
    train, validation = (
        ImageFiles(folder, image_size=image_size, crop=crop, flip=flip, seed=seed, on_bad_image=on_bad_image)
        for folder in folders
    )
    return train, validation
