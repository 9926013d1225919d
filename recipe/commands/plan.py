"""``python -m recipe plan``: what a config will do on a number of ranks, without a GPU and without importing torch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe.checkpoints import PLAN
from recipe.commands.plan_screen import (
    Assumptions,
    as_json,
    draw_rates,
    json_text,
    plan_screen,
    side_by_side,
)
from recipe.config import Config, ConfigError, printable, read_config
from recipe.data import look
from recipe.distributed import count_slots, read_hostfile
from recipe.plan import SHIPPED, Link, ModelFacts, Plan, counted, format_fields, make_plan, notes
from recipe.reporting import Parser, read_summary
from recipe.train import overrides

# Nobody has measured them here: what PyTorch is said to reach with ResNet-50 on one H100, and a usual network.
ASSUMED_SPEED = {"resnet50": 2500.0}
ASSUMED_GBIT_PER_SECOND = 100.0
LATENCY_SECONDS = 20e-6
GPU_MEMORY_GIB = 80.0


def main(argv: Sequence[str]) -> int:
    """Print the plan; return 0, or 2 where the run would be refused."""
    arguments = parse_arguments(argv)
    try:
        world_size = arguments.world_size or 1
        if arguments.hostfile:
            world_size = count_slots(read_hostfile(arguments.hostfile))
        configs = [read_config(config, overrides(arguments)) for config in arguments.config]
        # The folder that a config names may lie on the machines that will train.
        looks = None if arguments.data is None else look
        plans = [make_plan(config, world_size, look=looks) for config in configs]
        known = [facts_of(plan, arguments.inspect) for plan in plans]
        assumed = [assumptions(plan, arguments) for plan in plans]
        pictures = draw(plans, arguments.plot) if arguments.plot else []
    except ValueError as refusal:
        print(f"recipe: {printable(str(refusal))}", file=sys.stderr)
        return 2
    everything = list(zip(plans, known, assumed, strict=True))
    if arguments.json:
        print(json_text([as_json(*one) for one in everything]), end="")
    elif len(plans) == 2:
        said_of = [notes(plan, facts) for plan, facts, _ in everything]
        print(side_by_side(plans, [plan_screen(*one) for one in everything], said_of), end="")
    else:
        said = notes(plans[0], known[0])
        if not arguments.hostfile and arguments.world_size is None:
            said = ["for one rank; --hostfile or --world-size plan for more", *said]
        print(format_fields(plans[0], [*plan_screen(*everything[0]), *(("note", note) for note in said)]), end="")
    for picture in pictures:
        print(f"recipe: wrote {picture}", file=sys.stderr)
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


def facts_of(plan: Plan, inspects: bool) -> ModelFacts | None:
    """What is known of the plan's model, without or with a look at the model itself.

    Raises:
        ConfigError: timm has no such model, or it takes no images of this size.
    """
    model = plan.config.recipe.model
    if not inspects:
        return SHIPPED.get((model.architecture, model.num_classes))
    from recipe.commands.inspect_model import inspect_model

    try:
        return inspect_model(model.architecture, model.num_classes, plan.image_size)
    except ValueError as error:
        message = str(error)
        if isinstance(error, ConfigError):
            raise
        if message.startswith("recipe."):
            raise ValueError(f"{plan.config.source.file}: {message}") from error
        raise plan.config.source.refusal("recipe.model.name", message, "choose another model or image size") from error


def assumptions(plan: Plan, arguments: argparse.Namespace) -> Assumptions:
    """What the command line says of speed and network, or else what is assumed.

    Raises:
        ValueError: it names neither a speed nor a complete run.
    """
    model, given = plan.config.recipe.model.architecture, arguments.images_per_second
    speed: float | None = None
    source = ""
    if given is not None:
        speed, source = _speed(given, plan)
    elif model in ASSUMED_SPEED and plan.image_size == 224:
        speed = ASSUMED_SPEED[model]
        source = f"{speed:,.0f} images/s per GPU (assumed: {model} on an H100)"
    bandwidth = arguments.bandwidth or ASSUMED_GBIT_PER_SECOND
    kind = "given" if arguments.bandwidth else "assumed"
    return Assumptions(
        images_per_second=speed,
        speed_source=source,
        link=Link(bandwidth * 1e9 / 8, LATENCY_SECONDS),
        link_source=f"{bandwidth:g} Gbit/s per GPU ({kind}), {LATENCY_SECONDS * 1e6:g} µs per message (assumed)",
        gpu_bytes=arguments.gpu_memory * 2**30,
    )


def draw(plans: Sequence[Plan], path: Path) -> list[Path]:
    """``draw_rates``, with a refusal where the files cannot be written.

    Raises:
        ValueError: they cannot be, or matplotlib is not installed.
    """
    if not path.name or path.name == ".." or path.is_dir():
        raise ValueError(f'--plot "{path}": no file; write one such as plan.png')
    try:
        return draw_rates(plans, path)
    except OSError as error:
        raise ValueError(f"--plot {path}: {error.strerror}; write a file in a folder that is there") from error


def _speed(given: str, plan: Plan) -> tuple[float, str]:
    """A number, or what a run of the same model and precision has measured on one rank, where nothing is sent."""
    try:
        number = float(given)
    except ValueError:
        return _measured(Path(given), plan)
    if not _is_plausible(number):
        raise ValueError(f"--images-per-second {given}: not from 0.001 to 1e9; write images per second of one GPU")
    return number, f"{number:,.6g} images/s per GPU (given)"


def _measured(run: Path, plan: Plan) -> tuple[float, str]:
    summary = read_summary(run)
    measured = None if summary is None else summary["images_per_second"]
    if summary is None or not isinstance(measured, (int, float)) or not _is_plausible(measured):
        raise ValueError(
            f"--images-per-second {run}: neither a number nor the folder of a complete run that has trained; write "
            "images per second of one GPU"
        )
    config = read_config(run / PLAN)
    trained = f"{_what(config)} on {counted(summary['world_size'], 'rank')}"
    needed = f"{_what(plan.config)} on 1 rank"
    if trained != needed:
        raise ValueError(
            f"--images-per-second {run}: that run trained {trained}, and this plan needs the speed of {needed}; name "
            "such a run, or write a number"
        )
    noise = config.recipe.noise_scale
    how = f"micro-batch of {config.train_micro_batch_size_per_gpu}, noise scale "
    how += f"every {noise.every_steps:,} steps" if noise.enabled else "off"
    return measured, printable(f"{measured:,.4g} images/s per GPU (measured by {run} on {summary['device']}: {how})")


def _what(config: Config) -> str:
    """What a speed belongs to; the number of classes hardly counts."""
    recipe = config.recipe
    return f"{recipe.model.name} at {recipe.data.image_size} px in {config.precision}"


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
