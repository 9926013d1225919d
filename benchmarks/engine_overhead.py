"""The overhead of the recipe's training step over plain PyTorch.

Each rank is one process that runs several loops over the same batches, interleaved one optimizer step at a time, so
that whatever slows the machine slows all of them:

- recipe: ``recipe.engine.train_epoch`` on DeepSpeed's engine, as in a run, without telemetry and data loading;
- plain: PyTorch's forward, backward and fused SGD; on several ranks, one all-reduce of all gradients;
- ddp, on several ranks: ``DistributedDataParallel``, with ``no_sync`` on all but the last micro-batch;
- timm, on one rank: plain with the model as timm builds it, that is, with ``torch.nn.BatchNorm2d``.

All but the last use the same model with the recipe's batch norm over all ranks (torch's own SyncBatchNorm refuses CPU
tensors), so that only the engine differs. Half precision uses autocast in PyTorch, with a GradScaler for fp16. Before
timing starts, the loops' weights are compared: they must agree up to rounding.

    python -m benchmarks.engine_overhead --world-size 1 2 --json benchmarks/results/engine_overhead_cpu.json
    torchrun --nproc-per-node 8 -m benchmarks.engine_overhead --model resnet50 --image-size 224 --precision fp16
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, Optimizer

from benchmarks.loading import one_rank_loader
from benchmarks.report import at_least, context, heading, new_parser, positive, publish
from recipe.data import Batch, SyntheticImages
from recipe.model import build_model, parameter_groups
from recipe.plan import RateSchedule
from recipe.train import set_up_torch

CLASSES = 1000
RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
LOSS_SCALE_POWER = 10  # small enough that neither GradScaler nor DeepSpeed skips a step for overflow
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP_STEPS = 3
# Allowed relative difference between two loops' warm-up updates; measured: fp32 0, bf16 0.02 to 0.04.
ROUNDING = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.15}
TIMEOUT = timedelta(minutes=10)


class Loop(NamedTuple):
    """A training loop: ``step`` runs one optimizer step; ``optimizer`` holds the fp32 weights."""

    step: Callable[[], object]
    optimizer: Optimizer

    def weights(self) -> Tensor:
        """All weights as one vector."""
        return torch.cat([p.detach().reshape(-1) for group in self.optimizer.param_groups for p in group["params"]])


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write it and the JSON."""
    arguments, where = parse_arguments(words), context("benchmarks.engine_overhead", words)
    set_up_torch()  # spawned ranks inherit the environment before they import torch
    if "RANK" in os.environ:  # a launcher started this process as one of its ranks
        results = run_rank(arguments, measure)
        if os.environ["RANK"] != "0":
            return 0
    else:
        results = [result for ranks in arguments.world_size for result in spawn_ranks(ranks, arguments)]
    report = where | {
        "settings": {key: getattr(arguments, key) for key in ("model", "image_size", "micro_batch", "precision")},
        "results": results,
    }
    publish(report, format_report(report), arguments.json)
    return 0


