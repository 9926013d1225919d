"""The update of DeepSpeed's fp16 and bf16 at ZeRO stage 0, in a few kernels and with at most one wait for the device.

DeepSpeed goes through the parameters one by one: it asks each gradient on the host whether it is finite, and unscales
and copies each for itself, which for ResNet-50 are 161 waits and some thousand kernels a step.
"""

import math
from itertools import chain

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from recipe.gradient_norms import norm_squared
from recipe.overlap import fill_in_gradients


def update_together(optimizer: FP16_UnfusedOptimizer, check_overflow: bool) -> None:
    """Replace ``optimizer.step`` by one that treats all parameters together; it skips what DeepSpeed's skips.

    Args:
        check_overflow: Whether an update with a gradient that is not finite is left out; to know it, the host waits.
    """
    weights = list(chain.from_iterable(optimizer.fp16_groups))
    masters = list(chain.from_iterable(optimizer.fp32_groups))

    @torch.no_grad()
    def step(closure: None = None) -> bool:
        gradients = fill_in_gradients(weights)
        norm = 0.0
        if check_overflow or optimizer.clip_grad > 0:
            norm = math.sqrt(norm_squared(gradients))
        optimizer.overflow = not math.isfinite(norm)
        if optimizer.overflow:
            optimizer._skip_invalid_grad_norm()
            return True
        optimizer._global_grad_norm = norm
        # Before the loss scale may grow, which DeepSpeed lets happen first, so that that update came out half as large.
        scale = optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        optimizer._update_scale(False)
        unscaled = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(unscaled, gradients)
        if scale != 1:
            torch._foreach_mul_(unscaled, 1 / scale)
        for master, gradient in zip(masters, unscaled, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()
        for master in masters:
            master.grad = None
        torch._foreach_copy_(weights, masters)
        return False

    optimizer.step = step
