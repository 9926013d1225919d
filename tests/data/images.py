"""Images, data sets and loaders for the tests."""

import io
import os
import random
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipe.data import Batch, ImageDataset, Samples, TrainLoader, ValidationLoader
from recipe.data.datasets import Sample
from recipe.data.decoding import Decoded

CPU = torch.device("cpu")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LOADING = {"micro_batch": 4, "rank": 0, "world_size": 1, "workers": 0}
LOADING |= {"device": "cpu", "dtype": torch.float32, "mean": MEAN, "std": STD}


def picture(seed: int = 0, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A smooth random image, so that JPEG preserves it and resizing matters."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def pixels(image: Image.Image) -> Tensor:
    """The pixels as data sets return them: uint8 (height, width, 3)."""
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
    """The training sample at (epoch, index), or the validation sample at an index."""
    epoch, index = (None, key) if isinstance(key, int) else key
    return next(dataset.samples(epoch, [index]))


def train_loader(dataset: Samples, **changes: Any) -> TrainLoader:
    return TrainLoader(dataset, **{"global_batch": 8, "seed": 1} | LOADING | changes)


def validation_loader(dataset: Samples, **changes: Any) -> ValidationLoader:
    return ValidationLoader(dataset, **LOADING | changes)


def load(datasets: Sequence[Samples], epochs: Sequence[int] = (1,), workers: int = 0, **changes: Any) -> list[Batch]:
    """The batches of training epochs and of a validation pass."""
    train = train_loader(datasets[0], workers=workers, **changes)
    validation = validation_loader(datasets[1], workers=workers)
    batches = [batch for epoch in epochs for batch in train.epoch(epoch)] + list(validation.batches())
    train.close()
    validation.close()
    return batches


def assert_same(ours: Iterable[Batch], theirs: Iterable[Batch]) -> None:
    """Assert that batches are bit-identical, and have as many bad images, whose names depend on the source."""
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine.images, expected.images)
        assert torch.equal(mine.labels, expected.labels)
        assert torch.equal(mine.weights, expected.weights)
        assert len(mine.bad_images) == len(expected.bad_images)


def write_folder(root: Path, classes: int = 2, images: int = 3, parts: tuple[str, ...] = ("train", "val")) -> Path:
    """Write ``parts`` with the classes c0, c1, … of ``images`` JPEGs each."""
    for part in parts:
        for label in range(classes):
            folder = root / part / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(images):
                picture(100 * label + number).save(folder / f"{number}.jpg")
    return root


def write_kinds(folder: Path) -> None:
    """Write the kinds of images in a web collection, including some that PIL warns about."""
    folder.mkdir(parents=True)
    picture(0).save(folder / "colour.jpg")
    picture(1).save(folder / "progressive.JPEG", progressive=True)
    picture(2, mode="L").save(folder / "grey.jpg")
    picture(3, mode="CMYK").save(folder / "cmyk.jpeg")
    picture(4).save(folder / "really_a.JPEG", "PNG")
    picture(5, mode="RGBA").save(folder / "alpha.png")
    picture(6, mode="1").save(folder / "bits.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    picture(7).save(folder / "lossless.webp", lossless=True)
    palette = picture(8).convert("P")
    palette.info["transparency"] = bytes([0, 100, 200])
    palette.save(folder / "palette.png")
    rotated, exif = picture(9), Image.Exif()
    exif[0x0112] = 6
    rotated.save(folder / "rotated.jpg", exif=exif)
    rotated.save(folder / "damaged_exif.jpg", exif=exif.tobytes()[:-6] + b"\xff" * 6)
    picture(10).save(folder / "naïve name.jpg")


def spoil(path: Path, how: str) -> None:
    """Damage an image file."""
    good = path.read_bytes()
    if how == "directory in its place":
        path.unlink()
        path.symlink_to(path.parent, target_is_directory=True)
        return
    png = io.BytesIO()
    picture().save(png, "PNG")
    broken_png = png.getvalue()[:40] + bytes([png.getvalue()[40] ^ 0xFF]) + png.getvalue()[41:]
    contents = {"truncated": good[: len(good) // 2], "text": b"no image\n", "empty": b"", "broken PNG": broken_png}
    path.write_bytes(contents[how])


@contextmanager
def no_more_files() -> Iterator[None]:
    """Keep this process from opening any more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:  # all lower descriptors are open
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 1, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def rng_states() -> list:
    """The global random states of Python, numpy and torch, comparable with ==."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()]
