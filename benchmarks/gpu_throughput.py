"""How fast one GPU trains: the recipe beside a bare PyTorch loop, timm's training step and torchvision's.

All train timm's model from the same weights on the same synthetic batch, with the same optimizer in the same precision:

- bare: PyTorch's loop with channels_last, autocast, fused SGD and cuDNN's autotuning, as it is and compiled;
- timm: what its ``train.py --channels-last --amp`` does in a step, with its optimizer and its ``NativeScaler``;
- torchvision: what its ``references/classification/train.py --amp`` does, which asks for loss and accuracy each time;
- recipe: ``recipe.loop.train_epoch`` on DeepSpeed's engine as the configs have it, with ``recipe.cudnn_benchmark``, and
  with ``recipe.compile`` too.

They run one after the other, each anew in every round, so that each has the memory for itself. The updates of their
first steps are compared: they must train the same, up to rounding.

    python -m benchmarks.gpu_throughput --json benchmarks/results/gpu_throughput.json
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler, accuracy
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine_overhead import (
    CLASSES,
    DTYPES,
    LOSS_SCALE_POWER,
    MOMENTUM,
    RATE,
    TIMEOUT,
    WEIGHT_DECAY,
    Loop,
    check_update,
    quartiles,
    recipe_loop,
    shown,
    synthetic_batches,
)
from benchmarks.report import add_json, context, heading, positive, write
from recipe.data import Batch
from recipe.kernels import choose_kernels
from recipe.model import build_model, parameter_groups
from recipe.train import set_up_torch

WARM_UP_STEPS = 5
NOT_ON_GPU = "not run on GPU"
# NVIDIA's data sheets, without sparsity, in 10^12 operations a second; fp32 is TF32's.
PEAK_TFLOPS = {
    "A100": {"fp16": 312.0, "bf16": 312.0, "fp32": 156.0},
    "H100 80GB HBM3": {"fp16": 989.4, "bf16": 989.4, "fp32": 494.7},
    "H200": {"fp16": 989.4, "bf16": 989.4, "fp32": 494.7},
}


class Contender(NamedTuple):
    """A loop by name: ``make`` gives it on a model and batches; what it is allowed besides."""

    make: Callable[[nn.Module, list[Batch], str], Loop]
    cudnn_benchmark: bool
    recipes_model: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; print a table, and write it and a JSON if asked to."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, where = parse_arguments(words), context("benchmarks.gpu_throughput", words)
    set_up_torch()
    from recipe.engine import join_process_group, set_loudness

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    set_loudness(verbose=False)
    join_process_group(device, TIMEOUT)
    flops = flops_an_image(arguments.model, arguments.image_size)
    peak = arguments.peak_tflops or peak_tflops(where["hardware"].get("gpu", ""), arguments.precision)
    results = [
        result
        for micro_batch in arguments.micro_batch
        for result in measure(arguments, micro_batch, device, flops, peak)
    ]
    dist.destroy_process_group()
    report = where | {
        "settings": {key: getattr(arguments, key) for key in ("model", "image_size", "precision", "steps", "rounds")},
        "flops_an_image": flops,
        "peak_tflops": peak,
        "results": results,
        "goals": goals(results) if device.type == "cuda" else NOT_ON_GPU,
    }
    table = format_report(report)
    print(table, end="")
    if arguments.json is not None:
        write(arguments.json, report, table)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; the defaults are a GPU's where there is one."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_throughput", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="timm's name (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--micro-batch", type=positive, nargs="+", default=[64, 128, 256, 512], help="one table each")
    parser.add_argument("--steps", type=positive, default=30, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp16" if gpu else "fp32")
    parser.add_argument("--loops", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in this precision, where it is not known here")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: a spread needs at least 2")
    if arguments.precision == "fp16" and not gpu:
        parser.error("--precision fp16 needs a GPU")
    return arguments


def measure(
    arguments: argparse.Namespace, micro_batch: int, device: torch.device, flops: float, peak: float | None
) -> list[dict[str, Any]]:
    """Time the loops with batches of ``micro_batch``; one that does not fit has no numbers."""
    seconds: dict[str, list[float]] = {name: [] for name in arguments.loops}
    memory: dict[str, int] = {}
    too_large = set()
    reference: Tensor | None = None
    for round_ in range(arguments.rounds):
        for name in arguments.loops[:: 1 if round_ % 2 == 0 else -1]:
            if name in too_large:
                continue
            try:
                update, elapsed, memory[name] = run_loop(CONTENDERS[name], arguments, micro_batch, device)
            except torch.OutOfMemoryError:
                too_large.add(name)
                continue
            finally:
                release(device)
            reference = update if reference is None else reference
            check_update(name, update, reference, arguments.precision)
            seconds[name].append(elapsed)
    results = []
    for name in arguments.loops:
        result: dict[str, Any] = {"micro_batch": micro_batch, "loop": name, "images_per_second": None}
        if name not in too_large:
            speed = quartiles([micro_batch * arguments.steps / value for value in seconds[name]])
            result["images_per_second"] = speed
            result["peak_memory_bytes"] = memory[name] if device.type == "cuda" else None
            result["share_of_peak"] = None if peak is None else flops * speed["median"] / (peak * 1e12)
        results.append(result)
    return results


def run_loop(
    contender: Contender, arguments: argparse.Namespace, micro_batch: int, device: torch.device
) -> tuple[Tensor, float, int]:
    """The update of the first step, the seconds of all timed steps, and the most memory in bytes that they took."""
    choose_kernels(tf32=True, cudnn_benchmark=contender.cudnn_benchmark)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build_model(arguments.model, CLASSES, seed=0, statistics="global")
    if not contender.recipes_model:
        as_timm_makes_it = timm.create_model(arguments.model, num_classes=CLASSES)
        as_timm_makes_it.load_state_dict(model.state_dict())
        model = as_timm_makes_it
    sizes = argparse.Namespace(micro_batch=micro_batch, image_size=arguments.image_size, precision=arguments.precision)
    batches = synthetic_batches(sizes, 1, device)
    loop = contender.make(model.to(device).train(), batches, arguments.precision)
    start = loop.weights().cpu()
    loop.step()
    update = loop.weights().cpu() - start
    for _ in range(WARM_UP_STEPS):
        loop.step()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(arguments.steps):
        loop.step()
    synchronize(device)
    elapsed = time.perf_counter() - started
    return update, elapsed, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def bare_loop(model: nn.Module, batches: list[Batch], precision: str, compiled: bool = False) -> Loop:
    """What a person would write by hand for one GPU."""
    model = model.to(memory_format=torch.channels_last)
    (batch,), device = batches, batches[0].images.device.type
    images = batch.images.contiguous(memory_format=torch.channels_last)
    optimizer = SGD(
        parameter_groups(model, WEIGHT_DECAY), lr=RATE, momentum=MOMENTUM, nesterov=True, fused=device == "cuda"
    )
    scaler = torch.amp.GradScaler(device, init_scale=2.0**LOSS_SCALE_POWER, enabled=precision == "fp16")

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            return F.cross_entropy(model(images), labels)

    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step() -> None:
        scaler.scale(loss_of(images, batch.labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Loop(step, optimizer)


def timm_loop(model: nn.Module, batches: list[Batch], precision: str) -> Loop:
    """``train_one_epoch`` of timm's train.py, without its logging."""
    model = model.to(memory_format=torch.channels_last)
    (batch,), device = batches, batches[0].images.device.type
    images = batch.images.contiguous(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(parameter_groups(model, WEIGHT_DECAY), opt="sgd", lr=RATE, momentum=MOMENTUM)
    loss_scaler = NativeScaler(device=device) if precision == "fp16" else None
    loss_fn = nn.CrossEntropyLoss()

    def step() -> None:
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            loss = loss_fn(model(images), batch.labels)
        if loss_scaler is not None:
            loss_scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    return Loop(step, optimizer)


def torchvision_loop(model: nn.Module, batches: list[Batch], precision: str) -> Loop:
    """``train_one_epoch`` of torchvision's references/classification/train.py, without its printing."""
    (batch,), device = batches, batches[0].images.device.type
    images = batch.images.contiguous()
    optimizer = SGD(parameter_groups(model, WEIGHT_DECAY), lr=RATE, momentum=MOMENTUM, nesterov=True)
    scaler = torch.amp.GradScaler(device) if precision == "fp16" else None
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            output = model(images)
            loss = criterion(output, batch.labels)
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        for value in (loss.detach(), *accuracy(output, batch.labels, topk=(1, 5))):
            float(value)

    return Loop(step, optimizer)


CONTENDERS = {
    "bare": Contender(bare_loop, cudnn_benchmark=True),
    "bare, compiled": Contender(partial(bare_loop, compiled=True), cudnn_benchmark=True),
    "timm": Contender(timm_loop, cudnn_benchmark=True),
    "torchvision": Contender(torchvision_loop, cudnn_benchmark=True),
    "recipe": Contender(recipe_loop, cudnn_benchmark=False, recipes_model=True),
    "recipe, cudnn_benchmark": Contender(recipe_loop, cudnn_benchmark=True, recipes_model=True),
    "recipe, cudnn_benchmark, compile": Contender(
        partial(recipe_loop, compiled=True), cudnn_benchmark=True, recipes_model=True
    ),
}


def flops_an_image(model_name: str, image_size: int) -> float:
    """Floating-point operations of a forward and backward pass, as torch counts them: a product and its sum are two."""
    model = timm.create_model(model_name, num_classes=CLASSES).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size)).sum().backward()
    return float(counter.get_total_flops())


