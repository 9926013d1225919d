"""``python -m recipe plan`` prints what a config will do on a number of ranks, without a GPU and without torch."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recipe.commands import refusing
from recipe.commands.plan_screen import Answer, as_json, draw_rates, format_answers
from recipe.config import read_config
from recipe.data import look
from recipe.distributed import count_slots, read_hostfile, say
from recipe.plan import Link, ModelFacts, Plan, make_plan, shipped_facts
from recipe.reporting import Parser, within
from recipe.train import overrides

MEASURED_SPEED = {("resnet50", False): 5653.0, ("resnet50", True): 6490.0}
"""images per second by model and ``recipe.compile``, in fp16 at 224 px: benchmarks/results/gpu_throughput_h200.md

The second was measured with ``recipe.cudnn_benchmark``, too."""

# Assumed, not measured: a common network, and the memory of an H100.
ASSUMED_GBIT_PER_SECOND = 100.0
LATENCY_SECONDS = 20e-6
GPU_MEMORY_GIB = 80.0


@refusing
def main(argv: Sequence[str]) -> int:
    """Print the plan; return 0, or 2 if the run would be refused."""
    arguments = parse_arguments(argv)
    world_size = arguments.world_size or 1
    if arguments.hostfile:
        world_size = count_slots(read_hostfile(arguments.hostfile))
    configs = [read_config(config, overrides(arguments)) for config in arguments.config]
    # The folder that a config names can exist only on the machines that will train.
    counts = None if arguments.data is None else look
    answers = [answer(make_plan(config, world_size, look=counts), arguments) for config in configs]
    if arguments.json:
        found = [as_json(one) for one in answers]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, ensure_ascii=False))
    else:
        hint = "this is for one rank; for more, use --hostfile or --world-size"
        print(format_answers(answers, [] if arguments.hostfile or arguments.world_size else [hint]), end="")
    for picture in draw_rates([one.plan for one in answers], arguments.plot) if arguments.plot else ():
        say(f"wrote {picture}")
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; exit if it is invalid."""
    parser = Parser(
        prog="python -m recipe plan", description="Print what a config will do, or compare two side by side."
    )
    parser.add_argument("config", nargs="+", help="one or two JSON files, such as those in ds_configs/")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--hostfile", help="plan for all slots of this DeepSpeed hostfile")
    ranks.add_argument("--world-size", type=within(1, 1_000_000), metavar="N", help="plan for N ranks (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config; repeatable"
    )
    parser.add_argument("--data", help="check the data in this folder, as a run would (default: no check)")
    positive = within(1e-3, 1e9)
    parser.add_argument(
        "--images-per-second",
        type=positive,
        metavar="N",
        help="speed of a single GPU in images/s (default for resnet50: "
        f"{MEASURED_SPEED['resnet50', False]:,.0f}, measured on one H200)",
    )
    parser.add_argument(
        "--bandwidth",
        type=positive,
        metavar="GBIT",
        help=f"bandwidth of a GPU in Gbit/s per direction (default: {ASSUMED_GBIT_PER_SECOND:g})",
    )
    parser.add_argument(
        "--gpu-memory",
        type=positive,
        default=GPU_MEMORY_GIB,
        metavar="GIB",
        help="memory of one GPU (default: %(default)g)",
    )
    parser.add_argument(
        "--inspect", action="store_true", help="build the model and count its parameters (imports torch)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rate over the epochs, as PNG and SVG")
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")
    arguments = parser.parse_args(argv)
    if len(arguments.config) > 2:
        parser.error(f"expected one config or two, got {len(arguments.config)}")
    return arguments


def answer(plan: Plan, arguments: argparse.Namespace) -> Answer:
    """The plan with the model's facts, and with speed and network as given on the command line, measured or assumed.

    Raises:
        ValueError: the model cannot be inspected.
    """
    recipe = plan.config.recipe
    speed, kind = arguments.images_per_second, "given"
    if speed is None and plan.image_sizes == ((0, 224),) and plan.config.precision in ("fp16", "bf16"):
        speed = MEASURED_SPEED.get((recipe.model.architecture, recipe.compile))
        kind = "measured on one H200 in fp16" + (", with recipe.cudnn_benchmark" if recipe.compile else "")
    bandwidth, bandwidth_kind = arguments.bandwidth, "given"
    if bandwidth is None:
        bandwidth, bandwidth_kind = ASSUMED_GBIT_PER_SECOND, "assumed"
    latency = f"{LATENCY_SECONDS * 1e6:g} µs per message (assumed)"
    return Answer(
        plan,
        _inspected_facts(plan) if arguments.inspect else shipped_facts(plan),
        images_per_second=speed,
        speed_source="" if speed is None else f"{speed:,.6g} images/s per GPU ({kind})",
        link=Link(bandwidth * 1e9 / 8, LATENCY_SECONDS),
        link_source=f"{bandwidth:g} Gbit/s per GPU ({bandwidth_kind}), {latency}",
        gpu_bytes=arguments.gpu_memory * 2**30,
    )


def _inspected_facts(plan: Plan) -> ModelFacts:
    from recipe.commands.inspect_model import inspect_model  # imports torch

    model = plan.config.recipe.model
    try:
        return inspect_model(model.architecture, model.num_classes, plan.largest_image_size, model.freeze)
    except ValueError as error:
        raise ValueError(f"{plan.config.source.file}: {error}") from error
