"""One epoch of training and one pass over the validation set, on a DeepSpeed engine."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from recipe.engine.averaging import average_of
from recipe.engine.gradient_norms import GradientNorms
from recipe.engine.local_steps import local_steps_of
from recipe.engine.precision import loss_scale, overflowed
from recipe.engine.start import backward
from recipe.model import update_running_averages

Loss = Callable[[Tensor, Tensor], Tensor]


class NoImageError(ValueError):
    """No rank could read any validation image; raised on all ranks."""


class Batch(Protocol):
    """A micro-batch of m samples on the device."""

    @property
    def images(self) -> Tensor:
        """(m, 3, S, S), in the model's dtype."""

    @property
    def labels(self) -> Tensor:
        """int64 (m,), or in training probabilities (m, classes)."""

    @property
    def weights(self) -> Tensor:
        """float32 (m,): 1 for a sample that counts in validation, 0 for padding."""

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Files that could not be read and were replaced or skipped."""

    @property
    def decoded_by_pil(self) -> int:
        """How often an image needed the slower decoder."""


@dataclass(frozen=True)
class Step:
    """An optimizer step on one rank; tensors are on the device.

    Attributes:
        step: Counted from 0 over the whole run.
        lr: The rate that the update used.
        loss: The mean over this rank's share of the global batch, before the update; a scalar.
        loss_scale: The scale of the gradients, float64 ().
        skipped: Whether the update was skipped because gradients overflowed, bool (); None if they cannot overflow.
        data_wait_seconds: The time spent waiting for the data loader.
        gradient_norms: The result of ``GradientNorms.take``, meaningless if the update was skipped; None if not due.
    """

    step: int
    lr: float
    loss: Tensor
    loss_scale: Tensor
    skipped: Tensor | None
    data_wait_seconds: float
    bad_images: tuple[str, ...]
    decoded_by_pil: int = 0
    gradient_norms: Tensor | None = None


@dataclass(frozen=True)
class Validation:
    """Top-1 and top-5 accuracy in per cent and mean loss over the ``count`` images that counted.

    ``averaged`` holds the same three for the weights' moving average, if the engine keeps one.
    """

    top1: float
    top5: float
    loss: float
    count: int
    bad_images: tuple[str, ...]
    decoded_by_pil: int = 0
    averaged: tuple[float, float, float] | None = None

    @property
    def top1_to_keep(self) -> float:
        """The top-1 accuracy of the weights that are kept: the moving average, if there is one."""
        return self.top1 if self.averaged is None else self.averaged[0]


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean loss of a micro-batch, computed in fp32 at least."""
    return F.cross_entropy(_at_least_fp32(logits), labels, label_smoothing=label_smoothing)


def training_loss(model: nn.Module, *, label_smoothing: float, compiled: bool) -> Loss:
    """The loss for ``train_epoch``; ``compiled`` compiles it and, in place, the forward and backward pass of ``model``.

    The class of the model and the names of its parameters do not change, and DeepSpeed's hooks around the forward pass
    stay outside the graph, which they would break. Each image size has its own kernels, the same in a resumed run.
    """
    loss_function = partial(cross_entropy, label_smoothing=label_smoothing)
    if not compiled:
        return loss_function
    model.forward = torch.compile(model.forward, dynamic=False)
    return torch.compile(loss_function, dynamic=False)


def train_epoch(
    engine: DeepSpeedEngine,
    batches: Iterable[Batch],
    gradient_norms: GradientNorms | None = None,
    loss_function: Loss = cross_entropy,
) -> Iterator[Step]:
    """Train on micro-batches as they arrive; yield after each optimizer step.

    ``engine.step()`` follows every micro-batch: DeepSpeed counts them and updates at the end of each accumulation.
    """
    engine.train()
    accumulation, average, local = engine.gradient_accumulation_steps(), average_of(engine), local_steps_of(engine)
    losses: list[Tensor] = []
    bad_images: list[str] = []
    data_wait_seconds, decoded_by_pil = 0.0, 0
    asked = time.perf_counter()
    for batch in batches:
        data_wait_seconds += time.perf_counter() - asked
        if local is not None and not losses:
            local.begin_step()
        loss = loss_function(engine(batch.images), batch.labels)
        losses.append(loss.detach())
        bad_images += batch.bad_images
        decoded_by_pil += batch.decoded_by_pil
        backward(engine, loss)
        lr, scale, step = engine.get_lr()[0], loss_scale(engine), engine.global_steps
        last = len(losses) == accumulation
        norms = gradient_norms.take(scale) if last and gradient_norms is not None else None
        engine.step()
        if last:
            # DeepSpeed does not advance its scheduler when fp16 skips an update; the rate follows the data seen.
            engine.lr_scheduler.step(engine.global_steps)
            mean_loss = torch.stack(losses).mean()
            skipped = overflowed(engine)
            update_running_averages(engine.module, discard=skipped)
            if average is not None:
                average.update(skipped)
            if local is not None:
                local.end_step()
            yield Step(step, lr, mean_loss, scale, skipped, data_wait_seconds, tuple(bad_images), decoded_by_pil, norms)
            losses, bad_images, data_wait_seconds, decoded_by_pil = [], [], 0.0, 0
        asked = time.perf_counter()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    observe: Callable[[Tensor, Batch], None] = lambda logits, batch: None,
) -> Validation:
    """Validate on every rank's ``batches``; each image counts with its weight, 1 or 0 (padding, unreadable).

    Args:
        model: An engine, or the model itself; it is left in evaluation mode.
        batches: The same number on every rank.
        device: The device of the batches.
        observe: Called with the logits of each batch, (m, classes) in fp32 at least, and the batch.

    Raises:
        NoImageError: No image could be read.
    """
    model.eval()
    average = average_of(model)
    models: list[Callable[[Tensor], Tensor]] = [model] if average is None else [model, average.forward()]
    totals = torch.zeros(len(models), 4, dtype=torch.float64, device=device)
    bad_images: list[str] = []
    decoded_by_pil = 0
    for batch in batches:
        for total, one in zip(totals, models, strict=True):
            logits = _at_least_fp32(one(batch.images))
            if one is model:
                observe(logits, batch)
            hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            per_image = torch.stack([hits[:, 0], hits.any(1), losses.double(), torch.ones_like(losses)])
            total += (per_image * batch.weights).sum(1)
        bad_images += batch.bad_images
        decoded_by_pil += batch.decoded_by_pil
    dist.all_reduce(totals)
    count = round(float(totals[0, 3]))
    if count == 0:
        raise NoImageError(f"no validation image could be read, from {next(iter(bad_images), 'the first')} on")
    own, *averaged = [(100 * top1 / count, 100 * top5 / count, loss / count) for top1, top5, loss, _ in totals.tolist()]
    return Validation(*own, count, tuple(bad_images), decoded_by_pil, averaged[0] if averaged else None)


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
