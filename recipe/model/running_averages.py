"""The running averages that validation uses: updated once per optimizer step, and made equal on all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipe.model.batchnorm import BatchNorm, world_size_of


@torch.no_grad()
def update_running_averages(model: nn.Module, discard: Tensor | None = None) -> None:
    """Update the running averages, in place, with the mean over all groups of n samples of an optimizer step.

    Every rank calls it after every optimizer step; it makes a single collective. ``discard``, bool () on the device,
    drops the statistics of the step: an update that overflowed must not change the running averages either. Does
    nothing for "global" and "local" statistics.
    """
    collected = {
        module: module.collected
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.collected is not None
    }
    if not collected:
        return
    means = torch.cat([sums[:-1] / sums[-1] for sums in collected.values()])
    ranks = world_size_of(None)
    if ranks > 1:
        # Each rank has as many groups, or parts of groups, as any other, so the mean of their means is the mean.
        dist.all_reduce(means)
        means /= ranks
    buffers = [buffer for module in collected for buffer in (module.running_mean, module.running_var)]
    if discard is not None:
        # A running average updated with itself does not change, whatever an overflow has left in the statistics.
        means = torch.where(discard, torch.cat(buffers).to(means.dtype), means)
    parts = iter(means.split([len(buffer) for buffer in buffers]))
    for module in collected:
        module.collected = None
        module.num_batches_tracked.add_(1 if discard is None else ~discard)
        for buffer in (module.running_mean, module.running_var):
            buffer.lerp_(next(parts).to(buffer.dtype), module.momentum)


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Replace the running averages of "local" batch norms by their mean over the ranks, in place.

    Every rank calls it before a validation or a checkpoint; it makes at most one collective. The mean of the variances
    remains an estimate of the variance within a micro-batch, which is what the model trains on.
    """
    buffers = _local_running_averages(model)
    if buffers and world_size_of(None) > 1:
        means = torch.cat(buffers)
        dist.all_reduce(means)
        _fill(buffers, means / world_size_of(None))


@torch.no_grad()
def gather_running_averages(model: nn.Module) -> Tensor | None:
    """The running averages of "local" batch norms, on the CPU, one row per rank; None if all ranks have the same.

    Every rank calls it; it makes a single collective. A checkpoint within an epoch keeps the result.
    """
    buffers = _local_running_averages(model)
    if not buffers or world_size_of(None) == 1:
        return None
    own = torch.cat(buffers)
    rows = own.new_empty(world_size_of(None), len(own))
    dist.all_gather(list(rows), own)
    return rows.cpu()


@torch.no_grad()
def restore_running_averages(model: nn.Module, rows: Tensor | None) -> None:
    """Load this rank's row of ``gather_running_averages``; on a different number of ranks, change nothing."""
    if rows is not None and len(rows) == world_size_of(None):
        _fill(_local_running_averages(model), rows[dist.get_rank()])


def _fill(buffers: list[Tensor], values: Tensor) -> None:
    for buffer, own in zip(buffers, values.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(own)


def _local_running_averages(model: nn.Module) -> list[Tensor]:
    """The running averages that differ between ranks."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.statistics == "local" and not module.frozen
        for buffer in (module.running_mean, module.running_var)
    ]
