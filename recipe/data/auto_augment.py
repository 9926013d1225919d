"""TrivialAugment and RandAugment: torchvision's operations and tables, by numbers that belong to a sample."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from recipe.data.seeds import derive_seed, uniform

_NUMBERS = 3
"""Of each operation: which one, how strong, in which direction."""


class AutoAugment:
    """Changes training images as torchvision's ``TrivialAugmentWide`` or ``RandAugment`` with its defaults would.

    ``magnitude``, from 0 to 30, is that of RandAugment; TrivialAugment has None and draws one for each image. Images
    are mirrored afterwards, on the device.
    """

    def __init__(self, kind: Literal["trivial", "rand"], magnitude: int | None, seed: int) -> None:
        # Imported here: it takes long, and most runs do without.
        from torchvision.transforms import v2

        self._transform: Any = v2.TrivialAugmentWide() if kind == "trivial" else v2.RandAugment()
        self._operations = list(self._transform._AUGMENTATION_SPACE.items())
        self._times = 1 if kind == "trivial" else self._transform.num_ops
        self._magnitude, self._seed = magnitude, seed

    def __call__(self, images: Iterable[Tensor], epoch: int, indices: Tensor) -> Iterator[Tensor]:
        """Yield images, uint8 (S, S, 3), as an epoch sees those at ``indices``, int64 (m,)."""
        places = torch.arange(self._times * _NUMBERS)
        numbers = uniform(derive_seed("operations", self._seed, epoch), indices[:, None] * len(places) + places)
        for image, row in zip(images, numbers.view(len(indices), self._times, _NUMBERS).tolist(), strict=True):
            planes = image.movedim(-1, 0)
            for which, how_strong, direction in row:
                name, (magnitudes_of, is_signed) = self._operations[int(which * len(self._operations))]
                magnitudes = magnitudes_of(self._transform.num_magnitude_bins, *planes.shape[1:])
                magnitude = 0.0
                if magnitudes is not None:
                    drawn = int(how_strong * len(magnitudes)) if self._magnitude is None else self._magnitude
                    magnitude = float(magnitudes[drawn])
                planes = self.apply(planes, name, -magnitude if is_signed and direction < 0.5 else magnitude)
            yield planes.movedim(0, -1).contiguous()

    def apply(self, planes: Tensor, name: str, magnitude: float) -> Tensor:
        """Return an image, uint8 (3, S, S), after one of torchvision's operations."""
        transform = self._transform
        changed: Tensor = transform._apply_image_or_video_transform(
            planes, name, magnitude, interpolation=transform.interpolation, fill=transform._fill
        )
        return changed
