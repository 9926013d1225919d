"""Random images made on the device: what training costs when reading images costs nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch

from recipe.data.batch import Batch, Normalise
from recipe.data.datasets import Sizes
from recipe.data.sampler import PADDING, Split, TrainSampler, ValidationSampler
from recipe.data.seeds import derive_seed


@dataclass(frozen=True)
class SyntheticImages:
    """Random pixels in the place of data sets, with the labels of a ``SyntheticLoader``."""

    train_images: int
    validation_images: int
    classes: int
    image_size: int | Sequence[tuple[int, int]]
    validation_image_size: int | None


class SyntheticLoader:
    """Stands where a ``TrainLoader`` and a ``ValidationLoader`` would, and yields as many batches as they.

    All are of the same uint8 images and labels, a function of (seed, rank), and normalised anew each time; smaller ones
    are corners of the largest.
    """

    def __init__(
        self,
        *,
        train_images: int,
        validation_images: int,
        classes: int,
        image_size: int | Sequence[tuple[int, int]],
        validation_image_size: int | None = None,
        device: torch.device | str,
        dtype: torch.dtype,
        mean: Sequence[float],
        std: Sequence[float],
        **split: Unpack[Split],
    ) -> None:
        self._train_order = TrainSampler(train_images, **split)
        micro_batch, rank, world_size = split["micro_batch"], split["rank"], split["world_size"]
        self._validation_order = ValidationSampler(
            validation_images, micro_batch=micro_batch, rank=rank, world_size=world_size
        )
        self._device = torch.device(device)
        self._normalise = Normalise(mean, std, device=self._device, dtype=dtype)
        generator = torch.Generator(self._device).manual_seed(derive_seed("synthetic", split["seed"], rank))
        self._sizes = Sizes.of(image_size, validation_image_size)
        largest = max(self._sizes.all)
        shape = (micro_batch, largest, largest, 3)
        self._pixels = torch.randint(256, shape, generator=generator, device=self._device, dtype=torch.uint8)
        self._mirrored = torch.zeros(micro_batch, dtype=torch.bool, device=self._device)
        self._labels = torch.randint(classes, (micro_batch,), generator=generator, device=self._device)

    @property
    def steps_per_epoch(self) -> int:
        return self._train_order.steps_per_epoch

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Do nothing: nobody waits for these images."""

    def begin(self) -> None:
        """Do nothing: nobody waits for these images."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield as many batches as the epoch has micro-batches from ``first_step`` on."""
        self._train_order.set_epoch(epoch, first_step)
        weights = torch.ones(len(self._labels), device=self._device)
        images = self._images(self._sizes.at(epoch))
        for _ in range(len(self._train_order)):
            yield Batch(self._normalise(images, self._mirrored), self._labels, weights)

    def batches(self) -> Iterator[Batch]:
        """Yield the same number of validation batches on every rank."""
        images = self._images(self._sizes.at(None))
        for keys in self._validation_order:
            weights = torch.from_numpy(keys.indices != PADDING).float().to(self._device)
            yield Batch(self._normalise(images, self._mirrored), self._labels, weights)

    def _images(self, size: int) -> torch.Tensor:
        return self._pixels[:, :size, :size].contiguous().movedim(-1, 1)

    def close(self) -> None:
        """Do nothing: there are no worker processes."""
