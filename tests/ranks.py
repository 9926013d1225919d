"""Runs functions in separate processes, and on real ranks: processes joined by a gloo process group."""

import faulthandler
import gc
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# CUDA does not survive a fork after deepspeed has searched for devices.
START_METHOD = "spawn" if torch.cuda.is_available() else "forkserver"


def start_fork_server() -> None:
    """Start the process that ranks are forked from, because importing takes longer than most tests.

    Call it before any test: ``recipe pack`` would start it with other imports and with signals blocked.
    """
    mp.get_context("forkserver").set_forkserver_preload(["deepspeed", "timm", "sklearn.datasets", "recipe.run"])
    with mock.patch.dict(os.environ, TORCH_CPP_LOG_LEVEL="ERROR"):  # a run sets it before it imports torch
        forkserver.ensure_running()


def fork(words: Path, variables: Mapping[str, str], function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start ``function(*args)`` in a process with these environment variables, which writes to ``words``.std*."""
    process: BaseProcess = mp.get_context(START_METHOD).Process(
        target=_forked_main, args=(words, dict(variables), function, args)
    )
    process.start()
    return process


def _forked_main(words: Path, variables: dict[str, str], function: Callable[..., Any], args: tuple) -> None:
    for suffix, stream in ((".stdout", sys.stdout), (".stderr", sys.stderr)):
        os.dup2(os.open(words.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream.fileno())
    _forget_the_fork_server()
    os.environ.clear()
    os.environ |= variables
    function(*args)


def _forget_the_fork_server() -> None:
    """Undo what a fork inherits from its parent, unlike a separately started program."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
    gc.freeze()  # a full collection of the libraries' objects would take a second
    torch.set_num_threads(1)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on every rank; return the results in rank order.

    ``function`` is a module-level function with a picklable result; the default process group is ready when it starts.
    An exception on any rank is raised here with that rank's traceback. A rank that fails takes the others down, and the
    exception raised here can be one of theirs; so each rank also reports its failure, or its stack when it was ended,
    to stderr, which pytest shows.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(
                _rank_main, (world_size, function, args, folder), nprocs=world_size, start_method=START_METHOD
            )
        except Exception:
            for words in sorted(Path(folder).glob("*.stderr")):
                sys.stderr.write(words.read_text())
            raise
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, function: Callable[..., Any], args: tuple, folder: str) -> None:
    # This process has inherited the stderr of a different test.
    words = os.open(Path(folder, f"{rank}.stderr"), os.O_WRONLY | os.O_CREAT)
    os.dup2(words, sys.stderr.fileno())
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)  # torch ends the other ranks with it
    _forget_the_fork_server()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ["LOCAL_SIZE"] = str(world_size)  # without it ZeRO-3 starts numactl at every reduction
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, world_size, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        dist.barrier()
    except Exception:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or torch, which has seen another rank fail, ends this one first
        print(f"rank {rank} of {world_size} raised:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
