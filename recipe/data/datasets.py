"""A data set is a function from a key to a sample."""

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, default_collate

from recipe.data.augment import Crop, View, cut, draw_view, evaluation_view, sample_rng
from recipe.data.batch import HostBatch
from recipe.data.decoding import UNREADABLE, Decoded, decode
from recipe.data.sampler import PADDING

Key = tuple[int, int] | int
"""(epoch, index) asks for a training sample, an index for a validation sample, ``PADDING`` for a blank."""

OnBadImage = Literal["stop", "skip"]

_HOPELESS = 100
"""So many unreadable images in a row are a disk that has gone, not a data set with a few bad files."""


class Options(TypedDict):
    """The arguments that all data sets take."""

    image_size: int
    """S, pixels per side of a sample"""
    crop: Crop
    """what training cuts out of an image; validation follows it"""
    flip: bool
    """whether training mirrors every other image"""
    seed: int
    """with (epoch, index) the only source of randomness"""
    on_bad_image: NotRequired[OnBadImage]
    """by default "stop", which raises ``BadImageError``; "skip" trains on the next readable image in data-set order,
    with its own label, leaves a bad one out of validation, and names it in ``Sample.bad_image``"""


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
    """What a loader takes: samples by key in a worker, and their pixels on the device in the main process."""

    decoded_by_pil = 0
    """Images that PIL has decoded beforehand; no batch counts them again."""

    class_names: list[str]
    """What labels mean."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of ``key``; ``BadImageError`` where an image cannot be read and is not to be skipped."""

    def together(self, images: list[Any]) -> Any:
        """Return a batch's ``Sample.image`` as they travel: a tensor, or a named tuple of tensors."""
        return default_collate(images)

    def on_device(self, batch: HostBatch) -> HostBatch:
        """Return the batch with images of uint8 (m, S, S, 3)."""
        return batch


class ImageDataset(Samples):
    """Labelled images in files, by key; ``labels`` are the numbers of their classes, in data-set order."""

    def __init__(
        self, labels: Sequence[int] | npt.NDArray[np.int64], class_names: Sequence[str], **options: Unpack[Options]
    ) -> None:
        # A tensor stays shared with forked workers; a list is copied by and by, as reference counts change.
        self.labels = torch.tensor(labels)
        self.class_names = list(class_names)
        self.classes = len(class_names)
        self.image_size = options["image_size"]
        self.crop = options["crop"]
        self._flip = options["flip"]
        self._seed = options["seed"]
        self._on_bad_image = options.get("on_bad_image", "stop")

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message calls image ``index``."""

    def file(self, index: int) -> bytes:
        """Return the file that holds image ``index``, where there is one; b"" where there is none."""
        return b""

    def image(self, index: int) -> Decoded:
        """Return image ``index``, whose pixels nobody changes, or raise ``BadImageError``."""
        try:
            return decode(self.file(index))
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the fault of the process, not of the image
            where, usual_remedy = self._where_and_remedy(index)
            remedy = getattr(error, "remedy", "") or usual_remedy
            raise BadImageError(
                f'{where}: not a readable image ({error}); {remedy}, or set recipe.data.on_bad_image to "skip"'
            ) from error

    def _where_and_remedy(self, index: int) -> tuple[str, str]:
        return self.name(index), "mend it"

    def view(self, key: Key, height: int, width: int) -> View:
        """Return what ``key`` sees of an image of (height, width) pixels."""
        if isinstance(key, int):
            return evaluation_view(height, width, image_size=self.image_size, crop=self.crop)
        rng = sample_rng(self._seed, *key)
        return draw_view(rng, height, width, image_size=self.image_size, crop=self.crop, flip=self._flip)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> Sample:
        if key == PADDING:
            return self._blank()
        training, index = (False, key) if isinstance(key, int) else (True, key[1])
        try:
            (pixels, by_pil), source = self.readable_from(index) if training else (self.image(index), index)
        except BadImageError:
            if training or self._on_bad_image == "stop":
                raise
            return self._blank(self.name(index))
        # The random numbers stay those of the image that was asked for.
        view = self.view(key, *pixels.shape[:2])
        bad_image = "" if source == index else self.name(index)
        image = cut(pixels, view, self.image_size)
        return Sample(image, int(self.labels[source]), 1.0, view.mirrored, bad_image, by_pil)

    def readable_from(self, index: int) -> tuple[Decoded, int]:
        """Return image ``index``, or where it is bad and may be skipped the next readable one, and its index."""
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
