"""Data sets as functions from keys to samples."""

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from recipe.config import printable
from recipe.data.augment import Crop, Erasing, View, cut, draw_views, evaluation_view
from recipe.data.auto_augment import AutoAugment
from recipe.data.batch import HostBatch
from recipe.data.decoding import UNREADABLE, Decoded, decode
from recipe.data.sampler import PADDING, Keys

OnBadImage = Literal["stop", "skip"]

_UNCUT_BYTES = 2**24
"""Decoded images to keep in memory before their views are drawn together, in bytes."""

_NO_NAMES = np.empty(0, np.uint8)

_MOST_BAD_IN_A_ROW = 100
"""More unreadable images in a row mean a failed disk, not a data set with a few bad files."""


class Sizes:
    """Pixels per side of the samples, S: one training size or (epoch, S from then on) in ascending order from epoch 0.

    The validation size defaults to the last training size.
    """

    def __init__(self, training: int | Sequence[tuple[int, int]], validation: int | None = None) -> None:
        self.training = ((0, training),) if isinstance(training, int) else tuple(training)
        self.validation = validation or self.training[-1][1]
        self.largest = max(self.validation, *(size for _, size in self.training))

    def at(self, epoch: int | None) -> int:
        """Return S in a training epoch, or in validation for None."""
        if epoch is None:
            return self.validation
        return next(size for first_epoch, size in reversed(self.training) if first_epoch <= epoch)


class Options(TypedDict):
    """The arguments that all data sets take."""

    image_size: int | Sequence[tuple[int, int]]
    validation_image_size: NotRequired[int | None]
    """see ``Sizes``"""
    crop: Crop
    """how training images are cropped; validation follows it"""
    flip: bool
    """whether half of the training images are mirrored"""
    augment: NotRequired[AutoAugment | None]
    """further augmentation of training images"""
    seed: int
    """with (epoch, index) the only source of randomness"""
    on_bad_image: NotRequired[OnBadImage]
    """By default "stop", which raises ``BadImageError``. "skip" trains on the next readable image in data-set order,
    with its own label, leaves a bad image out of validation, and names it in ``Sample.bad_image``"""


class Sample(NamedTuple):
    """One image of a batch."""

    image: Tensor
    """uint8 (S, S, 3), not yet mirrored"""
    label: int
    weight: float = 1.0
    """0.0 for a blank that does not count"""
    mirrored: bool = False
    """whether the device has to mirror it"""
    bad_image: str = ""
    """the unreadable file that this sample replaces, or "" """
    by_pil: bool = False
    """see ``Decoded``"""


class BadImageError(ValueError):
    """An image that cannot be read; the message names the file and the remedy.

    It takes only the message, because DataLoader re-raises a worker's exception in the main process that way.
    """


class Samples(Dataset[HostBatch], ABC):
    """What a loader reads: batches in a worker, by their keys, completed on the device in the main process."""

    decoded_by_pil = 0
    """images that PIL has already decoded, which no batch counts again"""

    class_names: list[str]
    """the names of the classes, by label"""

    digest: str
    """hash of every image's class and file name, if it has one, in data-set order; a folder and its pack share it"""

    erasing: Erasing | None = None
    """random erasing, which the loader applies in training"""

    waits_for_device = False
    """whether ``on_device`` waits for the device; the loader then calls it in a thread, so that training need not"""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, keys: Keys) -> HostBatch:
        """Return a batch for the host; ``BadImageError`` if an image cannot be read and is not to be skipped."""

    def on_device(self, batch: HostBatch) -> HostBatch:
        """Return the batch with its images as uint8 (m, S, S, 3)."""
        return batch


