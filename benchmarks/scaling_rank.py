"""What ``benchmarks/scaling.py`` starts on each rank: measure the link, then steps with and without the all-reduce."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.config import read_config
from recipe.plan import make_plan
from recipe.train import set_up_torch

CONFIG = "ds_configs/digits_b512.json"
MODEL = "resnet18"
FOUND = "found.json"
WARM_UP_STEPS = 2
MESSAGES, LARGE_BYTES = 10, 2**23


def main() -> None:
    """Measure, and have rank 0 write what all found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="an empty one that all ranks see")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    set_up_torch()
    import torch
    import torch.distributed as dist

    from recipe.engine import join_process_group, set_loudness

    set_loudness(verbose=False)
    join_process_group(torch.device("cpu"), timedelta(minutes=5))
    found = {"link": measure_link(), "steps": measure_steps(arguments)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (arguments.folder / FOUND).write_text(json.dumps(everyone))
    dist.barrier()


def measure_link() -> dict[str, float]:
    """Around the ring of ranks, all at once, as an all-reduce goes: a short message's time, a long one's speed."""
    import torch
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return {}

    def around(message: torch.Tensor) -> float:
        received = torch.empty_like(message)
        seconds = []
        for _ in range(MESSAGES):
            dist.barrier()
            started = time.perf_counter()
            work = [dist.isend(message, (rank + 1) % ranks), dist.irecv(received, (rank - 1) % ranks)]
            for request in work:
                if request is not None:
                    request.wait()
            seconds.append(time.perf_counter() - started)
        return median(seconds)

    around(torch.zeros(1))  # makes the connections
    latency = around(torch.zeros(1))
    long = around(torch.zeros(LARGE_BYTES // 4))
    return {"latency_seconds": latency, "bytes_per_second": LARGE_BYTES / (long - latency)}


def measure_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps of the real loop on the real data, each with its twin that leaves the all-reduce out."""
    import torch
    import torch.distributed as dist

    from recipe.engine import start_engine
    from recipe.loop import train_epoch
    from recipe.model import parameter_groups
    from recipe.preflight import prepare
    from recipe.run import deepspeed_config, open_loaders

    ranks, micro_batch = dist.get_world_size(), arguments.micro_batch
    overrides = [
        f"train_batch_size={micro_batch * ranks}",
        f"recipe.model.name={MODEL}",
        f"recipe.max_micro_batch_size={micro_batch}",
        'recipe.batchnorm.statistics="local"',
        "recipe.schedule.warmup_epochs=1",
    ]
    plan = make_plan(read_config(CONFIG, overrides), ranks)
    run = prepare(plan, arguments.folder, "auto")
    engine = start_engine(
        run.model, parameter_groups(run.model, plan.weight_decay), deepspeed_config(plan, run.output), plan.schedule
    )
    loader, _ = open_loaders(run, torch.float32)
    reduces = engine.enable_backward_allreduce
    inside = timed(engine, "allreduce_gradients")
    seconds: dict[str, list[float]] = {"with": [], "without": [], "all_reduce": [], "data_wait": []}
    trained = train_epochs(lambda epoch: train_epoch(engine, loader.epoch(epoch)))
    for _ in range(WARM_UP_STEPS):
        next(trained)
    for number in range(2 * arguments.steps):
        kind = ("with", "without")[number % 2]
        engine.enable_backward_allreduce = reduces and kind == "with"
        inside.clear()
        dist.barrier()
        started = time.perf_counter()
        step = next(trained)
        seconds[kind].append(time.perf_counter() - started)
        if kind == "with":
            seconds["all_reduce"].append(sum(inside))
            seconds["data_wait"].append(step.data_wait_seconds)
    loader.close()
    return {name: median(values) for name, values in seconds.items()} | {
        "gradient_bytes": sum(4 * parameter.numel() for parameter in engine.module.parameters())
    }


def train_epochs(epoch: Callable[[int], Any]) -> Any:
    """Steps without end."""
    number = 0
    while True:
        yield from epoch(number)
        number += 1


def timed(engine: Any, name: str) -> list[float]:
    """Seconds of each call of a method from now on."""
    seconds: list[float] = []
    method = getattr(engine, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = method(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(engine, name, call)
    return seconds


if __name__ == "__main__":
    main()
