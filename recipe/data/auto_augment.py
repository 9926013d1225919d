"""TrivialAugment and RandAugment, with random numbers that belong to a sample."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from recipe.data.seeds import derive_seed


class AutoAugment:
    """Augments training images with torchvision's ``TrivialAugmentWide``, or ``RandAugment`` with its defaults.

    ``magnitude``, from 0 to 30, is RandAugment's; it is None for TrivialAugment, which draws one for each image. Images
    are mirrored afterwards, on the device.
    """

    def __init__(self, kind: Literal["trivial", "rand"], magnitude: int | None, seed: int) -> None:
        # Imported here, because it is slow and most runs do without it.
        from torchvision.transforms import v2

        self._transform: Any = v2.TrivialAugmentWide() if kind == "trivial" else v2.RandAugment(magnitude=magnitude)
        self._seed = seed

    def __call__(self, images: Iterable[Tensor], epoch: int, indices: Tensor) -> Iterator[Tensor]:
        """Yield images, uint8 (S, S, 3), of the samples at ``indices``, int64 (m,), augmented for an epoch."""
        for image, index in zip(images, indices.tolist(), strict=True):
            # torchvision draws from the global generator of the CPU; torch.manual_seed would also seed CUDA's.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed("operations", self._seed, epoch, index))
                planes = self._transform(image.movedim(-1, 0))
            yield planes.movedim(0, -1).contiguous()
