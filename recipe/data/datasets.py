"""What every data set here is: a function from a key to a sample."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, default_collate

from recipe.data.augment import Crop, View, cut, draw_view, evaluation_view, sample_rng
from recipe.data.batch import HostBatch
from recipe.data.decoding import Decoded
from recipe.data.sampler import PADDING

Key = tuple[int, int] | int
"""(epoch, index) asks for a training sample, an index for a validation sample, ``PADDING`` for a blank."""

OnBadImage = Literal["stop", "skip"]

_HOPELESS = 100
"""So many unreadable images in a row are a disk that has gone, not a data set with a few bad files."""


class Sample(NamedTuple):
    """One image of a batch."""

    image: Any
    """uint8 (S, S, 3), not yet mirrored, where the data set does not leave it to the device to make that."""
    label: int
    weight: float = 1.0
    """0.0 for a blank that must not count."""
    mirrored: bool = False
    """Whether the device is to mirror it."""
    bad_image: str = ""
    """The file that could not be read and that this sample stands in for; "" if there is none."""
    by_pil: bool = False
    """See ``Decoded``."""


class BadImageError(ValueError):
    """An image that cannot be read; the message names the file and the remedy.

    Takes the message alone, as DataLoader needs it to raise a worker's exception again in the main process.
    """


class Samples(Dataset[Sample], ABC):
    """What a loader takes: samples by key in a worker, and in the main process the way from a batch to its pixels."""

    decoded_by_pil = 0
    """Images that PIL has decoded beforehand; no batch counts them again."""

    class_names: list[str]
    """What labels mean."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: Key) -> Sample: ...

    def together(self, images: list[Any]) -> Any:
        """Return a batch's ``Sample.image`` as they travel: a tensor, or a named tuple of tensors."""
        return default_collate(images)

    def on_device(self, batch: HostBatch) -> HostBatch:
        """Return the batch with images of uint8 (m, S, S, 3)."""
        return batch


class ImageDataset(Samples):
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
        self.labels = torch.tensor(labels)
        self.classes = classes
        self.image_size = image_size
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self._on_bad_image = on_bad_image

    @abstractmethod
    def image(self, index: int) -> Decoded:
        """Return image ``index``, whose pixels nobody changes.

        Raises:
            BadImageError: It cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message calls image ``index``."""

    def file(self, index: int) -> bytes:
        """Return the file that holds image ``index``, where there is one; b"" where there is none.

        Raises:
            OSError: It cannot be read.
        """
        return b""

    def view(self, key: tuple[int, int] | int, height: int, width: int) -> View:
        """Return what ``key`` sees of an image of (height, width) pixels."""
        if isinstance(key, int):
            return evaluation_view(height, width, image_size=self.image_size, crop=self.crop)
        rng = sample_rng(self.seed, *key)
        return draw_view(rng, height, width, image_size=self.image_size, crop=self.crop, flip=self.flip)

    def __len__(self) -> int:
        return len(self.labels)

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
        (pixels, by_pil), source = self.readable_from(index)
        # The random numbers stay those of the image that was asked for.
        view = self.view((epoch, index), *pixels.shape[:2])
        image = cut(pixels, view, self.image_size)
        bad_image = "" if source == index else self.name(index)
        return Sample(image, int(self.labels[source]), 1.0, view.mirrored, bad_image, by_pil)

    def _validation_sample(self, index: int) -> Sample:
        try:
            pixels, by_pil = self.image(index)
        except BadImageError:
            if self._on_bad_image == "stop":
                raise
            return self._blank(self.name(index))
        view = self.view(index, *pixels.shape[:2])
        return Sample(cut(pixels, view, self.image_size), int(self.labels[index]), by_pil=by_pil)

    def readable_from(self, index: int) -> tuple[Decoded, int]:
        """Return image ``index``, or where it is bad and may be skipped the next readable one, and its index.

        Raises:
            BadImageError: See ``__getitem__``.
        """
        first: BadImageError | None = None
        for offset in range(min(_HOPELESS, len(self))):
            source = (index + offset) % len(self)
            try:
                return self.image(source), source
            except BadImageError as error:
                if self._on_bad_image == "stop":
                    raise
                first = first or error
        assert first is not None, "there are images"
        raise BadImageError(
            f"{self.name(index)}: cannot be read ({first.__cause__}), nor can any of the images that follow it"
        ) from first

    def _blank(self, bad_image: str = "") -> Sample:
        image = torch.zeros(self.image_size, self.image_size, 3, dtype=torch.uint8)
        return Sample(image, 0, 0.0, bad_image=bad_image)