class ImageDataset(Samples):
    """Labelled images in files, by key.

    ``labels`` are class numbers in data-set order; ``names`` are the concatenated file names, in which zero bytes do
    not count.
    """

    def __init__(
        self,
        labels: Sequence[int] | npt.NDArray[np.int64],
        class_names: Sequence[str],
        names: npt.NDArray[np.uint8] = _NO_NAMES,
        **options: Unpack[Options],
    ) -> None:
        # A tensor stays shared with forked workers; a list would gradually be copied as reference counts change.
        self.labels = torch.tensor(labels)
        self.class_names = list(map(printable, class_names))
        self.classes = len(class_names)
        digest = hashlib.sha256(np.asarray(labels, np.int64).data)
        digest.update(names[names != 0])
        self.digest = digest.hexdigest()
        self.sizes = Sizes(options["image_size"], options.get("validation_image_size"))
        self.crop = options["crop"]
        self._flip = options["flip"]
        self._augment = options.get("augment")
        self._seed = options["seed"]
        self._on_bad_image = options.get("on_bad_image", "stop")

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages."""

    def file(self, index: int) -> bytes:
        """Return the content of the file of image ``index``; empty if it has none."""
        return b""

    def decoded(self, index: int) -> Decoded:
        """Return image ``index``, or raise one of ``UNREADABLE``."""
        return decode(self.file(index))

    def image(self, index: int) -> Decoded:
        """Return image ``index``, whose pixels must not be modified, or raise ``BadImageError``."""
        try:
            return self.decoded(index)
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the process has too many open files; the image is fine
            where, usual_remedy = self._where_and_remedy(index)
            remedy = getattr(error, "remedy", "") or usual_remedy
            raise BadImageError(
                f'{where}: not a readable image ({error}); {remedy}, or set recipe.data.on_bad_image to "skip"'
            ) from error

    def _where_and_remedy(self, index: int) -> tuple[str, str]:
        return self.name(index), "fix it"

    def views(self, epoch: int | None, indices: Tensor, sizes: Tensor) -> Tensor:
        """Return the views of images of ``sizes`` in a training epoch, or in validation for None."""
        image_size = self.sizes.at(epoch)
        if epoch is None:
            views = [evaluation_view(*size, image_size=image_size, crop=self.crop) for size in sizes.tolist()]
            return torch.tensor(views, dtype=torch.int64).view(-1, len(View._fields))
        return draw_views(self._seed, epoch, indices, sizes, image_size=image_size, crop=self.crop, flip=self._flip)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, keys: Keys) -> HostBatch:
        samples = list(self.samples(keys.epoch, keys.indices.tolist()))
        return collate(samples, default_collate([sample.image for sample in samples]))

    def samples(self, epoch: int | None, indices: Sequence[int]) -> Iterator[Sample]:
        """Yield the samples at ``indices`` of a training epoch, or of validation for None."""
        first, uncut, uncut_bytes = 0, [], 0
        for end, index in enumerate(indices, 1):
            uncut.append(self.uncut(epoch, index))
            uncut_bytes += uncut[-1].image.numel()
            if end == len(indices) or uncut_bytes > _UNCUT_BYTES:
                uncut_sizes = torch.tensor([sample.image.shape[:2] for sample in uncut])
                # Random numbers belong to the requested image, even if a different one replaces it.
                requested = torch.tensor(indices[first:end])
                views = [View(*row) for row in self.views(epoch, requested, uncut_sizes).tolist()]
                size = self.sizes.at(epoch)
                images: Iterator[Tensor] = (
                    cut(sample.image, view, size) for sample, view in zip(uncut, views, strict=True)
                )
                if epoch is not None and self._augment is not None:
                    images = self._augment(images, epoch, requested)
                for sample, view, image in zip(uncut, views, images, strict=True):
                    yield sample._replace(image=image, mirrored=bool(view.mirrored))
                first, uncut, uncut_bytes = end, [], 0

    def uncut(self, epoch: int | None, index: int) -> Sample:
        """Return the sample of a training epoch, or of validation for None, with its whole image."""
        if index == PADDING:
            return self._blank()
        try:
            (pixels, by_pil), source = (self.image(index), index) if epoch is None else self.readable_from(index)
        except BadImageError:
            if epoch is not None or self._on_bad_image == "stop":
                raise
            return self._blank(self.name(index))
        bad_image = "" if source == index else self.name(index)
        return Sample(pixels, int(self.labels[source]), bad_image=bad_image, by_pil=by_pil)

    def readable_from(self, index: int) -> tuple[Decoded, int]:
        """Return image ``index`` and its index, or the next readable image if it is bad and may be skipped."""
        first: BadImageError | None = None
        for offset in range(min(_MOST_BAD_IN_A_ROW, len(self))):
            source = (index + offset) % len(self)
            try:
                return self.image(source), source
            except BadImageError as error:
                if self._on_bad_image == "stop":
                    raise
                first = first or error
        assert first is not None, "a data set has images"
        raise BadImageError(
            f"{self.name(index)}: cannot be read ({first.__cause__}), nor can any of the images that follow it"
        ) from first

    def _blank(self, bad_image: str = "") -> Sample:
        """Return a validation sample that does not count."""
        image = torch.zeros(self.sizes.validation, self.sizes.validation, 3, dtype=torch.uint8)
        return Sample(image, 0, 0.0, bad_image=bad_image)


def collate(samples: Sequence[Sample], images: Any) -> HostBatch:
    """Return a batch of the samples, with ``images`` in whatever form ``Samples.on_device`` expects."""
    return HostBatch(
        images,
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([sample.weight for sample in samples]),
        torch.tensor([sample.mirrored for sample in samples]),
        [sample.bad_image for sample in samples if sample.bad_image],
        sum(sample.by_pil for sample in samples),
    )
