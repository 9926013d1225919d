"""What the loop gets, and the last step on the way: normalisation on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of m samples on the device."""

    images: Tensor
    """(m, 3, S, S), normalised; channels_last on CUDA."""
    labels: Tensor
    """int64 (m,)."""
    weights: Tensor
    """float32 (m,): 1 for a sample that counts, 0 for one that only fills a place."""
    bad_images: tuple[str, ...] = ()
    """Files that could not be read and that were replaced or left out."""


class Normalise:
    """Maps uint8 images to ``(x / 255 - mean) / std`` a colour channel, in ``dtype`` on ``device``.

    Args:
        mean: Of each of the 3 channels, in units of the full range (0 to 1).
        std: Likewise.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self._scale = torch.tensor(scale, dtype=torch.float32, device=device).view(3, 1, 1)
        self._shift = torch.tensor(shift, dtype=torch.float32, device=device).view(3, 1, 1)
        self._device = device
        self._dtype = dtype
        self._format = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 (m, 3, S, S), from whatever device, as (m, 3, S, S)."""
        # uint8 travels: a quarter of the bytes.
        x = images.to(self._device, non_blocking=True).to(torch.float32, memory_format=self._format)
        # Two roundings and not a fused one: each is IEEE's, so that a pixel is the same bits on every device.
        return x.mul_(self._scale).add_(self._shift).to(self._dtype)
