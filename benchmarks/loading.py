"""The recipe's loader as benchmarks use it."""

import torch

from recipe.data import HostBatch, Keys, Samples, TrainLoader


def one_rank_loader(
    samples: Samples, micro_batch: int, *, device: torch.device, dtype: torch.dtype, workers: int = 0
) -> TrainLoader:
    """One rank's loader, with one micro-batch per step; pixels of any mean and deviation take the same time."""
    return TrainLoader(
        samples,
        global_batch=micro_batch,
        micro_batch=micro_batch,
        rank=0,
        world_size=1,
        seed=0,
        workers=workers,
        device=device,
        dtype=dtype,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


class Repeated(Samples):
    """A data set, repeated until it has at least ``count`` samples."""

    def __init__(self, samples: Samples, count: int) -> None:
        self._samples, self._length = samples, len(samples) * -(-count // len(samples))
        self.waits_for_device = samples.waits_for_device

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, keys: Keys) -> HostBatch:
        return self._samples[keys._replace(indices=keys.indices % len(self._samples))]

    def on_device(self, batch: HostBatch) -> HostBatch:
        """Complete a batch like the data set."""
        return self._samples.on_device(batch)
