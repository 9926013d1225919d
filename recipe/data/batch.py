"""What the loop gets, and the last step on the way: mirroring and normalisation on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HostBatch(NamedTuple):
    """What a worker sends: a NamedTuple, because DataLoader pins its tensors."""

    images: Any
    """What the data set makes uint8 (m, S, S, 3) of, on the device."""
    labels: Tensor
    weights: Tensor
    mirrored: Tensor
    bad_images: list[str]
    decoded_by_pil: int


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of m samples on the device."""

    images: Tensor
    """(m, 3, S, S), normalised; channels_last on CUDA."""
    labels: Tensor
    """int64 (m,), or where images are mixed probabilities (m, classes)."""
    weights: Tensor
    """float32 (m,): 1 for a sample that counts, 0 for one that only fills a place."""
    bad_images: tuple[str, ...] = ()
    """Files that could not be read and that were replaced or left out."""
    decoded_by_pil: int = 0
    """Images for which the slower decoder was needed."""


class Normalise:
    """Mirrors uint8 images and maps them to ``(x / 255 - mean) / std`` per colour channel, in ``dtype`` on ``device``.

    ``mean`` and ``std`` of the 3 channels are in units of the full range, 0 to 1. On CUDA one kernel does it all, by a
    table of the 3 × 256 results: the same bits as on a CPU, whatever is fused.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32).view(3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).view(3, 1, 1)
        self._device = device
        self._dtype = dtype
        if device.type == "cuda":
            self._table = self.table().to(device)

    def __call__(self, images: Tensor, mirrored: Tensor) -> Tensor:
        """Return images, uint8 (m, 3, S, S) and interleaved in memory, as (m, 3, S, S); ``mirrored`` is bool (m,)."""
        # uint8 travels: a quarter of the bytes.
        images = images.to(self._device, non_blocking=True)
        mirrored = mirrored.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            # Imported here: Triton comes with torch for CUDA alone.
            from recipe.data.fused_normalise import mirror_and_look_up

            return mirror_and_look_up(images, mirrored, self._table)
        if mirrored.any():
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return self._normalised(images)

    def table(self) -> Tensor:
        """Return what each value of each channel becomes, (3, 256)."""
        return self._normalised(torch.arange(256).expand(3, 1, 256)).view(3, 256)

    def _normalised(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32, memory_format=torch.contiguous_format)
        return x.mul_(self._scale).add_(self._shift).to(self._dtype)
