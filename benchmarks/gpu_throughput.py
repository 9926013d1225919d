"""Training throughput on one GPU: the recipe versus a bare PyTorch loop and the training steps of timm and torchvision.

All train the same timm model from the same weights on the same synthetic batch, with the same optimizer and precision:

- bare: a PyTorch loop with channels_last, autocast, fused SGD and cuDNN autotuning, eager and compiled;
- timm: the step of its ``train.py --channels-last --amp``, with its optimizer and its ``NativeScaler``;
- torchvision: the step of its ``references/classification/train.py --amp``, which reads loss and accuracy every time;
- recipe: ``recipe.engine.train_epoch`` on DeepSpeed's engine as configured by default, with
  ``recipe.cudnn_benchmark``, with ``recipe.compile``, and with both;
- jpegs, with ``--images``: the last of the recipe's loops, on training crops of JPEGs that worker processes read and
  decode at the same time; jpegs_by_gpu: the same, decoded by nvJPEG;
- pack, with ``--pack``: the same loop on training crops from a pack that ``recipe pack`` made.

For each micro-batch size the loops are built, and compiled, once, and then take turns. A waiting loop keeps its
weights, momentum and images, a few hundred MiB for ResNet-50, and releases the memory of its steps; a loop's memory is
measured without that of the others. The updates of the first steps are compared, except on images: they must agree up
to rounding. A loop that raises or trains differently appears in the table with the reason, and the exit code is 1.
Table and JSON are written after each micro-batch size.

    python -m recipe pack /data/imagenet /data/pack --short-side 256 --raw
    python -m benchmarks.gpu_throughput --images /data/imagenet/train --pack /data/pack --json results.json

Without a GPU the defaults are small and only check that the program runs.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
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
from benchmarks.loading import Repeated, one_rank_loader
from benchmarks.report import at_least, context, heading, new_parser, positive, say, write
from recipe.data import (
    PREFETCHED,
    Batch,
    EncodedImages,
    ImageFiles,
    Samples,
    index_folder,
    open_decoder,
    open_pack,
    read_header,
)
from recipe.engine import choose_kernels
from recipe.model import build_model, parameter_groups
from recipe.train import set_up_torch

WARM_UP_STEPS = 5
TURN_STEPS = 2  # untimed steps at the start of a turn, which allocate the memory that the previous loop released
READ_AHEAD = 2  # batches per worker, torch's default
STREAM_BATCHES = 10_000  # per epoch on images, at whose end the workers would be idle
RECIPE, JPEGS, JPEGS_BY_GPU, PACK = "recipe", "jpegs", "jpegs_by_gpu", "pack"
FED = (JPEGS, JPEGS_BY_GPU, PACK)  # loops that train on images from files
NOT_ON_GPU = "not run on GPU"
DOES_NOT_FIT = "does not fit"
LONGEST_IN_TABLE = 200  # characters of a reason; the JSON has all of them
# NVIDIA's data sheets, without sparsity, in 10^12 operations per second; fp32 means TF32.
PEAK_TFLOPS = {
    "A100": {"fp16": 312.0, "bf16": 312.0, "fp32": 156.0},
    "H100 80GB HBM3": {"fp16": 989.4, "bf16": 989.4, "fp32": 494.7},
    "H200": {"fp16": 989.4, "bf16": 989.4, "fp32": 494.7},
}


class Contender(NamedTuple):
    """A loop to measure: ``make`` builds it from a model, batches and a precision."""

    make: Callable[[nn.Module, list[Batch], str], Loop]
    cudnn_benchmark: bool
    recipes_model: bool = False
    waiting_batches: int = 0  # prepared by the loader during other loops' turns, and therefore not timed


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write both; return 1 if a loop failed, 130 after Ctrl-C."""
    arguments, where = parse_arguments(words), context("benchmarks.gpu_throughput", words)
    set_up_torch()
    from recipe.engine import join_process_group, set_log_level

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        say("There is no GPU: this only checks that the program runs; the numbers mean nothing for one.")
    set_log_level(verbose=False)
    join_process_group(device, TIMEOUT)
    flops = flops_an_image(arguments.model, arguments.image_size)
    peak = arguments.peak_tflops or peak_tflops(where["hardware"].get("gpu", ""), arguments.precision)
    keys = ("model", "image_size", "precision", "steps", "rounds", "fed_from", "workers")
    report = where | {
        "settings": {key: getattr(arguments, key) for key in keys},
        "flops_an_image": flops,
        "peak_tflops": peak,
        "results": [],
    }
    code = 0
    try:
        for micro_batch in arguments.micro_batch:
            report["results"] += measure(arguments, micro_batch, device, flops, peak)
            torch.compiler.reset()
            report["goals"] = goals(report["results"]) if device.type == "cuda" else NOT_ON_GPU
            if arguments.json is not None:
                write(arguments.json, report, format_report(report))
    except KeyboardInterrupt:
        say(f"interrupted at micro-batch {micro_batch}, whose results are discarded")
        code = 130
    dist.destroy_process_group()
    if report["results"]:
        print(format_report(report), end="")
    return code or int(failed(report["results"]))


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; the defaults depend on whether there is a GPU."""
    gpu = torch.cuda.is_available()
    size = 256 if gpu else 8
    parser = new_parser("benchmarks.gpu_throughput", __doc__)
    parser.add_argument(
        "--model", default="resnet50" if gpu else "test_resnet", help="timm model name (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=positive, default=224 if gpu else 32, help="pixels per side (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch",
        type=positive,
        nargs="+",
        default=[size],
        help=f"one measurement each (default: {size})",
    )
    parser.add_argument(
        "--steps", type=positive, default=30 if gpu else 3, help="timed steps per round (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least(2), default=3 if gpu else 2, help="rounds of interleaved loops (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=list(DTYPES),
        default="fp16" if gpu else "fp32",
        help="training precision (default: %(default)s)",
    )
    parser.add_argument(
        "--loops",
        nargs="+",
        choices=list(CONTENDERS),
        default=list(CONTENDERS),
        help="loops to run; their updates are compared with the first one's (default: all)",
    )
    parser.add_argument(
        "--images", type=Path, help="folder with one folder of JPEGs per class, to measure the recipe on as well"
    )
    parser.add_argument("--pack", type=Path, help="pack of images, to measure the recipe on as well")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        type=positive,
        default=max(1, cores - 1),
        help="processes that read images (default: cores minus one, %(default)s)",
    )
    parser.add_argument("--peak-tflops", type=float, help="the GPU's peak in this precision, if not built in")
    arguments = parser.parse_args(words)
    if not timm.is_model(arguments.model):
        parser.error(f"--model {arguments.model}: timm has no model of this name")
    if arguments.precision == "fp16" and not gpu:
        parser.error("--precision fp16 needs a GPU")
    arguments.fed_from = {}
    if arguments.images is not None:
        try:
            arguments.fed_from["--images"] = len(index_folder(str(arguments.images)))
        except (OSError, ValueError) as error:
            parser.error(f"--images {arguments.images}: {error}; expected a folder with one folder of images per class")
    if arguments.pack is not None:
        try:
            arguments.fed_from["--pack"] = read_header(arguments.pack).train.images
        except ValueError as error:
            parser.error(str(error))
    for option in arguments.fed_from:
        if not any(name.startswith(RECIPE) for name in arguments.loops):
            parser.error(f"{option}: the recipe trains on them, and --loops has none of its loops")
    return arguments


def measure(
    arguments: argparse.Namespace, micro_batch: int, device: torch.device, flops: float, peak: float | None
) -> list[dict[str, Any]]:
    """Time the loops with ``micro_batch`` images; a loop that does not fit, or fails, has a reason and no numbers."""
    contenders = {name: CONTENDERS[name] for name in arguments.loops}
    for kind, samples in images_to_train_on(arguments, device).items():
        last = [name for name in arguments.loops if name.startswith(RECIPE)][-1]
        contenders[last.replace(RECIPE, kind)] = fed(CONTENDERS[last], samples, arguments.workers, micro_batch, device)
    loops: dict[str, Loop] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, int] = {}
    problems: dict[str, str] = {}
    reference: tuple[Tensor, str] | None = None

    def set_up(name: str) -> None:
        nonlocal reference
        loops[name], update, memory[name] = make_loop(contenders[name], arguments, micro_batch, device)
        reference = reference or (update, name)
        if not name.startswith(FED):
            check_update(name, update, reference[0], arguments.precision, than=reference[1])

    def time_round(name: str) -> None:
        untimed = TURN_STEPS + contenders[name].waiting_batches
        seconds[name].append(time_steps(loops[name], untimed, arguments.steps, device))
        say(f"  {micro_batch * arguments.steps / seconds[name][-1]:,.1f} images/s")

    def attempt(turn: Callable[[str], None], name: str, what: str) -> None:
        say(f"micro-batch {micro_batch}, {what}: {name}")
        try:
            release(device)
            choose_kernels(tf32=True, cudnn_benchmark=contenders[name].cudnn_benchmark)
            turn(name)
        except torch.OutOfMemoryError:
            problems[name] = DOES_NOT_FIT
        except Exception as error:  # from a compiler, cuDNN or DeepSpeed: the other loops continue
            problems[name] = f"{type(error).__name__}: {error}"
        if name in problems:
            loops.pop(name, None)
            say(f"  {problems[name]}")

    for name in seconds:
        attempt(set_up, name, "set up")
    for round_ in range(arguments.rounds):
        for name in list(loops)[:: 1 if round_ % 2 == 0 else -1]:
            attempt(time_round, name, f"round {round_ + 1} of {arguments.rounds}")
    results = []
    for name in seconds:
        result: dict[str, Any] = {"micro_batch": micro_batch, "loop": name, "images_per_second": None}
        if name in problems:
            result["problem"] = problems[name]
        else:
            speed = quartiles([micro_batch * arguments.steps / value for value in seconds[name]])
            result["images_per_second"] = speed
            result["peak_memory_bytes"] = memory[name] if device.type == "cuda" else None
            result["share_of_peak"] = None if peak is None else flops * speed["median"] / (peak * 1e12)
        results.append(result)
    return results


def make_loop(
    contender: Contender, arguments: argparse.Namespace, micro_batch: int, device: torch.device
) -> tuple[Loop, Tensor, int]:
    """A warmed-up loop, the update of its first step, and its own peak memory in bytes."""
    others = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()
    model = build_model(arguments.model, CLASSES, seed=0, statistics="global")
    if not contender.recipes_model:
        as_timm_makes_it = timm.create_model(arguments.model, num_classes=CLASSES)
        as_timm_makes_it.load_state_dict(model.state_dict())
        model = as_timm_makes_it
    batches = synthetic_batches(micro_batch, arguments.image_size, arguments.precision, 1, device)
    loop = contender.make(model.to(device).train(), batches, arguments.precision)
    start = loop.weights().cpu()
    loop.step()
    update = loop.weights().cpu() - start
    for _ in range(WARM_UP_STEPS):
        loop.step()
    torch.get_device_module(device).synchronize()
    return loop, update, torch.cuda.max_memory_allocated() - others if device.type == "cuda" else 0


def images_to_train_on(arguments: argparse.Namespace, device: torch.device) -> dict[str, Samples]:
    """The data sets that the command line names, by kind of loop."""
    settings: dict[str, Any] = {"image_size": arguments.image_size, "crop": "random_resized", "flip": True, "seed": 0}
    settings["on_bad_image"] = "skip"
    found: dict[str, Samples] = {}
    if arguments.images is not None:
        files = ImageFiles(index_folder(str(arguments.images)), **settings)
        found[JPEGS] = files
        if device.type == "cuda":
            decoder = open_decoder("gpu", device, threads=arguments.workers)
            found[JPEGS_BY_GPU] = EncodedImages(files, decoder, device)
    if arguments.pack is not None:
        found[PACK] = open_pack(arguments.pack, **settings)[0]
    return found


def fed(contender: Contender, samples: Samples, workers: int, micro_batch: int, device: torch.device) -> Contender:
    """The same recipe loop on images; the labels are their classes."""

    def make(model: nn.Module, batches: list[Batch], precision: str) -> Loop:
        repeated, dtype = Repeated(samples, STREAM_BATCHES * micro_batch), batches[0].images.dtype
        loader = one_rank_loader(repeated, micro_batch, device=device, dtype=dtype, workers=workers)
        # mypy does not know that the recipe's loops accept a stream.
        return contender.make(model, batches, precision, stream=chain.from_iterable(map(loader.epoch, count())))  # type: ignore[call-arg]

    return contender._replace(make=make, waiting_batches=READ_AHEAD * workers + PREFETCHED)


def time_steps(loop: Loop, untimed: int, steps: int, device: torch.device) -> float:
    """Seconds for ``steps`` steps, after ``untimed`` steps that do not count."""
    for _ in range(untimed):
        loop.step()
    torch.get_device_module(device).synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        loop.step()
    torch.get_device_module(device).synchronize()
    return time.perf_counter() - started


def bare_loop(model: nn.Module, batches: list[Batch], precision: str, compiled: bool = False) -> Loop:
    """A hand-written PyTorch loop for one GPU."""
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
    "bare+compile": Contender(partial(bare_loop, compiled=True), cudnn_benchmark=True),
    "timm": Contender(timm_loop, cudnn_benchmark=True),
    "torchvision": Contender(torchvision_loop, cudnn_benchmark=True),
    "recipe": Contender(recipe_loop, cudnn_benchmark=False, recipes_model=True),
    "recipe+cudnn_benchmark": Contender(recipe_loop, cudnn_benchmark=True, recipes_model=True),
    "recipe+compile": Contender(partial(recipe_loop, compiled=True), cudnn_benchmark=False, recipes_model=True),
    "recipe+compile+cudnn_benchmark": Contender(
        partial(recipe_loop, compiled=True), cudnn_benchmark=True, recipes_model=True
    ),
}


def flops_an_image(model_name: str, image_size: int) -> float:
    """FLOPs of a forward and backward pass per image, as torch counts them: a multiply-add is two."""
    model = timm.create_model(model_name, num_classes=CLASSES).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size)).sum().backward()
    return float(counter.get_total_flops())


def peak_tflops(gpu: str, precision: str) -> float | None:
    """The peak in the GPU's data sheet; None if the GPU is not in the table."""
    return next((peaks[precision] for name, peaks in PEAK_TFLOPS.items() if name in gpu), None)


