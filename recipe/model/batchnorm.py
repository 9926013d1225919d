"""Batch norm over the micro-batches of all ranks, on CPU and CUDA, in every precision of the recipe.

torch.nn.SyncBatchNorm refuses CPU tensors, and torch's batch norm refuses half-precision parameters beside fp32
buffers, which is what DeepSpeed's fp16 and bf16 produce. Here the statistics, the running averages and the affine step
are computed in fp32 (float64 for float64 input) whatever the parameters are; the output has the input's dtype and
memory format.
"""

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = Literal["global", "local"] | int
Group = dist.ProcessGroup | None


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of an (N, C, …) tensor over the micro-batches of all ranks, over this rank's alone, or over n samples.

    Takes the arguments of ``nn.BatchNorm2d`` and has its parameters and buffers, so that checkpoints are
    interchangeable. ``drop`` and ``act``, identities unless the converted module had them, follow, as in timm's
    BatchNormAct2d.

    The gradients of weight and bias are this rank's sums: the engine averages them over the ranks, like any other
    gradient. The micro-batches of all ranks have the same size.

    Args:
        statistics: "global" (over all ranks), "local" (over this rank), or n: over exactly n samples. A micro-batch
            of a multiple of n is split into groups of n neighbours; one of n / k samples is joined with those of k
            ranks by ``join_neighbours``. The running averages then wait for ``update_running_averages``, which
            updates them once per optimizer step, however many micro-batches it has.

    ``process_group`` holds the ranks whose micro-batches are joined, None for all. ``frozen`` keeps the module in
    evaluation mode, for a backbone that is not trained.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, *arguments: Any, statistics: Statistics = "global", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.statistics = statistics
        self.process_group: Group = None
        self.frozen = False
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        # Sums of means and of variances, and how many of each: (3, C). Never None, for which torch.compile would make a
        # second graph, and no buffer, because it is not part of the model's state.
        self.collected = self.running_mean.new_zeros(3, self.num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x)))

    def train(self, mode: bool = True) -> "BatchNorm":
        """Like ``nn.Module.train``, but a frozen batch norm stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchNorm":
        super()._apply(fn, recurse)
        self.collected = fn(self.collected)
        return self

    def _normalise(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias, mean, var = self.weight.to(dtype), self.bias.to(dtype), self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)
        if isinstance(self.statistics, int):
            return self._normalise_groups(x, weight, bias, self.statistics)
        share = 0.0 if is_repeated() else self.momentum
        if not is_repeated():
            self.num_batches_tracked.add_(1)
        if self.statistics == "local" or world_size_of(self.process_group) == 1:
            return F.batch_norm(x, mean, var, weight, bias, True, share, self.eps)
        return _over_ranks(x, weight, bias, mean, var, share, self.eps, self.process_group)

    def _normalise_groups(self, x: Tensor, weight: Tensor, bias: Tensor, n: int) -> Tensor:
        """Normalise groups of n samples: those of the micro-batch, or the one it makes up with other ranks'."""
        if len(x) % n == 0:
            groups = len(x) // n
            # With momentum 1 the running averages are the statistics of the batch.
            mean, var = weight.new_zeros(groups * len(weight)), weight.new_ones(groups * len(weight))
            weight, bias = weight.repeat(groups), bias.repeat(groups)
            y = F.batch_norm(_groups_to_channels(x, groups), mean, var, weight, bias, True, 1.0, self.eps)
            y = _channels_to_groups(y, groups)
        else:
            assert len(x) * world_size_of(self.process_group) == n, "the plan refuses other micro-batches"
            groups, mean, var = 1, torch.zeros_like(weight), torch.ones_like(weight)
            y = _over_ranks(x, weight, bias, mean, var, 1.0, self.eps, self.process_group)
        if not is_repeated():
            if groups > 1:
                mean, var = mean.view(groups, -1).mean(0), var.view(groups, -1).mean(0)
            self.collected.add_(torch.stack([mean, var, torch.ones_like(mean)]))
        return y


def convert_batchnorm(model: nn.Module, statistics: Statistics) -> nn.Module:
    """Replace every batch norm of ``model`` by a :class:`BatchNorm`, in place; return the model.

    Parameters, buffers and timm's ``drop`` and ``act`` stay the same objects, and a module that is used in two places
    stays a single one. A frozen batch norm is an affine step without statistics and stays as it is.

    Raises:
        ValueError: a kind of batch norm that is not known here.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    converted: dict[nn.Module, nn.Module] = {module: _converted(module, statistics) for module in norms}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() would yield a shared child only once
            if child in converted:
                setattr(parent, name, converted[child])
    return converted.get(model, model)


def join_neighbours(model: nn.Module, micro_batch: int, timeout: timedelta | None = None) -> None:
    """Set the process group of batch norms over more samples than a micro-batch has: the ranks with those samples.

    Every rank calls it after the rendezvous; ``timeout`` is that of the groups' collectives. Neighbouring ranks hold
    neighbouring samples of each accumulation step, so that a group has the same samples on any number of ranks.
    """
    trained = [module for module in model.modules() if isinstance(module, BatchNorm) and not module.frozen]
    joined = [norm for norm in trained if isinstance(norm.statistics, int) and norm.statistics > micro_batch]
    if joined:
        group, _ = dist.new_subgroups(int(joined[0].statistics) // micro_batch, timeout=timeout)
        for module in joined:
            module.process_group = group


def is_repeated() -> bool:
    """Whether a backward pass repeats this forward pass: gradient checkpointing, which must not count twice.

    There is no public way to ask; torch.utils.checkpoint itself asks like this.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _groups_to_channels(x: Tensor, groups: int) -> Tensor:
    """(groups · n, C, …) → (n, groups · C, …), so that a single kernel computes the statistics of all groups.

    Keeps channels_last.
    """
    if groups == 1:
        return x
    grouped = x.unflatten(0, (groups, -1))
    if _is_channels_last(x):
        return grouped.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)
    return grouped.transpose(0, 1).flatten(1, 2)


