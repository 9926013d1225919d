"""Opens the data sets that a config names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from recipe.data.augment import Crop, Erasing
from recipe.data.auto_augment import AutoAugment
from recipe.data.datasets import ImageDataset, OnBadImage, Options, Samples
from recipe.data.device_decoding import EncodedImages, open_decoder
from recipe.data.digits import open_digits
from recipe.data.folder_index import held_out_folder, list_classes, list_imagefolder
from recipe.data.held import HeldImages
from recipe.data.huggingface_index import is_huggingface, list_huggingface, list_validation
from recipe.data.image_files import HubImages, ImageFiles
from recipe.data.pack import open_pack
from recipe.data.pack_format import HEADER
from recipe.data.synthetic import SyntheticImages


def open_datasets(
    source: Literal["digits", "imagefolder", "pack", "huggingface"],
    path: str | Path | None,
    *,
    pack_short_side: int | None = None,
    pack_raw: bool | None = None,
    validation_share: float | None = None,
    **options: Unpack[Options],
) -> tuple[ImageDataset, ImageDataset]:
    """Return (training, validation), without a process group, so that errors show before one is started.

    See ``open_pack`` for ``pack_short_side`` and ``pack_raw``, and ``list_imagefolder`` and ``list_huggingface`` for
    ``validation_share``. ``path`` is a folder, the name of a data set on the hub, or None for digits.

    Raises:
        ValueError: The data is missing or unsuitable; see these functions.
        BadImageError: The first image cannot be read and may not be skipped, or none of the following can be read.
    """
    if source == "digits":
        return open_digits(**options)
    if path is None:
        raise ValueError(f'recipe.data.path: missing; source "{source}" needs the folder with train/ and val/')
    training: ImageDataset
    validation: ImageDataset
    try:
        if source == "pack":
            training, validation = open_pack(path, short_side=pack_short_side, raw=pack_raw, **options)
        elif source == "huggingface":
            splits = list_huggingface(str(path), validation_share)
            training, validation = (HubImages(split, **options) for split in splits)
        else:
            folders = list_imagefolder(Path(path), validation_share)
            training, validation = (ImageFiles(folder, **options) for folder in folders)
    except ValueError as error:
        raise ValueError(f"recipe.data.path: {error}") from error
    for dataset in (training, validation):
        dataset.readable_from(0)  # shows at once, not after an epoch, if none of its images can be read
    return training, validation


def recognise(path: str | Path) -> Literal["imagefolder", "pack", "huggingface"]:
    """Return the kind of data at a path, judging by its content; an imagefolder if it is nothing else."""
    if is_huggingface(str(path)):
        return "huggingface"
    return "pack" if Path(path, HEADER).is_file() else "imagefolder"


def open_validation(
    path: str | Path,
    source: str | None = None,
    *,
    image_size: int,
    crop: Crop,
    on_bad_image: OnBadImage,
    validation_share: float | None = None,
) -> ImageDataset:
    """Return labelled images to evaluate on: the validation part of a data set, or a folder with a folder per class.

    ``source`` and ``validation_share`` are those of the run if this is its data; without a source, the content decides.
    Raises a ValueError if the path contains no such data.
    """
    options = Options(image_size=image_size, crop=crop, flip=False, seed=0, on_bad_image=on_bad_image)
    source = source or recognise(path)
    if source == "huggingface":
        return HubImages(list_validation(str(path), validation_share), **options)
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    if validation_share is not None:
        return ImageFiles(list_imagefolder(path, validation_share)[1], **options)
    if source == "pack":
        return open_pack(path, **options)[1]
    held_out = held_out_folder(path)
    if held_out is None and [entry.name for entry in path.iterdir() if entry.is_dir()] == ["train"]:
        raise ValueError(f"{path} has neither val/ nor test/ beside train/; name {path / 'train'}, or another folder")
    return ImageFiles(list_classes(held_out or path), **options)


def open_samples(
    section: Mapping[str, Any], *, classes: int, seed: int, device: torch.device, workers: int
) -> tuple[Samples, Samples]:
    """Return (training, validation) for the loaders: read by workers, decoded on the device, or held on it.

    ``section`` is ``recipe.data`` of a resolved config, as a dict. ``workers`` is the number of loader processes, and
    of threads for the decoder "dali". Raises the errors of ``open_datasets``, ``open_decoder`` and ``HeldImages``.
    """
    training: Samples
    validation: Samples
    sizes = {key: section[key] for key in ("image_size", "validation_image_size")}
    if section["source"] == "synthetic":
        training, validation = (
            SyntheticImages(section[key], classes=classes, **sizes, seed=seed, device=device)
            for key in ("train_images", "validation_images")
        )
        return training, validation
    decoder = None
    if section["decoder"] != "cpu":
        decoder = open_decoder(section["decoder"], device, threads=max(1, workers))
    augment = None
    if section["augment"] != "none":
        augment = AutoAugment(section["augment"], section.get("augment_magnitude"), seed)
    own = ("source", "crop", "flip", "on_bad_image", "pack_short_side", "pack_raw", "validation_share")
    options = {key: section[key] for key in own} | sizes
    datasets = open_datasets(path=section.get("path"), **options, seed=seed, augment=augment)
    training, validation = datasets
    if decoder is not None:
        training, validation = (EncodedImages(part, decoder, device) for part in datasets)
    elif section["on_device"] or (section["source"] == "digits" and augment is None):
        training, validation = (HeldImages(part, device, training=part is datasets[0]) for part in datasets)
    if section["random_erasing"]:
        training.erasing = Erasing(section["random_erasing"], seed)
    return training, validation
