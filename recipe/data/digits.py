"""scikit-learn's 1,797 handwritten digits: real data that ships with a package and trains in seconds."""

from importlib.metadata import distribution
from typing import Unpack

import numpy as np
import torch
from PIL import Image

from recipe.data.datasets import ImageDataset, Options
from recipe.data.decoding import Decoded

_CLASSES = 10


class Digits(ImageDataset):
    """Grey images, uint8 (n, 8, 8), enlarged to the largest image size and held in memory."""

    def __init__(self, greys: np.ndarray, labels: np.ndarray, **options: Unpack[Options]) -> None:
        super().__init__(labels, [str(digit) for digit in range(_CLASSES)], **options)
        size = (self.sizes.largest,) * 2
        enlarged = [np.array(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)) for grey in greys]
        self._images = torch.from_numpy(np.stack(enlarged)).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()

    def image(self, index: int) -> Decoded:
        return Decoded(self._images[index])

    def name(self, index: int) -> str:
        return f"digit {index}"


def open_digits(**options: Unpack[Options]) -> tuple[Digits, Digits]:
    """Return (training, validation); every fifth image of each class, in file order, is for validation.

    This is stratified and, unlike a random split, does not depend on a library's version.
    """
    # Read without importing scikit-learn, which takes seconds.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")
    pixels, labels = rows[:, :-1], rows[:, -1].astype(int)
    greys = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(_CLASSES):
        held_out[np.flatnonzero(labels == label)[4::5]] = True
    return Digits(greys[~held_out], labels[~held_out], **options), Digits(greys[held_out], labels[held_out], **options)
