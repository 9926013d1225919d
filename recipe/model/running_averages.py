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
    modules = [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and isinstance(module.statistics, int) and not module.frozen
    ]
    if not modules:
        return
    collected = [module.collected for module in modules]
    sums = torch.cat(collected, dim=1)
    means = sums[:2] / sums[2]
    torch._foreach_zero_(collected)
    ranks = world_size_of(None)
    if ranks > 1:
        # Each rank has as many groups, or parts of groups, as any other, so the mean of their means is the mean.
        dist.all_reduce(means)
        means /= ranks
    # A running average updated with itself does not change, whatever an overflow has left in the statistics.
    kept = sums[2] == 0  # of a module that the model has not called
    kept = kept if discard is None else kept | discard
    sizes = [module.num_features for module in modules]
    momenta = [module.momentum for module in modules]
    running = [module.running_mean for module in modules], [module.running_var for module in modules]
    for buffers, step_means in zip(running, means, strict=True):
        own = torch.cat(buffers)
        torch._foreach_lerp_(buffers, torch.where(kept, own, step_means.to(own.dtype)).split(sizes), momenta)
    counters = [module.num_batches_tracked for module in modules]
    one = torch.ones_like(counters[0]) if discard is None else (~discard).long()
    torch._foreach_add_(counters, [one] * len(counters))  # torch reads a single tensor as a number, and waits for it


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
