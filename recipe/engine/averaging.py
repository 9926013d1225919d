"""A moving average of the weights and of batch norm's running averages, kept on the device beside those that train."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.func import functional_call


class WeightAverage:
    """The exponential moving average of an engine's master weights, by a decay per image.

    A step on B images takes the share max(1 − decayᴮ, B / n) of the new weights into the average, where n counts the
    images so far. While the second is the larger, it is the plain mean of all weights since the start (Polyak and
    Juditsky 1992), in which the random ones have no part. A step whose update was skipped counts no images.

    Args:
        decay: How much of the average an image leaves in place, from 0 to 1.
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
        """Take in the weights after a step; ``skipped``, bool () on the device, says that there was no update."""
        applied, batch = 1.0 if skipped is None else (~skipped).double(), self._batch()
        self._images += batch * applied
        share = (batch / self._images.clamp(min=batch)).clamp(min=1 - self._decay**batch) * applied
        averages = list(self._average.values())
        changes = torch._foreach_sub(list(self._weights.values()), averages)
        torch._foreach_mul_(changes, share.to(changes[0].dtype))  # of one dtype: a few kernels
        torch._foreach_add_(averages, changes)

    def forward(self) -> Callable[[Tensor], Tensor]:
        """The model as a function with the averages in place of its weights, cast to their dtypes."""
        own = dict(chain(self._module.named_parameters(), self._module.named_buffers()))
        cast = {name: value.to(own[name].dtype) for name, value in self._average.items()}
        return lambda images: functional_call(self._module, cast, (images,))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"images": self._images, "tensors": self._average}

    @torch.no_grad()
    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's ``state``; None, of one that has none: begin with the weights that are there."""
        self._images.copy_(torch.zeros(()) if state is None else state["images"])
        for name, value in (self._weights if state is None else state["tensors"]).items():
            self._average[name].copy_(value)


def average_of(model: Any) -> WeightAverage | None:
    """The average that ``start_engine`` has given an engine, if any."""
    return getattr(model, "weight_average", None)
