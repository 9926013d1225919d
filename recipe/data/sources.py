"""From the folder of a config to its data sets."""

from pathlib import Path
from typing import Any, Literal

from recipe.data.augment import Crop
from recipe.data.datasets import ImageDataset, OnBadImage
from recipe.data.digits import open_digits
from recipe.data.folder_index import list_classes
from recipe.data.imagefolder import ImageFiles, open_imagefolder
from recipe.data.pack import open_pack
from recipe.data.pack_format import HEADER


def open_datasets(
    source: Literal["digits", "imagefolder", "pack"],
    path: str | Path | None,
    image_size: int,
    crop: Crop,
    flip: bool,
    seed: int,
    on_bad_image: OnBadImage,
    pack_short_side: int | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Return (training, validation); needs no process group, so that what is wrong shows before one starts.

    Args:
        source: "digits" comes with scikit-learn, "imagefolder" is a folder of images, "pack" is
            what ``python -m recipe pack`` makes of one.
        path: The folder of "imagefolder" or "pack".
        image_size, crop, flip, seed, on_bad_image: See ``ImageDataset``.
        pack_short_side: See ``open_pack``.

    Raises:
        ValueError: The folder is not what it should be; see ``open_imagefolder`` and ``open_pack``.
        BadImageError: The first image of one cannot be read, and is not to be skipped, or none that follows, either.
    """
    if source == "digits":
        return open_digits(image_size=image_size, crop=crop, flip=flip, seed=seed)
    if path is None:
        raise ValueError(f'recipe.data.path: missing; source "{source}" needs the folder that holds train/ and val/')
    views: dict[str, Any] = {"image_size": image_size, "crop": crop, "flip": flip, "seed": seed}
    datasets: tuple[ImageDataset, ImageDataset]
    if source == "pack":
        datasets = open_pack(path, **views, on_bad_image=on_bad_image, short_side=pack_short_side)
    else:
        datasets = open_imagefolder(path, **views, on_bad_image=on_bad_image)
    for dataset in datasets:
        dataset.readable_from(0)  # what no image can be read of shall not show after an epoch
    return datasets


def open_validation(path: Path, *, image_size: int, crop: Crop, on_bad_image: OnBadImage) -> ImageDataset:
    """Return labelled images to evaluate on: the ``val/`` or ``test/`` of a folder or pack, or a folder per class.

    Args:
        path: The folder that holds one of these.
        image_size, crop, on_bad_image: See ``ImageDataset``.

    Raises:
        ValueError: The folder is none of these.
    """
    common: dict[str, Any] = {
        "image_size": image_size,
        "crop": crop,
        "flip": False,
        "seed": 0,
        "on_bad_image": on_bad_image,
    }
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    if (path / HEADER).is_file():
        return open_pack(path, **common)[1]
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), path)
    return ImageFiles(list_classes(held_out), **common)
