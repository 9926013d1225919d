"""``python -m recipe plan``: what a config will do on a number of ranks, without a GPU and without importing torch."""

import argparse
import sys
from collections.abc import Sequence

from recipe.config import read_config
from recipe.hostfile import count_slots, read_hostfile
from recipe.plan import make_plan
from recipe.plan_text import format_plan


def main(argv: Sequence[str]) -> int:
    """Print the plan; return 0, or 2 where the run would be refused."""
    parser = argparse.ArgumentParser(prog="python -m recipe plan", description="Print what a config will do.")
    parser.add_argument("config", help="a JSON of ds_configs/")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--hostfile", help="plan for all slots of this DeepSpeed hostfile")
    ranks.add_argument("--world-size", type=_ranks, default=1, metavar="N", help="plan for N ranks (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config"
    )
    arguments = parser.parse_args(argv)
    try:
        world_size = arguments.world_size
        if arguments.hostfile:
            world_size = count_slots(read_hostfile(arguments.hostfile))
        plan = make_plan(read_config(arguments.config, arguments.set), world_size)
    except ValueError as refusal:
        print(f"recipe: {refusal}", file=sys.stderr)
        return 2
    print(format_plan(plan), end="")
    return 0


def _ranks(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 9 else 0
    if not 1 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError("expected a whole number from 1 to 1000000")
    return number
