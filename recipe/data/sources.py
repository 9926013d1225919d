"""From the folder of a config to its data sets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from recipe.data.augment import Crop
from recipe.data.auto_augment import AutoAugment
from recipe.data.datasets import ImageDataset, OnBadImage, Samples
from recipe.data.decoders import open_decoder
from recipe.data.digits import open_digits
from recipe.data.encoded import EncodedImages
from recipe.data.erasing import Erasing
from recipe.data.folder_index import held_out_folder, list_classes
from recipe.data.held import HeldImages
from recipe.data.huggingface import HubImages, open_huggingface
from recipe.data.huggingface_index import is_huggingface, list_validation
from recipe.data.imagefolder import ImageFiles, open_imagefolder
from recipe.data.loader import TrainLoader, ValidationLoader
from recipe.data.pack import open_pack
from recipe.data.pack_format import HEADER
from recipe.data.synthetic import SyntheticImages, SyntheticLoader


def open_datasets(
    source: Literal["digits", "imagefolder", "pack", "huggingface"],
    path: str | Path | None,
    image_size: int | Sequence[tuple[int, int]],
    crop: Crop,
    flip: bool,
    seed: int,
    on_bad_image: OnBadImage,
    pack_short_side: int | None = None,
    pack_raw: bool | None = None,
    validation_share: float | None = None,
    validation_image_size: int | None = None,
    augment: AutoAugment | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Return (training, validation); needs no process group, so that what is wrong shows before one starts.

    Args:
        source: "digits" comes with scikit-learn, "imagefolder" is a folder of images, "pack" is
            what ``python -m recipe pack`` makes of one, "huggingface" is what the package ``datasets`` loads.
        path: The folder of "imagefolder", "pack" or "huggingface", or the name of the last on the hub.
        image_size, crop, flip, seed, on_bad_image, validation_image_size, augment: See ``Options``.
        pack_short_side, pack_raw: See ``open_pack``.
        validation_share: See ``list_imagefolder`` and ``list_huggingface``.

    Raises:
        ValueError: The folder is not what it should be; see these and ``open_pack``.
        BadImageError: The first image of one cannot be read, and is not to be skipped, or none that follows, either.
    """
    sizes = {"image_size": image_size, "validation_image_size": validation_image_size}
    views: dict[str, Any] = {**sizes, "crop": crop, "flip": flip, "seed": seed, "augment": augment}
    if source == "digits":
        return open_digits(**views)
    if path is None:
        raise ValueError(f'recipe.data.path: missing; source "{source}" needs the folder that holds train/ and val/')
    datasets: tuple[ImageDataset, ImageDataset]
    if source == "pack":
        datasets = open_pack(path, **views, on_bad_image=on_bad_image, short_side=pack_short_side, raw=pack_raw)
    else:
        opened = open_huggingface if source == "huggingface" else open_imagefolder
        datasets = opened(path, validation_share, **views, on_bad_image=on_bad_image)
    for dataset in datasets:
        dataset.readable_from(0)  # what no image can be read of shall not show after an epoch
    return datasets


def recognise(path: str | Path) -> Literal["imagefolder", "pack", "huggingface"]:
    """What lies at a path, by its content: where it is none of the others, folders of images."""
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
    """Return labelled images to evaluate on: the part of a data set that is held out, or a folder per class.

    Args:
        path: See ``open_datasets``.
        source: That of the run whose data it is; for None see ``recognise``.
        image_size, crop, on_bad_image: See ``ImageDataset``.
        validation_share: That of the run, if its data was split.

    Raises:
        ValueError: It is none of these.
    """
    common: dict[str, Any] = {
        "image_size": image_size,
        "crop": crop,
        "flip": False,
        "seed": 0,
        "on_bad_image": on_bad_image,
    }
    source = source or recognise(path)
    if source == "huggingface":
        return HubImages(list_validation(str(path), validation_share), **common)
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    if validation_share is not None:
        return open_imagefolder(path, validation_share, **common)[1]
    if source == "pack":
        return open_pack(path, **common)[1]
    held_out = held_out_folder(path)
    if held_out is None and [entry.name for entry in path.iterdir() if entry.is_dir()] == ["train"]:
        raise ValueError(f"{path} has neither val/ nor test/ beside train/; name {path / 'train'}, or another folder")
    return ImageFiles(list_classes(held_out or path), **common)


