"""Gradient all-reduce that overlaps with the backward pass; at ZeRO stage 0 DeepSpeed would wait for its end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 8 * 2**20  # the minimum size of a message; the last one can be smaller


@dataclass
class Bucket:
    """Parameters whose gradients are reduced in one message; ``parts`` are its slices, one per parameter."""

    parameters: list[nn.Parameter]
    message: Tensor
    parts: list[Tensor]
    missing: int
    work: dist.Work | None = None


class OverlappedReduction:
    """Replaces each gradient by its mean over the ranks, from the last layer to the first; ends in :meth:`finish`.

    Messages are sent in the same order on all ranks and in all runs, whichever gradient comes first, so that sums
    round the same.

    Args:
        parameters: Those that require gradients, in the order of the forward pass.
        group: The ranks.
        due: Whether the current backward pass reduces gradients, as the last of an accumulation.
        dtype: The data type of the messages.
        before: The factor that gradients are multiplied by before they are summed.
        after: The factor that the sums are multiplied by.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        due: Callable[[], bool],
        dtype: torch.dtype,
        before: float,
        after: float,
    ) -> None:
        self._group, self._due, self._before, self._after = group, due, before, after
        self._buckets = make_buckets(list(parameters), dtype)
        self._next = 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    def finish(self) -> None:
        """If due, wait for the sums and write the means to the gradients; missing gradients count as zero."""
        if not self._due():
            return
        while self._next < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            if self._after != 1:
                bucket.message.mul_(self._after)
            for parameter, part in zip(bucket.parameters, bucket.parts, strict=True):
                # A slice of the message itself, which is not needed again until the next step's gradients arrive.
                parameter.grad = part.to(parameter.dtype)
            bucket.work, bucket.missing = None, len(bucket.parameters)
        self._next = 0

    def _arrived(self, bucket: Bucket, parameter: Tensor) -> None:
        if not self._due():
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        torch._foreach_copy_(bucket.parts, fill_in_gradients(bucket.parameters))
        if self._before != 1:
            bucket.message.mul_(self._before)
        bucket.work = deepspeed.comm.all_reduce(bucket.message, group=self._group, async_op=True)
        self._next += 1


def make_buckets(parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Bucket]:
    """Group ``parameters`` into messages of at least ``BUCKET_BYTES``, from the last to the first."""
    runs: list[list[nn.Parameter]] = []
    filled = BUCKET_BYTES
    for parameter in reversed(parameters):
        if filled >= BUCKET_BYTES:
            runs.append([])
            filled = 0
        runs[-1].append(parameter)
        filled += parameter.numel() * dtype.itemsize
    buckets = []
    for run in runs:
        message = torch.empty(sum(parameter.numel() for parameter in run), dtype=dtype, device=run[0].device)
        pieces = message.split([parameter.numel() for parameter in run])
        # In the memory format of the gradients; otherwise each would be copied by its own kernel.
        parts = [
            piece.as_strided(parameter.shape, parameter.stride()) for piece, parameter in zip(pieces, run, strict=True)
        ]
        buckets.append(Bucket(run, message, parts, len(run)))
    return buckets


def fill_in_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients, zero for a weight that the model did not use, which then decays on any number of ranks."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    return gradients
