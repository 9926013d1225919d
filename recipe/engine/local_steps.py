"""Post-local SGD (Lin et al. 2018, arXiv 1808.07217): ranks step independently and average their weights periodically.

torch's PeriodicModelAverager counts from the start of the process, which a resume would shift, and replaces weights by
slices of one tensor, which lose their memory format.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from recipe.engine.overlap import fill_in_gradients


class LocalSteps:
    """Makes local steps, in which each rank updates with its own gradients; momentum is never averaged.

    Args:
        is_local: Whether an optimizer step, counted from 0, is local.
        equal_after: Whether all ranks must have the same weights after this number of steps.
    """

    def __init__(
        self, engine: DeepSpeedEngine, is_local: Callable[[int], bool], equal_after: Callable[[int], bool]
    ) -> None:
        self._engine, self._is_local, self._equal_after = engine, is_local, equal_after
        self._masters = [weight for group in engine.basic_optimizer.param_groups for weight in group["params"]]
        engine.basic_optimizer.register_step_pre_hook(self._fill_in)

    @property
    def last_was_local(self) -> bool:
        """Whether the last step was local, so that the optimizer states of the ranks differ."""
        return self._engine.global_steps > 0 and self._is_local(self._engine.global_steps - 1)

    def begin_step(self) -> None:
        """Turn gradient all-reduce on or off for the backward passes of the next update."""
        self._engine.enable_backward_allreduce = not self._is_local(self._engine.global_steps)

    @torch.no_grad()
    def end_step(self) -> None:
        """Average the weights over the ranks if that is due."""
        if not self.last_was_local or not self._equal_after(self._engine.global_steps):
            return
        sums = torch.cat([master.reshape(-1) for master in self._masters])
        dist.all_reduce(sums)
        sums /= dist.get_world_size()
        parts = sums.split([master.numel() for master in self._masters])
        for master, part in zip(self._masters, parts, strict=True):
            master.copy_(part.view_as(master))
        halves = list(chain.from_iterable(getattr(self._engine.optimizer, "fp16_groups", ())))
        if halves:
            torch._foreach_copy_(halves, self._masters)

    def _fill_in(self, *_: Any) -> None:
        """Let weights that the model does not use decay, as they do when gradients are reduced."""
        fill_in_gradients(self._masters)

    def state(self) -> list[dict[str, Any]] | None:
        """This rank's optimizer state to save in a checkpoint; None if all ranks have the same."""
        return [dict(self._engine.basic_optimizer.state[one]) for one in self._masters] if self.last_was_local else None

    @torch.no_grad()
    def load(self, state: list[dict[str, Any]]) -> None:
        """Restore this rank's optimizer state, after the rest of the checkpoint is loaded."""
        for master, own in zip(self._masters, state, strict=True):
            for name, value in own.items():
                if isinstance(value, Tensor):
                    self._engine.basic_optimizer.state[master][name].copy_(value)


def local_steps_of(engine: Any) -> LocalSteps | None:
    """The local steps of an engine, or None if all its steps reduce gradients."""
    return getattr(engine, "local_steps", None)
