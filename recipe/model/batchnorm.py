"""Batch norm over the micro-batches of all ranks, on CPU and CUDA, in every precision of the recipe.

torch.nn.SyncBatchNorm refuses CPU tensors, and torch's batch norm refuses half parameters beside fp32
buffers, which is what DeepSpeed's fp16 and bf16 leave behind. Here the statistics, the running averages and
the affine step are computed in fp32 (float64 for float64 input) whatever the parameters are; the output has
the input's dtype and memory format.
"""

import json
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
    """Batch norm of an (N, C, …) tensor over the micro-batches of all ranks, or over this rank's alone.

    Parameters, buffers, their names and conventions are those of ``nn.BatchNorm2d``, so that checkpoints are
    interchangeable: ``momentum`` is the share of the new value (torch's 0.1 is the paper's 0.9), None the
    plain mean of all steps, and the running variance is the unbiased one of the joined count. ``drop`` and
    ``act``, identities unless the converted module had them, follow, as in timm's BatchNormAct2d.

    The gradients of weight and bias are this rank's sums: the engine averages them over the ranks, like any
    other gradient. The ranks' micro-batches need not be of one size.

    Args:
        statistics: "global" (over the ranks of the group), "local" (over this rank), or n: over exactly n samples. A
            micro-batch of several times n is split into groups of n neighbours; one of n / k samples is joined with
            those of k ranks by ``join_neighbours``. The running averages then wait for ``update_running_averages``,
            so that they are those of an optimizer step, however many micro-batches it has.
        process_group: the ranks that "global" joins, or that hold n samples together; None for all. Where
            torch.distributed is not initialised there is one rank.

    ``frozen`` keeps it in evaluation mode, for a backbone that is not trained.

    Raises:
        ValueError: statistics that are not known; in training, a joined count of one value a channel, or a micro-batch
            that neither holds whole groups of n samples nor, joined, makes up one.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        statistics: Statistics = "global",
        process_group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_statistics(statistics)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.statistics = statistics
        self.process_group = process_group
        self.frozen = False
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        self.collected: Tensor | None = None  # sums of means and of variances, and how many: (2 C + 1,)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return self.act(self.drop(self._normalise(x)))

    def train(self, mode: bool = True) -> "BatchNorm":
        """As ``nn.Module.train``; a frozen batch norm stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def _normalise(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Ones instead of None: with neither weight nor buffers torch's CPU kernel would keep half statistics.
        weight = x.new_ones(self.num_features, dtype=dtype) if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.training and isinstance(self.statistics, int):
            return self._normalise_groups(x, weight, bias, self.statistics)
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        share = self.count_step() if self.training and tracked and not is_repeated() else 0.0

        ranks = self._ranks() if self.training else 1
        if ranks == 1:
            return F.batch_norm(x, mean, var, weight, bias, self.training or mean is None, share, self.eps)
        if mean is None or var is None:
            mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        return _over_ranks(x, weight, bias, mean, var, share, self.eps, self.process_group)

    def _normalise_groups(self, x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
        """Over groups of n samples: the micro-batch's, or the one that it makes up with other ranks'."""
        if len(x) % n == 0:
            groups = len(x) // n
            # Running averages that forget at once are the batch's statistics: momentum 1.
            mean, var = weight.new_zeros(groups * len(weight)), weight.new_ones(groups * len(weight))
            bias = None if bias is None else bias.repeat(groups)
            y = F.batch_norm(_side_by_side(x, groups), mean, var, weight.repeat(groups), bias, True, 1.0, self.eps)
            y = _one_below_the_other(y, groups)
        else:
            ranks = world_size_of(self.process_group)
            if len(x) * ranks != n:
                raise ValueError(f"batch norm over {n} samples cannot be had from {ranks} × {len(x)} of them")
            groups, mean, var = 1, torch.zeros_like(weight), torch.ones_like(weight)
            y = _over_ranks(x, weight, bias, mean, var, 1.0, self.eps, self.process_group)
        if self.track_running_stats and not is_repeated():
            own = torch.cat([mean.view(groups, -1).mean(0), var.view(groups, -1).mean(0), mean.new_ones(1)])
            # One tensor: torch.compile would make a graph for every length that a list has.
            self.collected = own if self.collected is None else self.collected + own
        return y

    def count_step(self, counts: Tensor | int = 1) -> float:
        """Count this step, or none if ``counts`` is 0; return the share of its statistics in the running averages."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(counts)
        return 1.0 / max(1.0, float(self.num_batches_tracked)) if self.momentum is None else self.momentum

    def _ranks(self) -> int:
        return world_size_of(self.process_group) if self.statistics == "global" else 1

    def _check_input_dim(self, x: Tensor) -> None:
        # Wider than the base class: the 1d batch norms of some timm models' heads become this class too.
        if x.dim() < 2:
            raise ValueError(f"expected an (N, C, …) input, got shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, statistics={self.statistics!r}"


def convert_batchnorm(model: nn.Module, statistics: Statistics, process_group: Group = None) -> nn.Module:
    """Replace every batch norm of ``model`` by a :class:`BatchNorm`, in place; return the model.

    Parameters, buffers and timm's ``drop`` and ``act`` stay the same objects, and a module that stood
    in two places still does. A frozen batch norm is an affine step without statistics and stays.

    Raises:
        ValueError: statistics that are not available; a kind of batch norm that is not known here.
    """
    _check_statistics(statistics)
    if isinstance(model, _BatchNorm):
        return _converted(model, statistics, process_group)
    replacements: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() would name a shared child once
            if isinstance(child, _BatchNorm):
                if child not in replacements:
                    replacements[child] = _converted(child, statistics, process_group)
                setattr(parent, name, replacements[child])
    return model


def join_neighbours(model: nn.Module, micro_batch: int, timeout: timedelta | None = None) -> None:
    """Where batch norm is over more samples than a micro-batch has, join ranks that hold neighbouring ones.

    Every rank calls it, once the process group is there; ``timeout`` is that of their collectives. Neighbouring ranks
    hold neighbouring samples of each round of accumulation, so that a group is the same samples however many ranks
    there are.
    """
    modules = [module for module in model.modules() if isinstance(module, BatchNorm)]
    joined = [module for module in modules if isinstance(module.statistics, int) and module.statistics > micro_batch]
    for n in sorted({int(module.statistics) for module in joined}):
        ranks = n // micro_batch
        for first in range(0, world_size_of(None), ranks):
            group = dist.new_group(list(range(first, first + ranks)), timeout=timeout)
            if isinstance(group, dist.ProcessGroup) and first <= dist.get_rank() < first + ranks:
                for module in joined:
                    if module.statistics == n:
                        module.process_group = group


def is_repeated() -> bool:
    """Whether this forward pass is a part of a backward pass: gradient checkpointing repeats what was tracked before.

    There is no public way to ask; torch.utils.checkpoint itself asks so.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _check_statistics(statistics: Statistics) -> None:
    if statistics not in ("global", "local") and not (isinstance(statistics, int) and statistics > 0):
        raise ValueError(
            f"recipe.batchnorm.statistics = {json.dumps(statistics)}: unknown; "
            'use "global", "local" or a number of samples'
        )


def _side_by_side(x: Tensor, groups: int) -> Tensor:
    """(groups · n, C, …) → (n, groups · C, …): every group's channels become channels of one batch of n samples.

    One kernel then takes the statistics of all groups. Keeps channels_last.
    """
    if groups == 1:
        return x
    grouped = x.unflatten(0, (groups, -1))
    if _is_channels_last(x):
        return grouped.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)
    return grouped.transpose(0, 1).flatten(1, 2)


def _one_below_the_other(y: Tensor, groups: int) -> Tensor:
    """The inverse of ``_side_by_side``."""
    if groups == 1:
        return y
    grouped = y.unflatten(1, (groups, -1))
    if _is_channels_last(y):
        return grouped.permute(1, 0, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)
    return grouped.transpose(0, 1).flatten(0, 1)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def world_size_of(group: Group) -> int:
    """Ranks of the group; one where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _converted(module: _BatchNorm, statistics: Statistics, process_group: Group) -> BatchNorm:
    followed_by_act = hasattr(module, "drop") and hasattr(module, "act")  # timm's BatchNormAct2d
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if type(module) not in plain and not followed_by_act:
        raise ValueError(f"{type(module).__name__} is a batch norm that the recipe cannot convert")
    converted = BatchNorm(
        module.num_features,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
        statistics=statistics,
        process_group=process_group,
        device="meta",
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(converted, name, getattr(module, name))
    if followed_by_act:
        converted.drop, converted.act = module.drop, module.act  # type: ignore[assignment]
    return converted.train(module.training)


def _over_ranks(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, share: float, eps: float, group: Group
) -> Tensor:
    """Normalise over the ranks of the group; their statistics get ``share`` in the running averages mean and var."""
    if x.device.type != "cpu" and not torch.compiler.is_compiling():
        return _NormaliseByKernels.apply(x, weight, bias, mean, var, eps, share, group or dist.group.WORLD)
    batch_mean, batch_var, count = _joined_statistics(x, group)
    mean.lerp_(batch_mean.to(mean.dtype), share)
    var.lerp_((batch_var * (count / (count - 1))).to(var.dtype), share)
    return _Normalise.apply(x, weight, bias, batch_mean, batch_var, count, eps, group)


@torch.no_grad()
def _joined_statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,), values a channel (a scalar) of all ranks' ``x``, bit-identical on every rank.

    Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
    variances", for any number of parts: n = Σ nᵢ, m = Σ nᵢ mᵢ / n, M2 = Σ (M2ᵢ + nᵢ (mᵢ − m)²).
    Unlike E[x²] − E[x]² it loses nothing where the mean is large beside the spread.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, dims = x.size(1), [dim for dim in range(x.dim()) if dim != 1]
    count = x.numel() // channels
    if count:
        rough_mean = x.mean(dims, dtype=dtype)
        deviation = x - _per_channel(rough_mean, x)
        mean = rough_mean.double() + deviation.mean(dims)  # what rounding left out of the rough mean
        m2 = deviation.square_().sum(dims).double()
    else:
        mean = m2 = x.new_zeros(channels, dtype=torch.float64)
    means, m2s, counts = _gather(torch.cat([mean, m2, mean.new_full((1,), count)]), group)
    total = counts.sum()
    if not torch.compiler.is_compiling() and total < 2:  # in compiled code the host asks the device for nothing
        shape = tuple(x.shape)
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    joined_mean = (counts * means).sum(0) / total
    joined_m2 = (m2s + counts * (means - joined_mean).square()).sum(0)
    return joined_mean.to(dtype), (joined_m2 / total).to(dtype), total


def _gather(part: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Two values a channel and one number (2 C + 1,) of every rank: (ranks, C), (ranks, C), (ranks, 1)."""
    parts = part.new_empty(world_size_of(group) * len(part))  # flat, as gloo wants it
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # older torch
    all_gather(parts, part, group)
    channels = len(part) // 2
    first, second, number = parts.view(-1, len(part)).split([channels, channels, 1], dim=1)
    return first, second, number


class _NormaliseByKernels(torch.autograd.Function):
    """torch's SyncBatchNorm, which has kernels of its own on GPUs, without its waiting for the device at every layer.

    It looks for ranks without samples (https://github.com/pytorch/pytorch/issues/78656). Here every rank has some.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        share: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        assert len(x), "a rank without samples"
        if not _is_channels_last(x):
            x = x.contiguous()
        mean, invstd = torch.batch_norm_stats(x, eps)
        means, invstds, counts = _gather(torch.cat([mean, invstd, mean.new_full((1,), x[:, 0].numel())]), group)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, share, eps, counts.flatten().to(running_mean.dtype)
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

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
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        if len(x):
            _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        else:  # torch's kernel divides by zero
            dweight = dbias = torch.zeros_like(weight)
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([dweight, dbias])  # Σ dy · x̂ and Σ dy of this rank
            dist.all_reduce(sums, group=ctx.group)
            mean_dy_xhat, mean_dy = sums / count
            invstd = (var + ctx.eps).rsqrt()
            scale = weight * invstd
            # In fp32, and rounded once: correcting a half dx would round twice.
            dx = (x - _per_channel(mean, x)).mul_(_per_channel(-scale * invstd * mean_dy_xhat, x))
            dx = dx.sub_(_per_channel(scale * mean_dy, x)).addcmul_(dy, _per_channel(scale, x)).to(x.dtype)
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None, None, None, None, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) in a shape that broadcasts over ``x`` (N, C, …)."""
    return values.view(-1, *[1] * (x.dim() - 2))