def peak_tflops(gpu: str, precision: str) -> float | None:
    """What the GPU's data sheet says; None for one that is not known here."""
    return next((peaks[precision] for name, peaks in PEAK_TFLOPS.items() if name in gpu), None)


def goals(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By micro-batch, the best of the recipe's loops over the best of each other's; a loop that did not fit is none."""
    ratios: dict[str, dict[str, float]] = {}
    for micro_batch in dict.fromkeys(result["micro_batch"] for result in results):
        best: dict[str, float] = {}
        for result in results:
            if result["micro_batch"] == micro_batch and result["images_per_second"] is not None:
                kind = result["loop"].partition(",")[0]
                best[kind] = max(best.get(kind, 0.0), result["images_per_second"]["median"])
        if "recipe" in best:
            ratios[str(micro_batch)] = {
                f"recipe ÷ {kind}": best["recipe"] / speed for kind, speed in best.items() if kind != "recipe"
            }
    return ratios


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Give a loop's memory back: the next one is measured as if it were alone."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, on_gpu = report["settings"], report["goals"] != NOT_ON_GPU
    lines = [
        *heading(
            f"Training on one GPU: {settings['model']}, {settings['image_size']} px, {settings['precision']}"
            + ("" if on_gpu else f" – {NOT_ON_GPU}"),
            report,
        ),
        "| micro-batch | loop | images/s: median (quartiles) | memory, GiB | share of the peak |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        speed = result["images_per_second"]
        if speed is None:
            lines.append(f"| {result['micro_batch']} | {result['loop']} | does not fit | | |")
            continue
        memory, share = result["peak_memory_bytes"], result["share_of_peak"]
        lines.append(
            f"| {result['micro_batch']} | {result['loop']} | {shown(speed, ',.1f')} "
            f"| {'–' if memory is None else f'{memory / 2**30:.2f}'} | {'–' if share is None else f'{share:.1%}'} |"
        )
    lines += [
        "",
        f"{settings['rounds']} rounds of {settings['steps']} steps. Goals: the recipe's best loop over "
        "the best bare one at least 0.98, over timm's and torchvision's above 1.",
    ]
    if on_gpu:
        for micro_batch, ratios in report["goals"].items():
            lines.append(f"- {micro_batch}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    else:
        lines.append(f"The goals are for a GPU: {NOT_ON_GPU}. What stands here shows that the program runs.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