def _channels_to_groups(y: Tensor, groups: int) -> Tensor:
    """The inverse of ``_groups_to_channels``."""
    if groups == 1:
        return y
    grouped = y.unflatten(1, (groups, -1))
    if _is_channels_last(y):
        return grouped.permute(1, 0, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)
    return grouped.transpose(0, 1).flatten(0, 1)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def world_size_of(group: Group) -> int:
    """The number of ranks in the group; 1 if torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _converted(module: _BatchNorm, statistics: Statistics) -> BatchNorm:
    followed_by_act = hasattr(module, "drop") and hasattr(module, "act")  # timm's BatchNormAct2d
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    known = type(module) in plain or followed_by_act
    if not (known and module.affine and module.track_running_stats and module.momentum is not None):
        raise ValueError(f"{type(module).__name__} is a batch norm that the recipe cannot convert")
    converted = BatchNorm(module.num_features, module.eps, module.momentum, statistics=statistics, device="meta")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(converted, name, getattr(module, name))
    converted.collected = converted.running_mean.new_zeros(converted.collected.shape)
    if followed_by_act:
        converted.drop, converted.act = module.drop, module.act  # type: ignore[assignment]
    return converted.train(module.training)


def _over_ranks(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, share: float, eps: float, group: Group
) -> Tensor:
    """Normalise over the ranks of the group; add ``share`` of their statistics to the running averages mean and var."""
    if x.device.type != "cpu" and not torch.compiler.is_compiling():
        return _NormaliseByKernels.apply(x, weight, bias, mean, var, eps, share, group or dist.group.WORLD)
    batch_mean, batch_var, count = _joined_statistics(x, group)
    mean.lerp_(batch_mean.to(mean.dtype), share)
    var.lerp_((batch_var * (count / (count - 1))).to(var.dtype), share)
    return _Normalise.apply(x, weight, bias, batch_mean, batch_var, count, eps, group)


@torch.no_grad()
def _joined_statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, int]:
    """Mean (C,), biased variance (C,) and number of values per channel over all ranks, bit-identical on every rank.

    Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances", for
    any number of parts of one size: m = mean(mᵢ), M2 = Σ (M2ᵢ + nᵢ (mᵢ − m)²). Unlike E[x²] − E[x]² it loses nothing
    if the mean is much larger than the spread.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    count, dims = x.numel() // x.size(1), [dim for dim in range(x.dim()) if dim != 1]
    rough_mean = x.mean(dims, dtype=dtype)
    deviation = x - _per_channel(rough_mean, x)
    mean = rough_mean.double() + deviation.mean(dims)  # adds what rounding left out of the rough mean
    m2 = deviation.square_().sum(dims).double()
    means, m2s = _gather(mean, m2, group)
    joined_mean = means.mean(0)
    joined_m2 = (m2s + count * (means - joined_mean).square()).sum(0)
    total = count * len(means)
    return joined_mean.to(dtype), (joined_m2 / total).to(dtype), total


def _gather(first: Tensor, second: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Every rank's two tensors (C,), as two of (ranks, C), by a single collective."""
    part = torch.cat([first, second])
    parts = part.new_empty(world_size_of(group) * len(part))  # flat, as gloo requires
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older torch
    all_gather(parts, part, group)
    firsts, seconds = parts.view(-1, 2, len(first)).unbind(1)
    return firsts, seconds


class _NormaliseByKernels(torch.autograd.Function):
    """torch's SyncBatchNorm, which has its own kernels for GPUs, without its wait for the device in every layer.

    torch waits to find ranks without samples (https://github.com/pytorch/pytorch/issues/78656). Here all have as many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        share: float,
        group: Group,
    ) -> Tensor:
        if not _is_channels_last(x):
            x = x.contiguous()
        means, invstds = _gather(*torch.batch_norm_stats(x, eps), group)
        counts = mean.new_full((len(means),), x[:, 0].numel())
        batch_mean, invstd = torch.batch_norm_gather_stats_with_counts(x, means, invstds, mean, var, share, eps, counts)
        ctx.save_for_backward(x, weight, batch_mean, invstd, counts.to(torch.int32))
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, batch_mean, invstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return TorchSyncBatchNorm.backward(ctx, dy)[:8]


class _Normalise(torch.autograd.Function):
    """y = weight · x̂ + bias with x̂ = (x − mean) / √(var + eps), where mean and var depend on all ranks' x.

    Backward is Ioffe and Szegedy (2015), §3, with the means over the values of all ranks:
    dx = weight / √(var + eps) · (dy − mean(dy) − x̂ · mean(dy · x̂)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([dweight, dbias])  # Σ dy · x̂ and Σ dy of this rank
        dist.all_reduce(sums, group=ctx.group)
        mean_dy_xhat, mean_dy = sums / ctx.count
        invstd = (var + ctx.eps).rsqrt()
        scale = weight * invstd
        # In fp32, and rounded once: correcting a half-precision dx would round twice.
        dx = (x - _per_channel(mean, x)).mul_(_per_channel(-scale * invstd * mean_dy_xhat, x))
        dx = dx.sub_(_per_channel(scale * mean_dy, x)).addcmul_(dy, _per_channel(scale, x)).to(x.dtype)
        return dx, dweight, dbias, None, None, None, None, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,), reshaped to broadcast over ``x`` (N, C, …)."""
    return values.view(-1, *[1] * (x.dim() - 2))
