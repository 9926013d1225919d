"""Runs a function on real ranks: processes joined by a gloo process group."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank; return what each gave, in rank order.

    ``function`` is a module-level function and what it returns must be picklable; the default process group is ready
    when it starts. An exception on any rank is raised here with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (world_size, function, args, folder), nprocs=world_size)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, function: Callable[..., Any], args: tuple, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        result = function(rank, world_size, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
