"""Which samples a rank sees, in which order: a function of (seed, epoch, step), split by arithmetic alone."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, NotRequired, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from recipe.data.seeds import derive_seed

PADDING = -1
"""The index that stands where a validation batch is longer than the data; its sample has weight 0."""


class Keys(NamedTuple):
    """Which samples make a batch."""

    epoch: int | None
    """whose crops training takes; None for validation"""
    indices: npt.NDArray[np.int64]
    """(m,), of numpy: a tensor would travel to a worker through a file of its own"""


def epoch_permutation(seed: int, epoch: int, length: int) -> Tensor:
    """Return the order of one epoch: a permutation of ``range(length)``, int64 of shape (length,)."""
    generator = torch.Generator().manual_seed(derive_seed("permutation", seed, epoch))
    return torch.randperm(length, generator=generator)


class Split(TypedDict):
    """How global batches are split into the micro-batches of the ranks."""

    global_batch: int
    """samples per step, over all ranks and accumulation rounds"""
    batch_changes: NotRequired[Sequence[tuple[int, int]]]
    """(epoch, global batch from that on), the epochs rising; none: it is ``global_batch`` throughout"""
    micro_batch: int
    """samples that a rank takes at once"""
    rank: int
    """this process, from 0"""
    world_size: int
    """number of processes"""
    seed: int
    """seed of the permutations"""


class TrainSampler(Sampler[Keys]):
    """Yields, for one rank, the keys of one micro-batch after the other.

    Global step t of an epoch holds the samples ``permutation[t * B : (t + 1) * B]`` for the global batch B,
    whatever the split; the samples after the last whole batch wait for another epoch's permutation.
    """

    def __init__(self, length: int, **split: Unpack[Split]) -> None:
        micro_batch, world_size = split["micro_batch"], split["world_size"]
        for _, batch in (changes := ((0, split["global_batch"]), *split.get("batch_changes", ()))):
            if batch % (world_size * micro_batch):
                raise ValueError(f"global batch {batch} is no multiple of {world_size} ranks × {micro_batch} samples")
            if batch > length:
                raise ValueError(f"global batch {batch} is larger than the data set ({length} samples)")
        self._changes = changes
        self._length = length
        self._split = split
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Make the next pass that of ``epoch``, from step ``first_step`` of that epoch on."""
        self._batch = next(batch for first_epoch, batch in reversed(self._changes) if first_epoch <= epoch)
        self.accumulation = self._batch // (self._split["world_size"] * self._split["micro_batch"])
        self.steps_per_epoch = self._length // self._batch
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first step {first_step} is not within an epoch of {self.steps_per_epoch} steps")
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self._first_step) * self.accumulation

    def __iter__(self) -> Iterator[Keys]:
        epoch, split, m = self._epoch, self._split, self._split["micro_batch"]
        permutation = epoch_permutation(split["seed"], epoch, self._length).numpy()
        for step in range(self._first_step, self.steps_per_epoch):
            for accumulation in range(self.accumulation):
                # The micro-batches of one accumulation round lie side by side across the ranks: n samples in
                # a row are then on neighbouring ranks at the same moment, and batch norm over groups of n
                # sees the same groups for every split into ranks, accumulation and micro-batch.
                start = step * self._batch + (accumulation * split["world_size"] + split["rank"]) * m
                yield Keys(epoch, permutation[start : start + m])


class ValidationSampler(Sampler[Keys]):
    """Yields, for one rank, the keys of one batch after the other: over all ranks every sample once, in data-set order.

    Every rank gets the same number of batches, each of exactly ``micro_batch`` samples, so that no rank waits
    for another in a collective; places beyond the data hold ``PADDING``.
    """

    def __init__(self, length: int, *, micro_batch: int, rank: int, world_size: int) -> None:
        self._length, self._micro_batch, self._rank, self._world_size = length, micro_batch, rank, world_size

    def __len__(self) -> int:
        return -(-self._length // (self._world_size * self._micro_batch))

    def __iter__(self) -> Iterator[Keys]:
        m = self._micro_batch
        for batch in range(len(self)):
            indices = (batch * self._world_size + self._rank) * m + np.arange(m)
            yield Keys(None, np.where(indices < self._length, indices, PADDING))
