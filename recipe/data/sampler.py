"""The order of samples on each rank, as a function of (seed, epoch, step)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from recipe.data.seeds import derive_seed

PADDING = -1
"""The index of a blank sample with weight 0, which fills a validation batch that extends past the data."""


class Keys(NamedTuple):
    """The epoch and sample indices of a batch."""

    epoch: int | None
    """the training epoch, which seeds the crops; None for validation"""
    indices: npt.NDArray[np.int64]
    """(m,), numpy because a tensor would reach a worker through a file of its own"""


def epoch_permutation(seed: int, epoch: int, length: int) -> Tensor:
    """Return the sample order of an epoch: a permutation of ``range(length)`` as int64."""
    generator = torch.Generator().manual_seed(derive_seed("permutation", seed, epoch))
    return torch.randperm(length, generator=generator)


class Split(TypedDict):
    """How global batches are split into micro-batches and ranks."""

    global_batch: int | Sequence[tuple[int, int]]
    """samples per step, over all ranks and accumulation rounds: one number, or (epoch, number from then on) in
    ascending order from epoch 0"""
    micro_batch: int
    """samples per rank and accumulation round"""
    rank: int
    world_size: int
    seed: int
    """seed of the permutations"""


class TrainSampler(Sampler[Keys]):
    """Yields the keys of one rank's micro-batches.

    Step t of an epoch holds ``permutation[t * B : (t + 1) * B]`` for the global batch B, however it is split. Samples
    after the last full batch are left to other epochs.
    """

    def __init__(self, length: int, **split: Unpack[Split]) -> None:
        global_batch = split["global_batch"]
        self._batches = ((0, global_batch),) if isinstance(global_batch, int) else tuple(global_batch)
        self._length = length
        self._split = split
        for _, batch in self._batches:  # as the plan has made sure
            assert batch % (split["world_size"] * split["micro_batch"]) == 0, (batch, split)
            assert batch <= length, (batch, length)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the epoch of the next pass, and the step of that epoch at which it starts."""
        self._batch = next(batch for first_epoch, batch in reversed(self._batches) if first_epoch <= epoch)
        self.accumulation = self._batch // (self._split["world_size"] * self._split["micro_batch"])
        self.steps_per_epoch = self._length // self._batch
        assert 0 <= first_step <= self.steps_per_epoch, (first_step, self.steps_per_epoch)
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self._first_step) * self.accumulation

    def __iter__(self) -> Iterator[Keys]:
        epoch, split, m = self._epoch, self._split, self._split["micro_batch"]
        permutation = epoch_permutation(split["seed"], epoch, self._length).numpy()
        for step in range(self._first_step, self.steps_per_epoch):
            for accumulation in range(self.accumulation):
                # The ranks' micro-batches of an accumulation round are adjacent. Batch norm over groups of n samples
                # therefore sees the same groups for every split into ranks, accumulation and micro-batch.
                start = step * self._batch + (accumulation * split["world_size"] + split["rank"]) * m
                yield Keys(epoch, permutation[start : start + m])


class ValidationSampler(Sampler[Keys]):
    """Yields the keys of one rank's validation batches; over all ranks, every sample once, in data-set order.

    Every rank gets the same number of batches of exactly ``micro_batch`` samples, so that no rank waits for another in
    a collective. Positions past the data hold ``PADDING``.
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
