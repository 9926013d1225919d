"""The images of a data set of Hugging Face, read at random from mapped Arrow files."""

from pathlib import Path
from typing import Any, Unpack

from recipe.config import printable
from recipe.data.datasets import ImageDataset, Options
from recipe.data.huggingface_index import Split, list_huggingface


class HubImages(ImageDataset):
    """The images of one split."""

    def __init__(self, split: Split, **options: Unpack[Options]) -> None:
        super().__init__(split.labels, split.classes, **options)
        self._split = split

    def file(self, index: int) -> bytes:
        image = self._image(index)
        if image["bytes"] is None and image["path"]:  # a data set may name files, too
            return Path(image["path"]).read_bytes()
        return image["bytes"] or b""

    def name(self, index: int) -> str:
        """Return data set, split and row, and the name of the original file, where it is known."""
        original = self._image(index)["path"]
        return printable(f"{self._split.name}[{self._split.rows[index]}]" + (f" ({original})" if original else ""))

    def _image(self, index: int) -> dict[str, Any]:
        (image,) = self._split.images[int(self._split.rows[index])].values()
        return image or {"bytes": None, "path": None}  # a row may lack its image


def open_huggingface(
    path: str | Path, validation_share: float | None = None, **options: Unpack[Options]
) -> tuple[HubImages, HubImages]:
    """Return (training, validation), see ``list_huggingface``."""
    try:
        train, validation = list_huggingface(str(path), validation_share)
    except ValueError as error:
        raise ValueError(f"recipe.data.path: {error}") from error
    return HubImages(train, **options), HubImages(validation, **options)
