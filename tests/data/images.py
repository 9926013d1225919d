"""Images for the tests: made on the spot, in every shape that image folders are met in."""

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipe.data import Batch, ImageDataset
from recipe.data.datasets import Sample
from recipe.data.decoding import Decoded

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def picture(seed: int = 0, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A smooth random image, so that JPEG keeps it and a resize matters."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def pixels(image: Image.Image) -> Tensor:
    """As the data sets hand an image on: uint8 (height, width, 3)."""
    return torch.from_numpy(np.array(image.convert("RGB")))


class Pictures(ImageDataset):
    """Pictures of three classes and several sizes, in memory."""

    def __init__(self, length: int = 23, *, crop: str = "random_resized", image_size: Any = 16, **options: Any) -> None:
        labels = [index % 3 for index in range(length)]
        super().__init__(labels, ["a", "b", "c"], image_size=image_size, crop=crop, flip=True, seed=5, **options)

    def image(self, index: int) -> Decoded:
        return Decoded(pixels(picture(index, width=20 + index)))

    def name(self, index: int) -> str:
        return f"picture {index}"


def sample(dataset: ImageDataset, key: tuple[int, int] | int) -> Sample:
    """The sample of training that (epoch, index) asks for, or of validation at an index."""
    epoch, index = (None, key) if isinstance(key, int) else key
    return next(dataset.samples(epoch, [index]))


def assert_same(ours: Iterable[Batch], theirs: Iterable[Batch]) -> None:
    """The same batches, to the bit."""
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine.images, expected.images)
        assert torch.equal(mine.labels, expected.labels)
        assert torch.equal(mine.weights, expected.weights)
        assert mine.bad_images == expected.bad_images


def write_folder(root: Path, classes: int = 2, images: int = 3, parts: tuple[str, ...] = ("train", "val")) -> Path:
    """Write ``parts``, each with as many JPEGs in each of the classes c0, c1, …"""
    for part in parts:
        for label in range(classes):
            folder = root / part / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(images):
                picture(100 * label + number).save(folder / f"{number}.jpg")
    return root


@contextmanager
def no_more_files() -> Iterator[None]:
    """While it lasts this process can open none."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:  # all that are below it are open
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def rng_states() -> list:
    """The global random states of Python, numpy and torch, comparable with ==."""
    import random

    kind, keys, *rest = np.random.get_state(legacy=True)
    return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()]
