"""The overhead of measuring the gradient noise scale in a training step.

Three recipe loops train the same model on the same batches, interleaved one optimizer step at a time: one that does not
measure, one that listens to the gradients without measuring, and one that measures at every step. A run that measures
every n-th step pays for listening, plus one n-th of the remaining cost. Before timing starts, all three must have
bit-identical weights.

    python -m benchmarks.noise_scale_cost --json benchmarks/results/noise_scale_cost_cpu.json
    torchrun --nproc-per-node 8 -m benchmarks.noise_scale_cost --model resnet50 --image-size 224 --precision fp16
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engine_overhead import (
    CLASSES,
    Loop,
    add_loop_options,
    quartiles,
    ratio_of,
    recipe_loop,
    run_rank,
    shown,
    synthetic_batches,
    take_turns,
    warm_up,
)
from benchmarks.report import context, heading, new_parser, publish
from recipe.config import NoiseScale
from recipe.model import build_model

EVERY_STEPS: int = NoiseScale.model_fields["every_steps"].default
LOOPS = {"does not measure": None, "listens": lambda: False, "measures": lambda: True}


def main(words: Sequence[str]) -> int:
    """Measure; on rank 0 print a table and, with ``--json``, write it and the JSON."""
    arguments, before = parse_arguments(words), context("benchmarks.noise_scale_cost", words)
    results = run_rank(arguments, measure)
    if os.environ.get("RANK", "0") != "0":
        return 0
    settings = {key: getattr(arguments, key) for key in ("model", "image_size", "micro_batch", "precision")}
    settings["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    report = before | {"settings": settings, "results": results}
    publish(report, format_report(report), arguments.json)
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("benchmarks.noise_scale_cost", __doc__)
    add_loop_options(parser, accumulation=[1, 8])
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, accumulation: int, device: torch.device) -> dict[str, Any]:
    """Compare the loops' steps.

    Raises:
        RuntimeError: Measuring changed the training.
    """
    batches = synthetic_batches(arguments.micro_batch, arguments.image_size, arguments.precision, accumulation, device)
    loops = {
        name: recipe_loop(
            build_model(arguments.model, CLASSES, seed=0, statistics="global").to(device),
            batches,
            arguments.precision,
            measured,
        )
        for name, measured in LOOPS.items()
    }
    warm_up(loops)
    check_same(loops)
    times = take_turns(loops, arguments.steps, device)
    ratios = {name: ratio_of(times[name], times["does not measure"]) for name in ("listens", "measures")}
    listens, measures = (ratios[name]["median"] for name in ("listens", "measures"))
    return {
        "accumulation": accumulation,
        "rounds": arguments.steps,
        "threads_a_rank": torch.get_num_threads(),
        "step_ms": {name: quartiles([1000 * value for value in values]) for name, values in times.items()},
        "ratio": ratios,
        "ratio_of_a_run": listens + (measures - listens) / EVERY_STEPS,
    }


def check_same(loops: dict[str, Loop]) -> None:
    """Raise unless all loops have equal weights."""
    reference, *others = [loop.weights() for loop in loops.values()]
    for name, weights in zip(list(loops)[1:], others, strict=True):
        if not torch.equal(weights, reference):
            raise RuntimeError(f"the loop that {name} does not train as the one that does not measure")


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    ranks = f"{settings['world_size']} rank{'s' if settings['world_size'] > 1 else ''}"
    lines = [
        *heading(
            f"Cost of the noise scale: {settings['model']}, {settings['image_size']} px, micro-batch "
            f"{settings['micro_batch']}, {settings['precision']}, {ranks}",
            report,
        ),
        "| accumulation | rounds | loop | step, ms: median (quartiles) | ÷ does not measure: median (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        for name, times in result["step_ms"].items():
            ratio = result["ratio"].get(name)
            lines.append(
                f"| {result['accumulation']} | {result['rounds']} | {name} | {shown(times, '.1f')} "
                f"| {shown(ratio, '.3f') if ratio else ''} |"
            )
    runs = ", ".join(f"{result['ratio_of_a_run']:.3f} ({result['accumulation']})" for result in report["results"])
    lines += [
        "",
        f"A run that measures every {EVERY_STEPS}th step, the default, takes {runs} times as long, at the "
        "accumulation in brackets. The loops are interleaved step by step; their weights are bit-identical.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
