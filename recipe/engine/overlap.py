"""Reduces the gradients while the backward pass still makes others; at ZeRO stage 0 DeepSpeed waits for its end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 8 * 2**20


@dataclass
class Bucket:
    """Parameters whose gradients travel in one message; ``parts`` are its pieces, one a parameter."""

    parameters: list[nn.Parameter]
    message: Tensor
    parts: list[Tensor]
    missing: int
    work: dist.Work | None = None


class OverlappedReduction:
    """Replaces each gradient by its mean over the ranks: starts with the last layers, ends in :meth:`finish`.

    Messages leave in one order on all ranks and in all runs, whichever gradient comes first: sums round the same.

    Args:
        parameters: In the order of the forward pass; only those that require gradients.
        group: The ranks.
        due: Whether the backward pass under way is one whose gradients are reduced, the last of an accumulation.
        dtype: In which gradients travel.
        before: Factor of the gradients before they are summed up.
        after: Factor of the sums.
        bucket_bytes: Least size of a message; the last one may have less.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        due: Callable[[], bool],
        dtype: torch.dtype,
        before: float,
        after: float,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._group, self._due, self._before, self._after = group, due, before, after
        self._buckets = make_buckets(list(parameters), dtype, bucket_bytes)
        self._next = 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def finish(self) -> None:
        """Wait for the sums and put the means into the gradients, where they are due; missing ones count as zero."""
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
                # A part of the message itself, which is in no one's way until the gradients of the next step are there.
                parameter.grad = part.to(parameter.dtype)
            bucket.work, bucket.missing = None, len(bucket.parameters)
        self._next = 0

    def _hook(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if not self._due():
                return
            bucket.missing -= 1
            while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
                self._start_next()

        return arrived

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        torch._foreach_copy_(bucket.parts, fill_in_gradients(bucket.parameters))
        if self._before != 1:
            bucket.message.mul_(self._before)
        bucket.work = deepspeed.comm.all_reduce(bucket.message, group=self._group, async_op=True)
        self._next += 1


def make_buckets(parameters: list[nn.Parameter], dtype: torch.dtype, bucket_bytes: int) -> list[Bucket]:
    """Cut ``parameters`` into messages of at least ``bucket_bytes``, from the last to the first."""
    runs: list[list[nn.Parameter]] = []
    filled = bucket_bytes
    for parameter in reversed(parameters):
        if filled >= bucket_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(parameter)
        filled += parameter.numel() * dtype.itemsize
    buckets = []
    for run in runs:
        message = torch.empty(sum(parameter.numel() for parameter in run), dtype=dtype, device=run[0].device)
        pieces = message.split([parameter.numel() for parameter in run])
        # In the memory format of the gradients, or each would be copied by a kernel of its own.
        parts = [
            piece.as_strided(parameter.shape, parameter.stride()) for piece, parameter in zip(pieces, run, strict=True)
        ]
        buckets.append(Bucket(run, message, parts, len(run)))
    return buckets


def fill_in_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients; one that the model did not use counts as zero, on any number of ranks, and its weight decays."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    return gradients
