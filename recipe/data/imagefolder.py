"""A folder of images, a folder per class, as torchvision's ImageFolder has it."""

from pathlib import Path
from typing import Unpack

from recipe.config import printable
from recipe.data.datasets import ImageDataset, Options
from recipe.data.folder_index import FolderIndex, list_imagefolder


class ImageFiles(ImageDataset):
    """The images below one folder, read when asked for."""

    def __init__(self, folder: FolderIndex, **options: Unpack[Options]) -> None:
        super().__init__(folder.labels, folder.classes, folder.names, **options)
        self._folder = folder

    def file(self, index: int) -> bytes:
        with open(self._folder.path(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return printable(self._folder.path(index))


def open_imagefolder(
    path: str | Path, validation_share: float | None = None, **options: Unpack[Options]
) -> tuple[ImageFiles, ImageFiles]:
    """Return (training, validation), see ``list_imagefolder``."""
    try:
        train, validation = list_imagefolder(Path(path), validation_share)
    except ValueError as error:
        raise ValueError(f"recipe.data.path: {error}") from error
    return ImageFiles(train, **options), ImageFiles(validation, **options)
