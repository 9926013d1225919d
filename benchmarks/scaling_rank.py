"""The program that ``benchmarks/scaling.py`` starts on each rank: times the link, then steps with each reduction."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import chain, count
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
MESSAGES, LARGE_BYTES = 5, 2**25
WAYS = ("overlapped", "blocking", "none")


def main() -> None:
    """Measure; rank 0 writes the results of all ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batch", type=int, required=True, help="images per rank and step")
    parser.add_argument("--steps", type=int, required=True, help="timed steps per kind of reduction")
    parser.add_argument("--folder", type=Path, required=True, help="empty folder shared by all ranks")
    parser.add_argument("--local_rank", type=int, help="passed by the launcher; ignored")
    arguments = parser.parse_args()
    set_up_torch()
    import torch
    import torch.distributed as dist

    from recipe.engine import join_process_group, set_log_level

    set_log_level(verbose=False)
    join_process_group(torch.device("cpu"), timedelta(minutes=5))
    found = {"link": measure_link(), "steps": measure_steps(arguments)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (arguments.folder / FOUND).write_text(json.dumps(everyone))
    dist.barrier()


def measure_link() -> dict[str, float]:
    """Latency and bandwidth with all ranks sending around the ring at once, as in an all-reduce."""
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
            # Post the receive first: its ready message would otherwise queue behind the data sent to the same rank.
            work = [dist.irecv(received, (rank - 1) % ranks), dist.isend(message, (rank + 1) % ranks)]
            for request in work:
                if request is not None:
                    request.wait()
            seconds.append(time.perf_counter() - started)
        return median(seconds)

    around(torch.zeros(1))  # establishes the connections
    latency = around(torch.zeros(1))
    long = around(torch.zeros(LARGE_BYTES // 4))
    return {"latency_seconds": latency, "bytes_per_second": LARGE_BYTES / (long - latency)}


def measure_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Step times of the real loop on real data, with gradients reduced during the backward pass, after it, or never."""
    import torch
    import torch.distributed as dist

    from recipe.data import TrainLoader
    from recipe.engine import deepspeed_config, start_engine, train_epoch
    from recipe.model import parameter_groups
    from recipe.run import prepare

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
    passed_on = deepspeed_config(plan.config.model_dump(mode="json", exclude_none=True), run.output)
    engine = start_engine(run.model, parameter_groups(run.model, plan.weight_decay), passed_on, plan.schedule)
    loader = TrainLoader(
        run.samples[0],
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=dist.get_rank(),
        world_size=ranks,
        seed=plan.config.recipe.seed,
        workers=plan.workers,
        device=run.device,
        dtype=torch.float32,
        mean=plan.mean,
        std=plan.std,
    )
    gradient_bytes = sum(4 * parameter.numel() for parameter in engine.module.parameters())
    alone = all_reduce_alone(gradient_bytes) if ranks > 1 else 0.0
    reduces, step_of_engine = engine.enable_backward_allreduce, engine.step
    ways = WAYS if ranks > 1 else ("none",)
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "data_wait")}
    trained = chain.from_iterable(train_epoch(engine, loader.epoch(epoch)) for epoch in count())
    for _ in range(WARM_UP_STEPS):
        next(trained)
    for number in range(len(ways) * arguments.steps):
        way = ways[number % len(ways)]
        engine.enable_backward_allreduce = reduces and way == "overlapped"
        engine.step = reduces_first(engine, step_of_engine) if way == "blocking" else step_of_engine
        dist.barrier()
        started = time.perf_counter()
        step = next(trained)
        seconds[way].append(time.perf_counter() - started)
        if way == ways[0]:
            seconds["data_wait"].append(step.data_wait_seconds)
    loader.close()
    return {
        "step": {name: median(values) for name, values in seconds.items()},
        "all_reduce_alone": alone,
        "gradient_bytes": gradient_bytes,
    }


def all_reduce_alone(message_bytes: int) -> float:
    """Seconds for an all-reduce that all ranks start together, with nothing else running."""
    import torch
    import torch.distributed as dist

    message = torch.zeros(message_bytes // 4)
    seconds = []
    for _ in range(MESSAGES):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(message)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def reduces_first(engine: Any, step_of_engine: Callable[[], None]) -> Callable[[], None]:
    """The engine's step, preceded by DeepSpeed's own reduction, which the recipe replaces."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    def step() -> None:
        DeepSpeedEngine.allreduce_gradients(engine)
        step_of_engine()

    return step


if __name__ == "__main__":
    main()
