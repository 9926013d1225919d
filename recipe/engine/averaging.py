"""A moving average of the weights and of batch norm's running averages, kept on the device."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.func import functional_call


class WeightAverage:
    """The exponential moving average of an engine's master weights, with a decay per image.

    A step on B images adds the share max(1 − decayᴮ, B / n) of the new weights to the average, where n is the number of
    images so far. While B / n is the larger, the average is the plain mean of the weights after each step (Polyak and
    Juditsky 1992), to which the initial random ones do not contribute. A step whose update was skipped does not count.

    Args:
        decay: The share of the average that remains after one image, from 0 to 1.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self._module, self._batch, self._decay = engine.module, engine.train_batch_size, decay
        halves, masters = (
            chain.from_iterable(getattr(engine.optimizer, groups, ())) for groups in ("fp16_groups", "fp32_groups")
        )
        master_of = dict(zip(map(id, halves), masters, strict=True))
        self._weights = {name: master_of.get(id(value), value) for name, value in self._module.named_parameters()}
        self._weights |= {name: value for name, value in self._module.named_buffers() if value.is_floating_point()}
        self._average = {name: value.detach().clone() for name, value in self._weights.items()}
        self._images = torch.zeros((), dtype=torch.float64, device=engine.device)

    @torch.no_grad()
    def update(self, skipped: Tensor | None) -> None:
        """Add the weights after a step; ``skipped``, bool () on the device, means that the update was skipped."""
        applied, batch = 1.0 if skipped is None else (~skipped).double(), self._batch()
        self._images += batch * applied
        share = (batch / self._images.clamp(min=batch)).clamp(min=1 - self._decay**batch) * applied
        averages = list(self._average.values())
        changes = torch._foreach_sub(list(self._weights.values()), averages)
        torch._foreach_mul_(changes, share.to(changes[0].dtype))  # they share a dtype, so a few kernels suffice
        torch._foreach_add_(averages, changes)

    def forward(self) -> Callable[[Tensor], Tensor]:
        """The model's forward pass with the averages instead of its weights, cast to their dtypes."""
        own = dict(chain(self._module.named_parameters(), self._module.named_buffers()))
        cast = {name: value.to(own[name].dtype) for name, value in self._average.items()}
        return lambda images: functional_call(self._module, cast, (images,))

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        return {"images": self._images, "tensors": self._average}

    @torch.no_grad()
    def load(self, state: dict[str, Any] | None) -> None:
        """Restore a checkpoint's ``state``; if it has none, None, start again from the current weights."""
        self._images.copy_(torch.zeros(()) if state is None else state["images"])
        for name, value in (self._weights if state is None else state["tensors"]).items():
            self._average[name].copy_(value)


def average_of(model: Any) -> WeightAverage | None:
    """The weight average of an engine, or None if it keeps none."""
    return getattr(model, "weight_average", None)