def add_loop_options(parser: argparse.ArgumentParser, accumulation: list[int]) -> None:
    """Add the options of a program that times training loops; ``accumulation`` is the default of ``--accumulation``."""

    def precision(text: str) -> str:
        if text == "fp16" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("fp16 needs a GPU")
        return text

    parser.add_argument("--model", default="resnet18", help="timm model name (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=64, help="pixels per side (default: %(default)s)")
    parser.add_argument("--micro-batch", type=positive, default=32, help="images per rank (default: %(default)s)")
    parser.add_argument(
        "--accumulation",
        type=positive,
        nargs="+",
        default=accumulation,
        help=f"one measurement each (default: {' '.join(map(str, accumulation))})",
    )
    parser.add_argument("--steps", type=at_least(2), default=40, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--precision",
        type=precision,
        choices=list(DTYPES),
        default="fp32",
        help="training precision (default: %(default)s)",
    )


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exit on a combination that cannot run."""
    parser = new_parser("benchmarks.engine_overhead", __doc__)
    add_loop_options(parser, accumulation=[1, 8, 32])
    parser.add_argument(
        "--world-size",
        type=positive,
        nargs="+",
        default=[1],
        help="numbers of ranks, measured one after the other (default: 1); not with torchrun",
    )
    arguments = parser.parse_args(words)
    if torch.cuda.is_available() and "RANK" not in os.environ and max(arguments.world_size) > torch.cuda.device_count():
        parser.error(f"--world-size {max(arguments.world_size)}: NCCL needs a GPU for each rank")
    return arguments


def spawn_ranks(world_size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the ranks on this machine; return rank 0's measurements."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_spawned_rank, (world_size, arguments, folder), nprocs=world_size)
        results: list[dict[str, Any]] = json.loads(Path(folder, "results.json").read_text())
        return results


def _spawned_rank(rank: int, world_size: int, arguments: argparse.Namespace, folder: str) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {key: str(value) for key, value in environment.items()}
    # A file store, because another program could take a port in the meantime.
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    results = run_rank(arguments, measure)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def run_rank(
    arguments: argparse.Namespace, measure: Callable[[argparse.Namespace, int, torch.device], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure every accumulation, as the rank given by the environment."""
    set_up_torch()
    from recipe.engine import join_process_group, set_log_level

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    set_log_level(verbose=False)
    join_process_group(device, TIMEOUT)
    results = [measure(arguments, accumulation, device) for accumulation in arguments.accumulation]
    dist.barrier()  # a rank that exits early makes gloo abort the others
    dist.destroy_process_group()
    return results


def measure(arguments: argparse.Namespace, accumulation: int, device: torch.device) -> dict[str, Any]:
    """Compare the recipe's step with the other loops'."""
    loops = make_loops(arguments, accumulation, device)
    start = loops["plain"].weights()
    warm_up(loops)
    differences = compare_training(loops, start, arguments.precision)
    by_loop = take_turns(loops, arguments.steps, device)
    return {
        "world_size": dist.get_world_size(),
        "accumulation": accumulation,
        "rounds": arguments.steps,
        "threads_a_rank": torch.get_num_threads(),
        "step_ms": {name: quartiles([1000 * value for value in times]) for name, times in by_loop.items()},
        "recipe_ratio": {
            name: ratio_of(by_loop["recipe"], times) for name, times in by_loop.items() if name != "recipe"
        },
        "update_differs_from_plain_by": differences,
    }


def make_loops(arguments: argparse.Namespace, accumulation: int, device: torch.device) -> dict[str, Loop]:
    """The loops by name, with the same initial weights and the same batches."""
    world_size = dist.get_world_size()
    batches = synthetic_batches(arguments.micro_batch, arguments.image_size, arguments.precision, accumulation, device)

    def model() -> nn.Module:
        return build_model(arguments.model, CLASSES, seed=0, statistics="global").to(device)

    loops = {
        "recipe": recipe_loop(model(), batches, arguments.precision),
        "plain": plain_loop(model(), batches, arguments.precision),
    }
    if world_size > 1:
        wrapped = DistributedDataParallel(model(), device_ids=[device.index] if device.type == "cuda" else None)
        wrapped.broadcast_buffers = False  # SyncBN keeps them equal; the argument warns in torch 2.15
        loops["ddp"] = plain_loop(wrapped, batches, arguments.precision)
    else:
        as_timm_makes_it = timm.create_model(arguments.model, num_classes=CLASSES)
        as_timm_makes_it.load_state_dict(model().state_dict())
        loops["timm"] = plain_loop(as_timm_makes_it.to(device), batches, arguments.precision)
    return loops


def synthetic_batches(
    micro_batch: int, image_size: int, precision: str, accumulation: int, device: torch.device
) -> list[Batch]:
    """The micro-batches of one step, different for each rank and micro-step."""
    batches: list[Batch] = []
    for micro_step in range(accumulation):
        seed = micro_step * dist.get_world_size() + dist.get_rank()
        images = SyntheticImages(micro_batch, classes=CLASSES, image_size=image_size, seed=seed, device=device)
        batches += one_rank_loader(images, micro_batch, device=device, dtype=DTYPES[precision]).epoch(0)
    return batches


def recipe_loop(
    model: nn.Module,
    batches: list[Batch],
    precision: str,
    measured: Callable[[], bool] | None = None,
    compiled: bool = False,
    stream: Iterable[Batch] | None = None,
) -> Loop:
    """The recipe's own loop on its engine; ``measured`` says for which steps gradient norms are measured.

    It trains on ``batches`` repeatedly, or on those of ``stream``, which must match them in size and number per step.
    """
    from recipe.engine import GradientNorms, train_epoch, training_loss

    engine = recipe_engine(model, len(batches[0].labels), len(batches), precision)
    norms = None if measured is None else GradientNorms(engine.module.parameters(), measured)
    loss_function = training_loss(engine.module, label_smoothing=0.0, compiled=compiled)
    steps = train_epoch(engine, stream or itertools.cycle(batches), norms, loss_function)
    return Loop(lambda: next(steps), engine.basic_optimizer)


def recipe_engine(model: nn.Module, micro_batch: int, accumulation: int, precision: str) -> Any:
    """DeepSpeed's engine as the recipe starts it, with a constant rate."""
    from recipe.engine import start_engine

    config: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "timers": {"throughput": {"enabled": False}},  # as in all shipped configs
        "optimizer": {
            "type": "SGD",
            "params": {"lr": RATE, "momentum": MOMENTUM, "nesterov": True, "weight_decay": WEIGHT_DECAY},
        },
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": LOSS_SCALE_POWER}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    constant_rate = RateSchedule(RATE, RATE, "none", 0, "linear", (), 0.1)
    return start_engine(model, parameter_groups(model, WEIGHT_DECAY), config, constant_rate)


def plain_loop(model: nn.Module, batches: list[Batch], precision: str) -> Loop:
    """The same training in plain PyTorch; ``DistributedDataParallel`` averages the gradients itself."""
    model.train()
    ddp = isinstance(model, DistributedDataParallel)
    optimizer = SGD(parameter_groups(model, WEIGHT_DECAY), lr=RATE, momentum=MOMENTUM, nesterov=True, fused=True)
    device = batches[0].images.device.type
    scaler = torch.amp.GradScaler(device, init_scale=2.0**LOSS_SCALE_POWER, enabled=precision == "fp16")
    world_size = dist.get_world_size()

    def step() -> None:
        for batch in batches:
            silent = ddp and batch is not batches[-1]
            with model.no_sync() if silent else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
                    logits = model(batch.images)
                loss = F.cross_entropy(logits.float(), batch.labels)
                scaler.scale(loss / len(batches)).backward()
        if world_size > 1 and not ddp:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            mean = parameters_to_vector(gradients).div_(world_size)
            dist.all_reduce(mean)
            vector_to_parameters(mean, gradients)
        scaler.step(optimizer)
        scaler.update()
        # Freed here and not before the next step, like DeepSpeed: a loop that kept its gradients while the others run
        # would have the memory ready, while one that freed it pays for page faults, on a CPU a tenth of a step.
        optimizer.zero_grad()

    return Loop(step, optimizer)


def compare_training(loops: dict[str, Loop], start: Tensor, precision: str) -> dict[str, float]:
    """Each loop's difference from plain PyTorch's update, relative to that update.

    Raises:
        RuntimeError: A difference exceeds rounding, so that comparing times would be meaningless.
    """
    update = loops["plain"].weights() - start
    differences = {}
    for name, loop in loops.items():
        if name == "plain":
            continue
        differences[name] = check_update(name, loop.weights() - start, update, precision)
    return differences


def check_update(name: str, update: Tensor, reference: Tensor, precision: str, than: str = "plain") -> float:
    """The relative difference of an update from ``reference``, the update of the loop ``than``.

    Raises:
        RuntimeError: The difference exceeds rounding.
    """
    difference = float((update - reference).norm() / reference.norm())
    if not difference <= ROUNDING[precision]:
        raise RuntimeError(
            f"{name} does not train as {than} does: their updates differ by {difference:.2g}, more than "
            f"{precision}'s rounding explains ({ROUNDING[precision]:g})"
        )
    return difference


def warm_up(loops: dict[str, Loop]) -> None:
    """Run the untimed steps of each loop."""
    for _ in range(WARM_UP_STEPS):
        for loop in loops.values():
            loop.step()


def take_turns(loops: dict[str, Loop], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds for a step of each loop in each round, on its slowest rank; each round starts with another loop."""
    seconds = torch.zeros(rounds, len(loops), dtype=torch.float64, device=device)
    turns = list(enumerate(loops.values()))
    for round_ in range(rounds):
        for column, loop in turns[round_ % len(turns) :] + turns[: round_ % len(turns)]:
            seconds[round_, column] = timed(loop.step, device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return dict(zip(loops, seconds.T.tolist(), strict=True))


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds for one step, from when all ranks are ready until the device is done."""
    dist.barrier()
    torch.get_device_module(device).synchronize()
    started = time.perf_counter()
    step()
    torch.get_device_module(device).synchronize()
    return time.perf_counter() - started


def ratio_of(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Quartiles of the rounds' ratios."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def quartiles(values: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    lines = [
        *heading(
            f"The recipe's training step versus plain PyTorch: {settings['model']}, {settings['image_size']} px, "
            f"micro-batch {settings['micro_batch']}, {settings['precision']}",
            report,
        ),
        "| ranks | accumulation | rounds | loop | step, ms: median (quartiles) | recipe ÷ loop: median (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        for name, times in result["step_ms"].items():
            ratio = result["recipe_ratio"].get(name)
            lines.append(
                f"| {result['world_size']} | {result['accumulation']} | {result['rounds']} | {name} "
                f"| {shown(times, '.1f')} | {shown(ratio, '.3f') if ratio else ''} |"
            )
    lines += [
        "",
        "The loops are interleaved step by step; a ratio is the median of the rounds' ratios. recipe: its own "
        "loop on DeepSpeed's engine; plain: PyTorch, with one all-reduce of the gradients on several ranks; ddp: "
        "DistributedDataParallel; timm: plain, with torch.nn.BatchNorm2d. All but timm use the recipe's batch norm.",
    ]
    return "\n".join(lines) + "\n"


def shown(quartiles: dict[str, float], form: str) -> str:
    return f"{quartiles['median']:{form}} ({quartiles['lower_quartile']:{form}}–{quartiles['upper_quartile']:{form}})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
