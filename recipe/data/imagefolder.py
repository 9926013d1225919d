"""A folder of images, a folder a class, as torchvision's ImageFolder has it, with errors that a user can act on."""

from pathlib import Path

from recipe.data.augment import Crop
from recipe.data.datasets import BadImageError, ImageDataset, OnBadImage
from recipe.data.decoding import UNREADABLE, Decoded, decode, remedy
from recipe.data.folder_index import FolderIndex, index_folder
from recipe.data.pack_format import HEADER


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
        with open(self.name(index), "rb") as file:
            return file.read()

    def image(self, index: int) -> Decoded:
        try:
            return decode(self.file(index))
        except UNREADABLE as error:
            raise BadImageError(
                f"{self.name(index)}: not a readable image ({error}); {remedy(error) or 'mend it'}, or set "
                'recipe.data.on_bad_image to "skip"'
            ) from error

    def name(self, index: int) -> str:
        return self._folder.path(index)


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


def list_imagefolder(path: Path) -> tuple[FolderIndex, FolderIndex]:
    """Return what (``path/train``, ``path/val`` or else ``path/test``) hold, of the same classes; no file is read.

    Raises:
        ValueError: A folder is missing or cannot be listed, a class has no image, or the two parts differ in
            their classes. The message says what is wrong with which path.
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
            raise ValueError(f"{other.root} lacks classes that {one.root} has: {_some(missing)}")
    return train, validation


def list_classes(root: Path) -> FolderIndex:
    """Return what a folder with a folder per class holds; no file is read.

    Raises:
        ValueError: It cannot be listed, holds no class, or a class has no image.
    """
    try:
        folder = index_folder(str(root))
    except OSError as error:
        raise ValueError(f"{root} cannot be listed: {error}") from error
    if not folder.classes:
        raise ValueError(f"{root} holds no class; it should hold a folder a class")
    if empty := {name for name, count in zip(folder.classes, folder.counts, strict=True) if count == 0}:
        raise ValueError(f"{root} holds no image of {_some(empty)}; fill or remove these folders")
    return folder


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
