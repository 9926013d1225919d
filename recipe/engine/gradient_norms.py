"""Norms of the gradients of each micro-batch and of their mean, computed on the device without waiting for it."""

from collections.abc import Callable, Iterable

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn


class GradientNorms:
    """Measures gradients during backward passes; :meth:`take` returns the norms once per optimizer step.

    Args:
        parameters: Only those that require gradients are measured.
        due: Whether to measure the current step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], due: Callable[[], bool]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._due = due
        self._arriving: list[Tensor] = []
        self._micro_batches: list[Tensor] = []
        for parameter in self._parameters:
            parameter.register_hook(self._arrived)

    def take(self, scale: Tensor) -> Tensor | None:
        """Mean squared norm of this rank's micro-batches and that of the mean gradient, float64 (2,); None if not due.

        Call it once per step, after the gradients are averaged and before the optimizer step.

        Args:
            scale: The loss scale, float64 (), by which the gradients are divided.
        """
        if not self._due():
            return None
        micro_batches = torch.stack(self._micro_batches)
        mean = norm_squared([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        self._micro_batches = []
        # Accumulation divides the gradient of each micro-batch by their number.
        own = micro_batches.mean() * len(micro_batches) ** 2
        return torch.stack([own, mean]) / scale**2

    def _arrived(self, gradient: Tensor) -> None:
        if not self._due():
            return
        if not self._arriving:
            # Runs at the end of the pass, before the all-reduce writes the mean to the same memory.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
        # Detached: autograd would have to copy the gradient if this very tensor were kept.
        self._arriving.append(gradient.detach())

    def _end_of_pass(self) -> None:
        self._micro_batches.append(norm_squared(self._arriving))
        self._arriving = []


@torch.no_grad()
def norm_squared(gradients: list[Tensor]) -> Tensor:
    """The squared norm of all gradients as one vector, float64 (); each tensor's is computed in fp32 at least."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)).double().square().sum()


def listen_to_gradients(engine: DeepSpeedEngine, every_steps: int) -> GradientNorms:
    """Measure the gradient norms for the noise scale at every ``every_steps``-th optimizer step of ``engine``."""
    return GradientNorms(engine.module.parameters(), lambda: engine.global_steps % every_steps == 0)
