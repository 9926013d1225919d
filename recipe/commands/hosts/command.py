"""``python -m recipe hosts``: whether a launch on the hosts of a hostfile would work, in seconds, before it starts."""

import argparse
import asyncio
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipe.commands.hosts.questions import Launch, examine
from recipe.commands.hosts.report import Host, compare, format_problems, format_table
from recipe.config import Config, printable, read_config
from recipe.data import look
from recipe.distributed import count_slots, deepspeed_env_files, read_deepspeed_env, read_hostfile
from recipe.plan import make_plan
from recipe.reporting import Parser
from recipe.train import overrides

WORKS, FAILS, REFUSED = 0, 1, 2
DEFAULT_PORT = 29500  # DeepSpeed's
# DeepSpeed and pdsh write the folder and the interpreter into the hosts' command as they are.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")


def main(argv: Sequence[str]) -> int:
    """Print the table, the problems and a verdict; return 0 if a launch would work, 1 if not, 2 for a refused file."""
    arguments = _parse(argv)
    started = time.monotonic()
    try:
        slots = read_hostfile(arguments.hostfile)
        config = read_config(arguments.config, overrides(arguments)) if arguments.config else None
        variables, refusals = read_deepspeed_env(deepspeed_env_files() if len(slots) > 1 else [])
        launch = _launch(arguments, config, count_slots(slots), variables)
    except ValueError as refusal:
        print(f"recipe: {refusal}", file=sys.stderr)
        return REFUSED
    hosts = [Host(name, number) for name, number in slots.items()]
    here = _problems_here(hosts) + [str(refusal) for refusal in refusals]
    try:
        general, notes = asyncio.run(examine(hosts, launch))
    except KeyboardInterrupt:
        return 130
    compare(hosts, launch.expected_data, launch.precision)
    problems = [*map(printable, here + general), *format_problems(hosts)]
    print(format_table(hosts))
    for line in problems:
        print(f"problem: {line}")
    for line in notes:
        print(f"note: {printable(line)}")
    seconds = f"checked in {time.monotonic() - started:.0f} s"
    ranks = f"{_count(count_slots(slots), 'rank')} on {_count(len(hosts), 'host')}"
    if problems:
        print(f"A launch would fail or go wrong: {_count(len(problems), 'problem')} ({ranks}; {seconds}).")
        return FAILS
    print(f"A launch would work: {ranks} ({seconds}).")
    return WORKS


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m recipe hosts", description="Say whether a launch on a hostfile's hosts would work.")
    parser.add_argument("hostfile", help="the DeepSpeed hostfile")
    parser.add_argument("--config", type=Path, help="the JSON that will be trained")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config"
    )
    parser.add_argument("--data", help="folder of the data, with train/ and val/")
    parser.add_argument("--output", help="folder of the run (default: runs/<config name>)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="deepspeed's --master_port (default: 29500)")
    arguments = parser.parse_args(argv)
    if arguments.set and not arguments.config:
        parser.error("--set changes a config: name it with --config")
    return arguments


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 6 else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError("expected a whole number from 1 to 65535")
    return number


def _launch(
    arguments: argparse.Namespace, config: Config | None, world_size: int, variables: Mapping[str, str]
) -> Launch:
    output = arguments.output or str(Path("runs", arguments.config.stem if arguments.config else ""))
    if config is None:
        return Launch(None, "fp32", None, None, arguments.data, {}, output, arguments.port, variables)
    data = config.recipe.data
    plan = make_plan(config, world_size, look=look if data.is_to_be_counted else None)
    expected = {
        "classes": config.recipe.model.num_classes,
        "train_images": plan.train_images,
        "validation_images": plan.validation_images,
    }
    return Launch(
        str(arguments.config),
        plan.precision,
        data.source,
        data.pack_short_side,
        data.path,
        expected,
        output,
        arguments.port,
        variables,
    )


def _problems_here(hosts: Sequence[Host]) -> list[str]:
    """What stands in the way on this machine, from which DeepSpeed would launch."""
    problems = []
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        problems.append("pdsh, by which DeepSpeed starts the hosts, is not installed here; apt-get install pdsh")
    for what, path in (("folder", str(Path.cwd())), ("interpreter", sys.executable)):
        if len(hosts) > 1 and not _PLAIN.fullmatch(path):
            problems.append(f"the {what} {path} has characters that DeepSpeed does not quote; rename it")
    return problems
