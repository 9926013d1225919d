"""Norms of a step's gradients, of each micro-batch and of their mean, taken on the device without waiting for it."""

from collections.abc import Callable, Iterable

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn


class GradientNorms:
    """Listens to backward passes; what it hears, :meth:`take` hands over once an optimizer step.

    Args:
        parameters: Those that require gradients count.
        due: Whether the step under way is one to measure.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], due: Callable[[], bool]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._due = due
        self._arriving: list[Tensor] = []
        self._micro_batches: list[Tensor] = []
        for parameter in self._parameters:
            parameter.register_hook(self._arrived)

    def take(self, scale: Tensor) -> Tensor | None:
        """Two squared norms, float64: the mean over this rank's micro-batches, and that of the gradient in place.

        Call it once a step, when the gradients are averaged and before the optimizer uses them up.

        Args:
            scale: The loss scale, float64 (): the gradients are so many times too large.

        Returns:
            None if the step is not to be measured.
        """
        if not self._due():
            return None
        micro_batches = torch.stack(self._micro_batches)
        mean = norm_squared([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        self._micro_batches = []
        # Each micro-batch's part of the mean is so many times smaller than its own gradient.
        own = micro_batches.mean() * len(micro_batches) ** 2
        return torch.stack([own, mean]) / scale**2

    def _arrived(self, gradient: Tensor) -> None:
        if not self._due():
            return
        if not self._arriving:
            # At the end of the pass, when the reduction has not yet put the mean into the same memory.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
        # Autograd keeps a gradient in place of copying it if nobody else holds this very tensor.
        self._arriving.append(gradient.detach())

    def _end_of_pass(self) -> None:
        self._micro_batches.append(norm_squared(self._arriving))
        self._arriving = []


@torch.no_grad()
def norm_squared(gradients: list[Tensor]) -> Tensor:
    """Of all of them as one vector; a scalar, float64. The norms of parameters are taken in fp32 at least."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)).double().square().sum()


def listen_to_gradients(engine: DeepSpeedEngine, every_steps: int) -> GradientNorms:
    """What the noise scale is estimated from, measured at each ``every_steps``-th optimizer step of ``engine``."""
    return GradientNorms(engine.module.parameters(), lambda: engine.global_steps % every_steps == 0)
