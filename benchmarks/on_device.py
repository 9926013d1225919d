"""The cost of loading a small data set during training: held on the device or read from a folder, versus no loading.

Three loops train one model, in turn: repeatedly on one batch, on batches of the data set held on the device, and on
batches that worker processes read from the folder. The first measures the model alone; the extra time of the other two
is the cost of their data. Both must see the same images.

    python -m benchmarks.on_device --data cifar10 --json benchmarks/results/on_device_cpu.json

``--data`` is an ImageFolder with train/ and val/ (or test/) of the config's classes; without it, JPEGs of 32 × 32
pixels are generated. With ``--device cuda`` the defaults suit a GPU.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.loading import one_rank_loader
from benchmarks.report import add_device, context, heading, new_parser, parse_device, positive, publish, say
from recipe.config import read_config
from recipe.data import Batch, HeldImages, list_imagefolder, open_datasets
from recipe.model import build_model, cast_parameters
from recipe.plan import make_plan

ALONE, HELD, FOLDER = "one batch again and again", "held on the device", "read from the folder"


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write it and the JSON."""
    before = context("benchmarks.on_device", words, ("torch", "timm", "simplejpeg"))
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory() as temporary:
        data = arguments.data
        if data is None:
            data = Path(temporary)
            make_images(data, arguments.micro_batch * arguments.batches)
        results = measure(arguments, data)
    settings = {
        name: str(getattr(arguments, name)) for name in ("config", "device", "micro_batch", "batches", "workers")
    }
    report = before | {"settings": settings | {"made_up": arguments.data is None}, "results": results}
    publish(report, format_report(report), arguments.json)
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exit if the measurement is impossible. The defaults depend on the device."""
    parser = new_parser("benchmarks.on_device", __doc__)
    cores = len(os.sched_getaffinity(0))
    on_gpu = parse_device(parser.prog, words).type == "cuda"
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("ds_configs/cifar10_b1024.json"),
        help="config with the model and crops (default: %(default)s)",
    )
    parser.add_argument("--data", type=Path, help="folder with train/ and val/ (default: generated images)")
    add_device(parser, "device of the model")
    parser.add_argument(
        "--micro-batch", type=positive, default=256 if on_gpu else 64, help="images per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=positive, default=64 if on_gpu else 8, help="batches per round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of interleaved loops (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=positive,
        default=max(1, cores - 1) if on_gpu else 1,
        help="processes per loader (default: %(default)s)",
    )
    arguments = parser.parse_args(words)
    images = arguments.micro_batch * arguments.batches
    try:
        model = read_config(arguments.config).recipe.model
        if arguments.data is not None:
            training, _ = list_imagefolder(arguments.data)
            if len(training) < images:
                raise ValueError(
                    f"{len(training)} training images in {arguments.data}; --batches {arguments.batches} of "
                    f"--micro-batch {arguments.micro_batch} need {images}"
                )
            if len(training.classes) > model.num_classes:
                raise ValueError(
                    f"{len(training.classes)} classes in {arguments.data}, {model.num_classes} in {arguments.config}"
                )
    except ValueError as error:
        parser.error(str(error))
    return arguments


def make_images(folder: Path, count: int) -> None:
    """Write CIFAR-sized noise: ``count`` JPEGs for training, in two classes, and two for validation."""
    rng = np.random.default_rng(0)
    for part, images in (("train", count), ("val", 2)):
        for number in range(images):
            path = folder / part / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def measure(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Seconds to load the data set onto the device; images per second and time relative to no data of each loop."""
    plan = make_plan(read_config(arguments.config), world_size=1)
    config = plan.config.recipe
    device: torch.device = arguments.device
    size, crop, flip = plan.image_sizes, config.data.crop, config.data.flip
    folder, _ = open_datasets("imagefolder", data, image_size=size, crop=crop, flip=flip, seed=config.seed)
    say(f"decoding {len(folder):,} images")
    started = time.perf_counter()
    held = HeldImages(folder, device, training=True)
    seconds_to_hold = time.perf_counter() - started

    dtype = torch.float32 if device.type == "cpu" else torch.float16
    loaders = {
        name: one_rank_loader(data_set, arguments.micro_batch, device=device, dtype=dtype, workers=arguments.workers)
        for name, data_set in {HELD: held, FOLDER: folder}.items()
    }
    firsts = [next(one.epoch(0)) for one in loaders.values()]
    same = all(torch.equal(firsts[0].images, first.images) for first in firsts)
    sources: dict[str, Callable[[int], Iterator[Batch]]] = {ALONE: lambda epoch: repeat(firsts[0])}
    sources |= {name: one.epoch for name, one in loaders.items()}

    model = build_model(config.model.name, config.model.num_classes, config.seed, "local", config.model.zero_init_last)
    model = model.to(device).to(memory_format=torch.channels_last)
    cast_parameters(model, dtype)  # running averages stay in fp32, as in training
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for epoch in range(arguments.rounds + 1):
        say(f"round {epoch} of {arguments.rounds}" if epoch else "warming up")
        for name, source in sources.items():
            taken = timed(model, islice(source(epoch), arguments.batches), device)
            if epoch:  # the first round starts the workers and warms up
                seconds[name].append(taken)
    for one in loaders.values():
        one.close()
    images = arguments.micro_batch * arguments.batches
    return {
        "images": len(folder),
        "image_size": size[0][1],
        "same_images": same,
        "seconds_to_hold": round(seconds_to_hold, 2),
        "images_per_second": {name: images / median(of_rounds) for name, of_rounds in seconds.items()},
        "ratio": {
            name: median(a / b for a, b in zip(of_rounds, seconds[ALONE], strict=True))
            for name, of_rounds in seconds.items()
        },
    }


def timed(model: nn.Module, batches: Iterator[Batch], device: torch.device) -> float:
    """Seconds for forward and backward passes over all batches, including data loading."""
    started = time.perf_counter()
    for batch in batches:
        F.cross_entropy(model(batch.images).float(), batch.labels).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, results = report["settings"], report["results"]
    lines = [
        *heading("A small data set on the device", report),
        f"{results['images']:,} {'generated ' if settings['made_up'] else ''}images, {settings['config']} at "
        f"{results['image_size']} px; forward and backward passes on {settings['device']}, micro-batch "
        f"{settings['micro_batch']}, loader workers: {settings['workers']}. Decoding all "
        f"images onto the device took {results['seconds_to_hold']} s, once. "
        + ("Both loaders gave the same images." if results["same_images"] else "**The loaders' images differ.**"),
        "",
        "| data | images/s | time ÷ time without data |",
        "|---|---|---|",
        *(
            f"| {name} | {speed:,.0f} | {results['ratio'][name]:.3f} |"
            for name, speed in results["images_per_second"].items()
        ),
        "",
        "Images/s is the median over the rounds; the last column is the median of the rounds' ratios.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