def goals(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each micro-batch, the recipe's best speed over that of each other kind of loop, without failed loops."""
    ratios: dict[str, dict[str, float]] = {}
    for micro_batch in dict.fromkeys(result["micro_batch"] for result in results):
        best: dict[str, float] = {}
        for result in results:
            if result["micro_batch"] == micro_batch and result["images_per_second"] is not None:
                kind = result["loop"].partition("+")[0]
                best[kind] = max(best.get(kind, 0.0), result["images_per_second"]["median"])
        if RECIPE in best:
            ratios[str(micro_batch)] = {
                f"{kind} ÷ recipe" if kind in FED else f"recipe ÷ {kind}": (
                    speed / best[RECIPE] if kind in FED else best[RECIPE] / speed
                )
                for kind, speed in best.items()
                if kind != RECIPE
            }
    return ratios


def failed(results: list[dict[str, Any]]) -> bool:
    """Whether a loop raised or trained differently from the first; running out of memory does not count."""
    return any(result.get("problem", DOES_NOT_FIT) != DOES_NOT_FIT for result in results)


def release(device: torch.device) -> None:
    """Release the memory of a loop's steps, so that the next loop can use all of it."""
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
        "| micro-batch | loop | images/s: median (quartiles) | memory, GiB | share of peak |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        speed = result["images_per_second"]
        if speed is None:
            problem = " ".join(result["problem"].split()).replace("|", "\\|")
            lines.append(f"| {result['micro_batch']} | {result['loop']} | {problem[:LONGEST_IN_TABLE]} | | |")
            continue
        memory, share = result["peak_memory_bytes"], result["share_of_peak"]
        lines.append(
            f"| {result['micro_batch']} | {result['loop']} | {shown(speed, ',.1f')} "
            f"| {'–' if memory is None else f'{memory / 2**30:.2f}'} | {'–' if share is None else f'{share:.1%}'} |"
        )
    lines += [
        "",
        f"{settings['rounds']} rounds of {settings['steps']} steps. Goals: the recipe's best loop ÷ the best bare loop "
        "at least 0.98, ÷ timm's and torchvision's above 1; from JPEGs ÷ synthetic images at least 0.6, from a pack of "
        "raw pixels at least 0.95.",
    ]
    # The committed results are older than this setting.
    if fed_from := ", ".join(f"{count:,} ({option})" for option, count in settings.get("fed_from", {}).items()):
        lines += ["", f"Images on disk: {fed_from}, read again and again by {settings['workers']} processes.", ""]
    if on_gpu:
        for micro_batch, ratios in report["goals"].items():
            lines.append(f"- {micro_batch}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    else:
        lines.append(f"The goals are for a GPU: {NOT_ON_GPU}. These numbers only show that the program runs.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
