"""Data sets of single image files: in a folder, or in a split of a Hugging Face data set."""

from pathlib import Path
from typing import Any, Unpack

from recipe.config import printable
from recipe.data.datasets import ImageDataset, Options
from recipe.data.folder_index import FolderIndex
from recipe.data.huggingface_index import Split


class ImageFiles(ImageDataset):
    """The images in one folder, read on request."""

    def __init__(self, folder: FolderIndex, **options: Unpack[Options]) -> None:
        super().__init__(folder.labels, folder.classes, folder.names, **options)
        self._folder = folder

    def file(self, index: int) -> bytes:
        return Path(self._folder.path(index)).read_bytes()

    def name(self, index: int) -> str:
        return printable(self._folder.path(index))


class HubImages(ImageDataset):
    """The images of one Hugging Face split, read at random from memory-mapped Arrow files."""

    def __init__(self, split: Split, **options: Unpack[Options]) -> None:
        super().__init__(split.labels, split.classes, **options)
        self._split = split

    def file(self, index: int) -> bytes:
        image = self._image(index)
        if image["bytes"] is None and image["path"]:  # a data set can also refer to files
            return Path(image["path"]).read_bytes()
        return image["bytes"] or b""

    def name(self, index: int) -> str:
        """Return data set, split and row, and the original file's name if it is known."""
        original = self._image(index)["path"]
        return printable(f"{self._split.name}[{self._split.rows[index]}]" + (f" ({original})" if original else ""))

    def _image(self, index: int) -> dict[str, Any]:
        (image,) = self._split.images[int(self._split.rows[index])].values()
        return image or {"bytes": None, "path": None}  # a row can lack its image
