"""Batches, on their way from a worker and on the device, and their normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HostBatch(NamedTuple):
    """A batch as a worker sends it; a NamedTuple, because DataLoader pins the tensors of one."""

    images: Any
    """whatever ``Samples.on_device`` turns into uint8 (m, S, S, 3)"""
    labels: Tensor
    weights: Tensor
    mirrored: Tensor
    bad_images: list[str]
    decoded_by_pil: int


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of m samples on the device."""

    images: Tensor
    """(m, 3, S, S), normalised; channels_last on CUDA"""
    labels: Tensor
    """int64 (m,), or probabilities (m, classes) if images are mixed"""
    weights: Tensor
    """float32 (m,): 1 for a sample that counts, 0 for padding"""
    bad_images: tuple[str, ...] = ()
    """unreadable files, which were replaced or left out"""
    decoded_by_pil: int = 0
    """number of images decoded by PIL, the slower decoder"""


class Normalise:
    """Mirrors uint8 images and maps them to ``(x / 255 - mean) / std`` per channel, in ``dtype`` on ``device``.

    On CUDA a single kernel does both with a lookup table of the 3 × 256 results, which makes them bit-identical to the
    CPU's.
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
        """Normalise uint8 (m, 3, S, S) with interleaved channels, mirroring where ``mirrored``, bool (m,), is true."""
        # uint8 is uploaded: a quarter of the bytes of fp32.
        images = images.to(self._device, non_blocking=True)
        mirrored = mirrored.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            # Imported here, because only torch for CUDA comes with Triton.
            from recipe.data.fused_normalise import mirror_and_look_up

            return mirror_and_look_up(images, mirrored, self._table)
        if mirrored.any():
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return self._normalised(images)

    def table(self) -> Tensor:
        """Return the normalised values, (3, 256), of every uint8 value in every channel."""
        return self._normalised(torch.arange(256).expand(3, 1, 256)).view(3, 256)

    def _normalised(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32, memory_format=torch.contiguous_format)
        return x.mul_(self._scale).add_(self._shift).to(self._dtype)
