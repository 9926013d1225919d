"""The cost of a checkpoint: how long training pauses for it, and its share of an epoch.

A recipe engine trains steps on synthetic images and writes checkpoints to ``--folder`` with
``recipe.checkpoints.checkpoint.save``: DeepSpeed's file and the manifest with its SHA-256, synced to disk (fsync) and
renamed. The share is of an epoch of 1,281,167 images, at the training speed measured on this machine and at the speeds
assumed with ``--images-per-second``, such as that of a GPU node.

    python -m benchmarks.checkpoint_cost --folder runs --json benchmarks/results/checkpoint_cost_cpu.json
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engine_overhead import CLASSES, DTYPES, TIMEOUT, recipe_engine, synthetic_batches
from benchmarks.report import context, heading, made_folder, new_parser, positive, publish
from recipe.model import build_model
from recipe.train import set_up_torch

IMAGES_PER_EPOCH = 1_281_167


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write it and the JSON."""
    before = context("benchmarks.checkpoint_cost", words)
    arguments = parse_arguments(words)
    set_up_torch()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measured = measure(arguments, Path(folder))
    report = before | {
        "settings": {key: getattr(arguments, key) for key in ("model", "image_size", "batch", "precision")},
        "results": measured | {"share_of_an_epoch": shares(arguments, measured)},
    }
    publish(report, format_report(report), arguments.json)
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("benchmarks.checkpoint_cost", __doc__)
    parser.add_argument("--model", default="resnet50", help="timm model name (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=224, help="pixels per side (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="images per step (default: %(default)s)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    parser.add_argument("--saves", type=positive, default=7, help="checkpoints to write (default: %(default)s)")
    parser.add_argument(
        "--images-per-second",
        type=float,
        nargs="+",
        default=[2_500, 20_000, 32_000],
        help="speeds to assume (default: 2500 20000 32000)",
    )
    parser.add_argument("--folder", type=made_folder, help="folder for temporary checkpoints (default: the system's)")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds for a training step and for saving, checking and loading a checkpoint: median and maximum."""
    from recipe.checkpoints import checkpoint, manifest
    from recipe.engine import join_process_group, set_log_level, train_epoch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_log_level(verbose=False)
    join_process_group(device, TIMEOUT)
    model = build_model(arguments.model, CLASSES, seed=0, statistics="local").to(device)
    engine = recipe_engine(model, arguments.batch, 1, arguments.precision)
    batches = synthetic_batches(arguments.batch, arguments.image_size, arguments.precision, 1, device)
    seconds: dict[str, list[float]] = {"step": [], "save": [], "check": [], "load": []}

    def timed(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        torch.get_device_module(device).synchronize()
        started = time.perf_counter()
        result = call(*args, **kwargs)
        torch.get_device_module(device).synchronize()
        seconds[name].append(time.perf_counter() - started)
        return result

    steps = train_epoch(engine, cycle(batches))
    next(steps)  # allocates memory
    for _ in range(arguments.saves):
        timed("step", next, steps)
        timed("save", checkpoint.save, engine, folder, top1=None, client_state={}, plan="{}", training_sha256="")
        newest = manifest.find(folder)[0]
        if timed("check", manifest.damage, newest) is not None:
            raise RuntimeError(f"{newest.path} is damaged")
        timed("load", checkpoint.load_newest, engine, [newest])
        manifest.prune(folder, keep_last=1, keep_best=False)
    size = sum(file.size for file in newest.files.values())
    dist.destroy_process_group()
    return {
        "checkpoint_bytes": size,
        "seconds": {name: {"median": median(times), "longest": max(times)} for name, times in seconds.items()},
        "images_per_second": arguments.batch / median(seconds["step"]),
    }


def shares(arguments: argparse.Namespace, measured: dict[str, Any]) -> dict[str, float]:
    """The share of an epoch that one checkpoint takes, for each speed in images per second."""
    speeds = [measured["images_per_second"], *arguments.images_per_second]
    save = measured["seconds"]["save"]["median"]
    return {f"{speed:.0f}": save / (IMAGES_PER_EPOCH / speed + save) for speed in speeds}


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, results = report["settings"], report["results"]
    measured, *assumed = results["share_of_an_epoch"].items()
    lines = [
        *heading(
            f"A checkpoint of {settings['model']}, {settings['precision']}: "
            f"{results['checkpoint_bytes'] / 2**20:.0f} MiB",
            report,
        ),
        "| | median, s | longest, s |",
        "|---|---|---|",
    ]
    meanings = {
        "save": "save, until synced to disk and renamed",
        "check": "verify all SHA-256 sums, as a resumed run does",
        "load": "verify and load",
    }
    for name, meaning in meanings.items():
        times = results["seconds"][name]
        lines.append(f"| {meaning} | {times['median']:.2f} | {times['longest']:.2f} |")
    lines += [
        "",
        "| images per second | ImageNet epoch | share of one checkpoint |",
        "|---|---|---|",
        *(
            f"| {float(speed):,.0f}, {origin} | {_duration(IMAGES_PER_EPOCH / float(speed))} | {share:.3%} |"
            for origin, (speed, share) in [("measured here", measured), *(("assumed", row) for row in assumed)]
        ),
        "",
        "Shares are for one checkpoint per epoch. The assumed speeds are not measured: one H100, eight H100s, and the "
        "256 P100s of the paper's one-hour run. At ZeRO stage 0, rank 0 writes while the other ranks wait.",
    ]
    return "\n".join(lines) + "\n"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
