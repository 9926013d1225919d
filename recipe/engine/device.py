"""Chooses the device of this rank and configures its kernels."""

import os
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from recipe.plan import counted


def choose_device(precision: str) -> torch.device:
    """This rank's GPU, or the CPU if there is no GPU.

    Raises:
        ValueError: there are fewer GPUs than ranks on this host, or the device does not support the precision.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {os.environ.get('RANK', '0')} is number {local_rank + 1} on this host, which has "
                f"{torch.cuda.device_count()} GPUs; lower slots= in the hostfile, or --num_gpus"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in supported and not supported[precision]():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ValueError(
            f'{precision}.enabled = true: {name} does not support it; use "{precision}": {{"enabled": false}} to '
            "train in fp32, or run it on a GPU that supports it"
        )
    return device


def slow_precision(device: torch.device, precision: str) -> list[str]:
    """A warning if ``device`` is a CPU that computes faster in fp32 than in ``precision``."""
    if device.type != "cpu" or precision not in ("fp16", "bf16"):
        return []
    # avx512_bf16 and amx_bf16, or bf16 on Arm. Without them, torch converts to fp32 and back.
    if precision == "bf16" and "bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"):
        return []
    return [
        f"{precision} on this CPU takes longer than fp32, perhaps many times as long; "
        f"--set {precision}.enabled=false trains in fp32"
    ]


def device_name(device: torch.device) -> str:
    """A human-readable name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} per rank"


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and of ``device``.

    ``torch.manual_seed`` also visits every other kind of accelerator, which takes a quarter of a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def choose_kernels(*, tf32: bool, cudnn_benchmark: bool) -> None:
    """Configure torch's CUDA kernels for this process; has no effect on a CPU.

    Args:
        tf32: Whether the factors of fp32 products may be rounded to TF32's 10 bits. Set through the older of torch's
            two interfaces: with the newer one, torch's own ``get_float32_matmul_precision`` raises.
        cudnn_benchmark: Whether cuDNN times its algorithms for every shape and uses the fastest, which may be a
            different one, with different rounding, in the next process. Otherwise it uses deterministic algorithms
            (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.deterministic = not cudnn_benchmark
