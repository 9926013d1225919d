"""A data set is a function from keys to samples."""

import errno
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, Self, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from recipe.config import printable
from recipe.data.augment import Crop, View, cut, draw_views, evaluation_view
from recipe.data.auto_augment import AutoAugment
from recipe.data.batch import HostBatch
from recipe.data.decoding import UNREADABLE, Decoded, decode
from recipe.data.erasing import Erasing
from recipe.data.sampler import PADDING, Keys

OnBadImage = Literal["stop", "skip"]

_WHOLE_BYTES = 2**24
"""Of decoded images that wait for the others with which their views are drawn."""

_NO_NAMES = np.empty(0, np.uint8)

_HOPELESS = 100
"""So many unreadable images in a row are a disk that has gone, not a data set with a few bad files."""


class Sizes(NamedTuple):
    """Pixels per side of samples, S."""

    training: Sequence[tuple[int, int]]
    """(epoch, S from that on), the epochs rising from 0"""
    validation: int

    @classmethod
    def of(cls, training: int | Sequence[tuple[int, int]], validation: int | None) -> Self:
        """From one size or several, and that of validation, which by default is the last of them."""
        changes = ((0, training),) if isinstance(training, int) else training
        return cls(changes, validation or changes[-1][1])

    def at(self, epoch: int | None) -> int:
        """Return S in an epoch; in validation for None."""
        if epoch is None:
            return self.validation
        return next(size for first_epoch, size in reversed(self.training) if first_epoch <= epoch)

    @property
    def all(self) -> set[int]:
        """Every S."""
        return {self.validation, *(size for _, size in self.training)}


class Options(TypedDict):
    """The arguments that all data sets take."""

    image_size: int | Sequence[tuple[int, int]]
    validation_image_size: NotRequired[int | None]
    """with the former: see ``Sizes.of``"""
    crop: Crop
    """what training cuts out of an image; validation follows it"""
    flip: bool
    """whether training mirrors every other image"""
    augment: NotRequired[AutoAugment | None]
    """what else is done to the images of training"""
    seed: int
    """with (epoch, index) the only source of randomness"""
    on_bad_image: NotRequired[OnBadImage]
    """by default "stop", which raises ``BadImageError``; "skip" trains on the next readable image in data-set order,
    with its own label, leaves a bad one out of validation, and names it in ``Sample.bad_image``"""


class Sample(NamedTuple):
    """One image of a batch."""

    image: Tensor
    """uint8 (S, S, 3), not yet mirrored"""
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


class Samples(Dataset[HostBatch], ABC):
    """What a loader takes: batches by their keys in a worker, and their pixels on the device in the main process."""

    decoded_by_pil = 0
    """Images that PIL has decoded beforehand; no batch counts them again."""

    class_names: list[str]
    """What labels mean."""

    digest: str
    """Of every image's class and, where it is a file, its name, in data-set order; the same for a pack of a folder."""

    erasing: Erasing | None = None
    """What the loader erases of them in training."""

    waits_for_device = False
    """Whether ``on_device`` waits for the device, which the training then need not do: it gets a thread of its own."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, keys: Keys) -> HostBatch:
        """Return a batch as it travels; ``BadImageError`` where an image cannot be read and is not to be skipped."""

    def on_device(self, batch: HostBatch) -> HostBatch:
        """Return the batch with images of uint8 (m, S, S, 3)."""
        return batch


class ImageDataset(Samples):
    """Labelled images in files, by key; ``labels`` are the numbers of their classes, in data-set order.

    ``names`` are the files' names end to end, zero bytes aside.
    """

    def __init__(
        self,
        labels: Sequence[int] | npt.NDArray[np.int64],
        class_names: Sequence[str],
        names: npt.NDArray[np.uint8] = _NO_NAMES,
        **options: Unpack[Options],
    ) -> None:
        # A tensor stays shared with forked workers; a list is copied by and by, as reference counts change.
        self.labels = torch.tensor(labels)
        self.class_names = list(map(printable, class_names))
        self.classes = len(class_names)
        digest = hashlib.sha256(np.asarray(labels, np.int64).data)
        digest.update(names[names != 0])
        self.digest = digest.hexdigest()
        self.sizes = Sizes.of(options["image_size"], options.get("validation_image_size"))
        self.crop = options["crop"]
        self._flip = options["flip"]
        self._augment = options.get("augment")
        self._seed = options["seed"]
        self._on_bad_image = options.get("on_bad_image", "stop")

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message calls image ``index``."""

    def file(self, index: int) -> bytes:
        """Return the file that holds image ``index``, where there is one; b"" where there is none."""
        return b""

    def decoded(self, index: int) -> Decoded:
        """Return image ``index``, or raise one of ``UNREADABLE``."""
        return decode(self.file(index))

    def image(self, index: int) -> Decoded:
        """Return image ``index``, whose pixels nobody changes, or raise ``BadImageError``."""
        try:
            return self.decoded(index)
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

    def views(self, epoch: int | None, indices: Tensor, sizes: Tensor) -> Tensor:
        """Return what training sees of images of ``sizes``, validation where ``epoch`` is None; see ``draw_views``."""
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
        """Yield the samples of training, or of validation where ``epoch`` is None, at ``indices``."""
        first, whole, waiting_bytes = 0, [], 0
        for after, index in enumerate(indices, 1):
            whole.append(self._whole(index, epoch))
            waiting_bytes += whole[-1].image.numel()
            if after == len(indices) or waiting_bytes > _WHOLE_BYTES:
                whole_sizes = torch.tensor([sample.image.shape[:2] for sample in whole])
                # The random numbers are those of the image that was asked for, even where another one stands in for it.
                asked_for = torch.tensor(indices[first:after])
                views = [View(*row) for row in self.views(epoch, asked_for, whole_sizes).tolist()]
                size = self.sizes.at(epoch)
                images: Iterator[Tensor] = (
                    cut(sample.image, view, size) for sample, view in zip(whole, views, strict=True)
                )
                if epoch is not None and self._augment is not None:
                    images = self._augment(images, epoch, asked_for)
                for sample, view, image in zip(whole, views, images, strict=True):
                    yield sample._replace(image=image, mirrored=bool(view.mirrored))
                first, whole, waiting_bytes = after, [], 0

    def _whole(self, index: int, epoch: int | None) -> Sample:
        """The sample with all of its image."""
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
        """Only validation has some."""
        image = torch.zeros(self.sizes.validation, self.sizes.validation, 3, dtype=torch.uint8)
        return Sample(image, 0, 0.0, bad_image=bad_image)


def collate(samples: Sequence[Sample], images: Any) -> HostBatch:
    """Return samples as they travel, with what makes their ``images`` on the device."""
    return HostBatch(
        images,
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([sample.weight for sample in samples]),
        torch.tensor([sample.mirrored for sample in samples]),
        [sample.bad_image for sample in samples if sample.bad_image],
        sum(sample.by_pil for sample in samples),
    )
