"""What every data set here is: a function from a key to a sample."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recipe.data.augment import Crop, evaluation_view, sample_rng, training_view
from recipe.data.sampler import PADDING

Key = tuple[int, int] | int
"""(epoch, index) asks for a training sample, an index for a validation sample, ``PADDING`` for a blank."""

OnBadImage = Literal["stop", "skip"]

_HOPELESS = 100
"""So many unreadable images in a row are a disk that has gone, not a data set with a few bad files."""


class Sample(NamedTuple):
    """One image of a batch."""

    image: Tensor
    """uint8 (S, S, 3)."""
    label: int
    weight: float
    """1.0, or 0.0 for a blank that must not count."""
    bad_image: str
    """The file that could not be read and that this sample stands in for; "" if there is none."""


class BadImageError(ValueError):
    """An image that cannot be read; the message names the file and the remedy.

    Takes the message alone, as DataLoader needs it to raise a worker's exception again in the main process.
    """


class ImageDataset(Dataset[Sample], ABC):
    """Labelled images, by key.

    Args:
        labels: The class of every image, in data-set order.
        classes: Number of classes.
        image_size: S, pixels a side of what comes out.
        crop: What training cuts out of an image; validation follows it.
        flip: Whether training mirrors every other image.
        seed: With (epoch, index) the only source of randomness.
        on_bad_image: "stop" raises ``BadImageError``. "skip" trains on the next readable image in data-set
            order, with its own label, and leaves a bad one out of validation; both name it in ``bad_image``.
    """

    def __init__(
        self,
        labels: Sequence[int] | npt.NDArray[np.int64],
        classes: int,
        *,
        image_size: int,
        crop: Crop,
        flip: bool,
        seed: int,
        on_bad_image: OnBadImage = "stop",
    ) -> None:
        # A tensor stays shared with forked workers; a list is copied by and by, as reference counts change.
        self._labels = torch.tensor(labels)
        self.classes = classes
        self._image_size = image_size
        self._crop = crop
        self._flip = flip
        self._seed = seed
        self._on_bad_image = on_bad_image

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return the RGB pixels of image ``index``, uint8 (height, width, 3), which nobody changes.

        Raises:
            BadImageError: It cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message calls image ``index``."""

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of ``key``.

        Raises:
            BadImageError: The image cannot be read and ``on_bad_image`` is "stop", or bad ones have no end.
        """
        if key == PADDING:
            return self._blank()
        if isinstance(key, int):
            return self._validation_sample(key)
        return self._training_sample(*key)

    def _training_sample(self, epoch: int, index: int) -> Sample:
        # The random numbers stay those of the image that was asked for.
        rng = sample_rng(self._seed, epoch, index)
        image, source = self._readable_from(index)
        view = training_view(image, rng, image_size=self._image_size, crop=self._crop, flip=self._flip)
        return Sample(view, int(self._labels[source]), 1.0, "" if source == index else self.name(index))

    def _validation_sample(self, index: int) -> Sample:
        try:
            image = self.image(index)
        except BadImageError:
            if self._on_bad_image == "stop":
                raise
            return self._blank(self.name(index))
        view = evaluation_view(image, image_size=self._image_size, crop=self._crop)
        return Sample(view, int(self._labels[index]), 1.0, "")

    def _readable_from(self, index: int) -> tuple[Tensor, int]:
        for offset in range(min(_HOPELESS, len(self))):
            source = (index + offset) % len(self)
            try:
                return self.image(source), source
            except BadImageError:
                if self._on_bad_image == "stop":
                    raise
        raise BadImageError(f"{self.name(index)}: cannot be read, nor can any of the images that follow it")

    def _blank(self, bad_image: str = "") -> Sample:
        image = torch.zeros(self._image_size, self._image_size, 3, dtype=torch.uint8)
        return Sample(image, 0, 0.0, bad_image)
