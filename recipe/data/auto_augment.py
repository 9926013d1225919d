"""TrivialAugment and RandAugment: torchvision's operations, chosen by random numbers that belong to a sample."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from recipe.data.seeds import derive_seed, uniform

_NUMBERS = 3
"""Random numbers per operation: which one, its magnitude, its sign."""


class AutoAugment:
    """Augments training images like torchvision's ``TrivialAugmentWide``, or ``RandAugment`` with its defaults.

    ``magnitude``, from 0 to 30, is RandAugment's; it is None for TrivialAugment, which draws one for each image. Images
    are mirrored afterwards, on the device.
    """

    def __init__(self, kind: Literal["trivial", "rand"], magnitude: int | None, seed: int) -> None:
        # Imported here, because it is slow and most runs do without it.
        from torchvision.transforms import v2

        self._transform: Any = v2.TrivialAugmentWide() if kind == "trivial" else v2.RandAugment()
        self._operations = list(self._transform._AUGMENTATION_SPACE.items())
        self._times = 1 if kind == "trivial" else self._transform.num_ops
        self._magnitude, self._seed = magnitude, seed

    def __call__(self, images: Iterable[Tensor], epoch: int, indices: Tensor) -> Iterator[Tensor]:
        """Yield images, uint8 (S, S, 3), of the samples at ``indices``, int64 (m,), augmented for an epoch."""
        transform = self._transform
        positions = torch.arange(self._times * _NUMBERS)
        numbers = uniform(derive_seed("operations", self._seed, epoch), indices[:, None] * len(positions) + positions)
        for image, row in zip(images, numbers.view(len(indices), self._times, _NUMBERS).tolist(), strict=True):
            planes = image.movedim(-1, 0)
            for which, how_strong, sign in row:
                name, (magnitudes_of, is_signed) = self._operations[int(which * len(self._operations))]
                magnitudes = magnitudes_of(transform.num_magnitude_bins, *planes.shape[1:])
                magnitude = 0.0
                if magnitudes is not None:
                    drawn = int(how_strong * len(magnitudes)) if self._magnitude is None else self._magnitude
                    magnitude = float(magnitudes[drawn])
                planes = transform._apply_image_or_video_transform(
                    planes,
                    name,
                    -magnitude if is_signed and sign < 0.5 else magnitude,
                    interpolation=transform.interpolation,
                    fill=transform._fill,
                )
            yield planes.movedim(0, -1).contiguous()
