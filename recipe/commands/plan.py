"""``python -m recipe plan``: what a config will do on a number of ranks, without a GPU and without importing torch."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recipe.checkpoints import PLAN
from recipe.commands import refusing
from recipe.commands.plan_screen import Answer, as_json, draw_rates, format_answers
from recipe.config import Config, printable, read_config
from recipe.data import look
from recipe.distributed import count_slots, read_hostfile, say
from recipe.plan import SHIPPED, Link, ModelFacts, Plan, counted, make_plan
from recipe.reporting import Parser, read_summary
from recipe.train import overrides

# Nobody has measured them here: what PyTorch is said to reach with ResNet-50 on one H100, and a usual network.
ASSUMED_SPEED = {"resnet50": 2500.0}
ASSUMED_GBIT_PER_SECOND = 100.0
LATENCY_SECONDS = 20e-6
GPU_MEMORY_GIB = 80.0


@refusing
def main(argv: Sequence[str]) -> int:
    """Print the plan; return 0, or 2 where the run would be refused."""
    arguments = parse_arguments(argv)
    world_size = arguments.world_size or 1
    if arguments.hostfile:
        world_size = count_slots(read_hostfile(arguments.hostfile))
    configs = [read_config(config, overrides(arguments)) for config in arguments.config]
    # The folder that a config names may lie on the machines that will train.
    looks = None if arguments.data is None else look
    answers = [answer(make_plan(config, world_size, look=looks), arguments) for config in configs]
    if arguments.json:
        found = [as_json(one) for one in answers]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, ensure_ascii=False))
    else:
        hint = "for one rank; --hostfile or --world-size plan for more"
        print(format_answers(answers, [] if arguments.hostfile or arguments.world_size else [hint]), end="")
    for picture in draw_rates([one.plan for one in answers], arguments.plot) if arguments.plot else ():
        say(f"wrote {picture}")
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what makes no sense ends the program."""
    parser = Parser(
        prog="python -m recipe plan", description="Print what a config will do, or two of them side by side."
    )
    parser.add_argument("config", nargs="+", help="a JSON of ds_configs/, or two")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--hostfile", help="plan for all slots of this DeepSpeed hostfile")
    ranks.add_argument("--world-size", type=_ranks, metavar="N", help="plan for N ranks (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config"
    )
    parser.add_argument("--data", help="look into this folder of the data, as a run would (default: at nothing)")
    parser.add_argument(
        "--images-per-second",
        metavar="N|RUN",
        help="speed of one GPU, or the folder of a complete run that measured it on one rank "
        f"(default: {ASSUMED_SPEED['resnet50']:,.0f} for resnet50, as said of an H100)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        metavar="GBIT",
        help=f"Gbit/s that each GPU can send while it receives as much (default: {ASSUMED_GBIT_PER_SECOND:g})",
    )
    parser.add_argument(
        "--gpu-memory", type=_positive, default=GPU_MEMORY_GIB, metavar="GIB", help="of one GPU (default: %(default)g)"
    )
    parser.add_argument("--inspect", action="store_true", help="count in the model itself: imports torch, takes longer")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rate over epochs, as PNG and SVG")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    if len(arguments.config) > 2:
        parser.error(f"expected one config or two, got {len(arguments.config)}")
    return arguments


def answer(plan: Plan, arguments: argparse.Namespace) -> Answer:
    """The plan with what is known of its model, and what the command line says of speed and network or is assumed.

    Raises:
        ValueError: --images-per-second names neither a speed nor a fitting run, or the model cannot be inspected.
    """
    model = plan.config.recipe.model.architecture
    speed, source = None, ""
    if arguments.images_per_second is not None:
        speed, source = _given_speed(arguments.images_per_second, plan)
    elif model in ASSUMED_SPEED and plan.image_size == 224:
        speed = ASSUMED_SPEED[model]
        source = f"{speed:,.0f} images/s per GPU (assumed: {model} on an H100)"
    bandwidth = arguments.bandwidth or ASSUMED_GBIT_PER_SECOND
    kind = "given" if arguments.bandwidth else "assumed"
    return Answer(
        plan,
        _facts(plan, arguments.inspect),
        images_per_second=speed,
        speed_source=source,
        link=Link(bandwidth * 1e9 / 8, LATENCY_SECONDS),
        link_source=f"{bandwidth:g} Gbit/s per GPU ({kind}), {LATENCY_SECONDS * 1e6:g} µs per message (assumed)",
        gpu_bytes=arguments.gpu_memory * 2**30,
    )


def _facts(plan: Plan, inspects: bool) -> ModelFacts | None:
    model = plan.config.recipe.model
    if not inspects:
        return SHIPPED.get((model.architecture, model.num_classes))
    from recipe.commands.inspect_model import inspect_model  # imports torch

    try:
        return inspect_model(model.architecture, model.num_classes, plan.image_size)
    except ValueError as error:
        raise ValueError(f"{plan.config.source.file}: {error}") from error


def _given_speed(given: str, plan: Plan) -> tuple[float, str]:
    """A number, or what a run of the same model and precision has measured on one rank, where nothing is sent."""
    try:
        number = float(given)
    except ValueError:
        return _measured_speed(Path(given), plan)
    if not _is_plausible(number):
        raise ValueError(f"--images-per-second {given}: not from 0.001 to 1e9; write images per second of one GPU")
    return number, f"{number:,.6g} images/s per GPU (given)"


def _measured_speed(run: Path, plan: Plan) -> tuple[float, str]:
    summary = read_summary(run) or {}
    measured = summary.get("images_per_second")
    if not isinstance(measured, (int, float)) or not _is_plausible(measured):
        raise ValueError(
            f"--images-per-second {run}: neither a number nor the folder of a complete run that has trained; write "
            "images per second of one GPU"
        )
    config = read_config(run / PLAN)
    trained, needed = _trained(config, summary["world_size"]), _trained(plan.config, 1)
    if trained != needed:
        raise ValueError(
            f"--images-per-second {run}: that run trained {trained}, and this plan needs the speed of {needed}; name "
            "such a run, or write a number"
        )
    noise = config.recipe.noise_scale
    how = f"micro-batch of {config.train_micro_batch_size_per_gpu}, noise scale "
    how += f"every {noise.every_steps:,} steps" if noise.enabled else "off"
    return measured, printable(f"{measured:,.4g} images/s per GPU (measured by {run} on {summary['device']}: {how})")


def _trained(config: Config, ranks: int) -> str:
    """What a speed belongs to; the number of classes hardly counts."""
    recipe = config.recipe
    return f"{recipe.model.name} at {recipe.data.image_size} px in {config.precision} on {counted(ranks, 'rank')}"


def _is_plausible(number: float) -> bool:
    return 1e-3 <= number <= 1e9


def _ranks(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
    if not 1 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError("expected a whole number from 1 to 1000000")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not _is_plausible(number):
        raise argparse.ArgumentTypeError("expected a number from 0.001 to 1e9")
    return number