def open_samples(
    section: Mapping[str, Any], *, classes: int, seed: int, device: torch.device, workers: int
) -> tuple[Samples, Samples] | SyntheticImages:
    """Return (training, validation) as the loaders take them: read by workers, decoded by the device, or held on it.

    Args:
        section: ``recipe.data`` of a resolved config, as a dict.
        classes: Number of classes.
        seed: The run's.
        device: That of the batches.
        workers: Loader processes; the decoder "dali" has as many threads.

    Raises:
        ValueError: See ``open_datasets``, ``open_decoder`` and ``HeldImages``.
    """
    sizes = {key: section[key] for key in ("image_size", "validation_image_size")}
    if section["source"] == "synthetic":
        return SyntheticImages(section["train_images"], section["validation_images"], classes, **sizes)
    decoder = None
    if section["decoder"] != "cpu":
        decoder = open_decoder(section["decoder"], device, threads=max(1, workers))
    augment = None
    if section["augment"] != "none":
        augment = AutoAugment(section["augment"], section.get("augment_magnitude"), seed)
    datasets = open_datasets(
        section["source"],
        section.get("path"),
        **sizes,
        crop=section["crop"],
        flip=section["flip"],
        seed=seed,
        on_bad_image=section["on_bad_image"],
        pack_short_side=section["pack_short_side"],
        pack_raw=section["pack_raw"],
        validation_share=section["validation_share"],
        augment=augment,
    )
    training: Samples
    validation: Samples
    training, validation = datasets
    if decoder is not None:
        training, validation = (EncodedImages(part, decoder, device) for part in datasets)
    elif section["on_device"] or (section["source"] == "digits" and augment is None):
        training, validation = (HeldImages(part, device, training=part is datasets[0]) for part in datasets)
    if section["random_erasing"]:
        training.erasing = Erasing(section["random_erasing"], seed)
    return training, validation


def describe_data(samples: tuple[Samples, Samples] | SyntheticImages) -> dict[str, Any]:
    """``classes``, their names in the order of their numbers, and a ``digest`` of the images; empty if synthetic."""
    if isinstance(samples, SyntheticImages):
        return {"classes": [], "digest": ""}
    return {"classes": samples[0].class_names, "digest": " ".join(part.digest for part in samples)}


def decoded_beforehand(samples: tuple[Samples, Samples] | SyntheticImages) -> int:
    """Images for which the slower decoder was needed when they were taken into memory."""
    return 0 if isinstance(samples, SyntheticImages) else sum(part.decoded_by_pil for part in samples)


def open_loaders(
    samples: tuple[Samples, Samples] | SyntheticImages,
    *,
    global_batch: int,
    batch_changes: Sequence[tuple[int, int]] = (),
    seed: int,
    workers: int,
    **common: Any,
) -> tuple[TrainLoader | SyntheticLoader, ValidationLoader | SyntheticLoader]:
    """Return this rank's loaders of training and validation data; ``common`` is what both take, see ``TrainLoader``."""
    order: dict[str, Any] = {"global_batch": global_batch, "batch_changes": batch_changes, "seed": seed}
    if isinstance(samples, SyntheticImages):
        loader = SyntheticLoader(**asdict(samples), **order, **common)
        return loader, loader
    training, validation = samples
    return (
        TrainLoader(training, **order, workers=workers, **common),
        ValidationLoader(validation, workers=workers, **common),
    )
