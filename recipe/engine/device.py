"""The device of a rank."""

import os

import torch
from deepspeed.accelerator import get_accelerator


def rank_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:
        ValueError: there are fewer GPUs than ranks on this host.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {os.environ.get('RANK', '0')} is the {local_rank + 1}. on this host, which has "
            f"{torch.cuda.device_count()} GPUs; lower slots= in the hostfile, or --num_gpus"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_device(precision: str) -> torch.device:
    """``rank_device``, which must know ``precision``.

    Raises:
        ValueError: see ``rank_device``; or the device does not know it.
    """
    device, accelerator = rank_device(), get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in supported and not supported[precision]():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ValueError(
            f'{precision}.enabled = true: {name} does not support it; write "{precision}": {{"enabled": false}} to '
            "train in fp32, or run it on a GPU that has it"
        )
    return device


def device_name(device: torch.device) -> str:
    """What the run ran on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} per rank"
