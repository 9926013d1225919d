"""The running averages that validation uses: brought up to date once an optimizer step, and equal on all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipe.model.batchnorm import BatchNorm, Group, world_size_of


@torch.no_grad()
def update_running_averages(model: nn.Module, discard: Tensor | None = None) -> None:
    """Take the mean over all groups of n samples of an optimizer step into the running averages, in place.

    Every rank calls it after every optimizer step; one collective in all. ``discard``, bool () on the device, forgets
    the step's statistics: an update that overflowed leaves the running averages alone, too. Does nothing for "global"
    and "local".
    """
    collected = {
        module: module.collected
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.collected is not None
    }
    for module in collected:
        module.collected = None
    if not collected:
        return
    means = torch.cat([sums[:-1] / sums[-1] for sums in collected.values()])
    ranks = world_size_of(None)
    if ranks > 1:
        # Each rank has as many groups, or shares in them, as any other: the mean of means is the mean.
        dist.all_reduce(means)
        means /= ranks
    buffers = [
        buffer for module in collected for buffer in (module.running_mean, module.running_var) if buffer is not None
    ]
    if discard is not None:
        # An average of itself and itself stays as it is, whatever an overflow has left in the statistics.
        means = torch.where(discard, torch.cat(buffers).to(means.dtype), means)
    shares = [share for module in collected for share in [module.count_step(1 if discard is None else ~discard)] * 2]
    parts = means.split([len(buffer) for buffer in buffers])
    for buffer, mean, share in zip(buffers, parts, shares, strict=True):
        buffer.lerp_(mean.to(buffer.dtype), share)


@torch.no_grad()
def average_running_statistics(model: nn.Module, process_group: Group = None) -> None:
    """Make the running averages of ``model`` equal on all ranks, in place: their mean over the ranks.

    For "local" statistics, before a validation or a checkpoint; every rank must call it. The mean of the
    variances stays an estimate of the variance within a micro-batch, which is what the model trains on.
    One collective in all; none on one rank, or where the statistics are joined over these ranks already.
    """
    ranks = world_size_of(process_group)
    buffers = _differing(model, process_group)
    if ranks == 1 or not buffers:
        return
    means = torch.cat(buffers)
    dist.all_reduce(means, group=process_group)
    means /= ranks
    for buffer, mean in zip(buffers, means.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(mean)


@torch.no_grad()
def gather_running_averages(model: nn.Module) -> Tensor | None:
    """The running averages of "local" batch norms, on the CPU, a row a rank; None where all ranks have the same.

    One collective, which every rank must call. With it a checkpoint within an epoch keeps what only the ranks know.
    """
    buffers = _differing(model, None)
    if not buffers or world_size_of(None) == 1:
        return None
    own = torch.cat(buffers)
    rows = own.new_empty(world_size_of(None), len(own))
    dist.all_gather(list(rows), own)
    return rows.cpu()


@torch.no_grad()
def restore_running_averages(model: nn.Module, rows: Tensor | None) -> None:
    """Give this rank its row of ``gather_running_averages``; with another number of ranks, all keep what they have."""
    if rows is None or len(rows) != world_size_of(None):
        return
    buffers = _differing(model, None)
    for buffer, own in zip(buffers, rows[dist.get_rank()].split([len(b) for b in buffers]), strict=True):
        buffer.copy_(own)


def _differing(model: nn.Module, process_group: Group) -> list[Tensor]:
    """The running averages that the ranks of the group do not have in common."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, BatchNorm)
        and not module.frozen
        and not isinstance(module.statistics, int)
        and not (module.statistics == "global" and module.process_group is process_group)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
