"""``"max_micro_batch_size": "auto"``: the largest micro-batch that fits the device.

With batch norm over a fixed number of samples the micro-batch does not change the training, so nobody has to choose
it. On a GPU it is found by training steps of the model itself, the largest micro-batch first.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from recipe.engine.device import device_name
from recipe.model import DTYPES, BatchNorm, cast_parameters
from recipe.plan import Plan, with_micro_batch

CPU_MICRO_BATCH = 32  # more is no faster, and the activations of ResNet-50 take 6 GB
# Bytes per parameter in addition to the trial's own weights and gradients: fp32 master copy and momentum (LAMB has two
# moments), the gradients in fp32, and the buffer in which they are reduced.
ENGINE_BYTES_PER_PARAMETER = 20
RESERVED_SHARE = 0.05  # of the device's memory, for fragmentation and the process group
# In messages of cuDNN and cuBLAS that lacked memory: torch does not raise its OutOfMemoryError for them
# (https://github.com/pytorch/pytorch/issues/108645).
NO_MEMORY = ("unable to find an engine", "STATUS_ALLOC_FAILED")


class MicroBatchError(RuntimeError):
    """A micro-batch does not fit the GPU."""

    def __init__(self, micro_batch: int, device: str, error: Exception) -> None:
        super().__init__(
            f"micro-batches of {micro_batch} images do not fit {device}: {error}; lower recipe.max_micro_batch_size, "
            'or use "auto"'
        )


@contextmanager
def explained_memory(micro_batch: int, device: torch.device) -> Iterator[None]:
    """Raise a MicroBatchError in place of the errors that mean too little memory."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY):
            raise MicroBatchError(micro_batch, device_name(device), error) from error
        raise


def settle_micro_batch(plan: Plan, model: nn.Module, device: torch.device, earlier: int | None) -> tuple[Plan, str]:
    """The plan with the largest micro-batch that fits every rank's device, and the reason for it.

    A run that resumes keeps the ``earlier`` micro-batch, and so the same bits. If the config gives the micro-batch, the
    plan is unchanged and the reason is "".

    Raises:
        RuntimeError: CUDA's error for the smallest micro-batch, if none fits.
    """
    if not plan.assumes_micro_batch:
        return plan, ""
    candidates = plan.possible_micro_batches
    if earlier in candidates:
        return with_micro_batch(plan, earlier), "as before"
    if device.type == "cpu":
        size = max((size for size in candidates if size <= CPU_MICRO_BATCH), default=min(candidates))
        return with_micro_batch(plan, size), f"on a CPU the largest up to {CPU_MICRO_BATCH}"
    size = largest_on_gpu(candidates, model, plan.largest_image_size, DTYPES[plan.precision], device)
    return with_micro_batch(plan, size), f"the largest that fits {device_name(device)}"


def largest_on_gpu(
    candidates: Sequence[int], model: nn.Module, image_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """The largest of ``candidates`` for which a training step fits every rank's GPU; the same on all ranks."""
    own = largest_that_fits(candidates, lambda size: try_training(model, size, image_size, dtype, device))
    agreed = torch.tensor(own, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return int(agreed)


def largest_that_fits(candidates: Sequence[int], train: Callable[[int], None]) -> int:
    """The largest of ``candidates`` for which ``train`` raises no RuntimeError, such as running out of memory.

    Raises:
        RuntimeError: that of the smallest candidate, if none fits.
    """
    *larger, smallest = sorted(candidates, reverse=True)
    for size in larger:
        try:
            train(size)
        except RuntimeError:  # out of memory, or a kernel that cannot index so many values
            pass
        else:
            return size
        # The trial's tensors are in reference cycles with the exception's frames and would take memory from the next.
        gc.collect()
    train(smallest)
    return smallest


def try_training(model: nn.Module, micro_batch: int, image_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Run two forward and backward passes of a copy of ``model``, in as little memory as a run leaves for them."""
    torch.cuda.empty_cache()  # of the previous trial
    trial = copy.deepcopy(model).to(device)
    cast_parameters(trial, dtype)
    for module in trial.modules():
        # Each rank tries alone; statistics over several ranks take no more memory than these.
        if isinstance(module, BatchNorm):
            n = module.statistics
            module.statistics = n if isinstance(n, int) and micro_batch % n == 0 else "local"
    parameters = sum(parameter.numel() for parameter in trial.parameters())
    reserved = RESERVED_SHARE * torch.cuda.get_device_properties(device).total_memory
    ballast = torch.empty(ENGINE_BYTES_PER_PARAMETER * parameters + round(reserved), dtype=torch.uint8, device=device)
    images = torch.zeros(micro_batch, 3, image_size, image_size, dtype=dtype, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.zeros(micro_batch, dtype=torch.long, device=device)
    for _ in range(2):
        F.cross_entropy(trial(images).float(), labels).backward()
    torch.cuda.synchronize(device)
    del ballast
