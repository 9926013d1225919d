"""``python -m recipe hosts``: compares the hosts of a hostfile and reports, in seconds, what a launch would fail on."""

import argparse
import asyncio
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.commands.hosts.visit import Host, Launch, examine, is_loopback
from recipe.config import printable, read_config
from recipe.data import look
from recipe.distributed import count_slots, deepspeed_env_files, read_deepspeed_env, read_hostfile
from recipe.plan import columns, counted, make_plan
from recipe.reporting import Parser, table
from recipe.train import overrides

WORKS, FAILS, REFUSED = 0, 1, 2
DEFAULT_PORT = 29500  # DeepSpeed's
CLOCK_LIMIT_SECONDS = 5.0
NAMES_SHOWN = 4
UNKNOWN = "–"
# DeepSpeed and pdsh write the folder and the interpreter into the hosts' command without quoting them.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")


def main(argv: Sequence[str]) -> int:
    """Print the table, the problems and a verdict; return 0 if a launch would work, 1 if not, 2 for a refused file."""
    arguments = _parse(argv)
    started = time.monotonic()
    try:
        slots = read_hostfile(arguments.hostfile)
        variables, refusals = read_deepspeed_env(deepspeed_env_files() if len(slots) > 1 else [])
        launch, expected = _launch(arguments, count_slots(slots), variables)
    except ValueError as refusal:
        print(f"recipe: {refusal}", file=sys.stderr)
        return REFUSED
    hosts = [Host(name, number) for name, number in slots.items()]
    here = _problems_here(len(hosts)) + [str(refusal) for refusal in refusals]
    general, notes = asyncio.run(examine(hosts, launch))
    compare(hosts, expected, launch.precision)
    problems = [*map(printable, here + general), *format_problems(hosts)]
    print(format_table(hosts))
    for line in problems:
        print(f"problem: {line}")
    for line in notes:
        print(f"note: {printable(line)}")
    seconds = f"checked in {time.monotonic() - started:.0f} s"
    ranks = f"{counted(count_slots(slots), 'rank')} on {counted(len(hosts), 'host')}"
    if problems:
        print(f"A launch would fail or go wrong: {counted(len(problems), 'problem')} ({ranks}; {seconds}).")
        return FAILS
    print(f"A launch would work: {ranks} ({seconds}).")
    return WORKS


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m recipe hosts", description="Say whether a launch on a hostfile's hosts would work.")
    parser.add_argument("hostfile", help="the DeepSpeed hostfile")
    parser.add_argument("--config", type=Path, help="the JSON that will be trained")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config"
    )
    parser.add_argument("--data", help="folder of the data, with train/ and val/")
    parser.add_argument("--output", help="folder of the run (default: runs/<config name>)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="deepspeed's --master_port (default: 29500)")
    arguments = parser.parse_args(argv)
    if arguments.set and not arguments.config:
        parser.error("--set changes a config: name it with --config")
    if not 1 <= arguments.port <= 65535:
        parser.error(f"argument --port: {arguments.port}: expected a whole number from 1 to 65535")
    return arguments


def _launch(
    arguments: argparse.Namespace, world_size: int, variables: Mapping[str, str]
) -> tuple[Launch, dict[str, int | None]]:
    """The launch, and the counts that its config gives for the data."""
    precision, config_path, name = "fp32", None, ""
    data = {"folder": arguments.data, "source": None, "pack_short_side": None, "validation_share": None}
    expected: dict[str, int | None] = {}
    if arguments.config:
        config = read_config(arguments.config, overrides(arguments))
        source = config.recipe.data
        plan = make_plan(config, world_size, look=look if source.is_to_be_counted else None)
        precision, config_path, name = plan.precision, str(arguments.config), arguments.config.stem
        data = {"folder": source.path} | {
            key: getattr(source, key) for key in ("source", "pack_short_side", "validation_share")
        }
        expected = {
            "classes": config.recipe.model.num_classes,
            "train_images": plan.train_images,
            "validation_images": plan.validation_images,
        }
    output = arguments.output or str(Path("runs", name))
    return Launch(config_path, precision, data, output, arguments.port, variables), expected


def _problems_here(hosts: int) -> list[str]:
    """What would stop DeepSpeed on this machine, from which it would launch."""
    if hosts == 1:
        return []
    problems = []
    if shutil.which("pdsh") is None:
        problems.append("pdsh, by which DeepSpeed starts the hosts, is not installed here; apt-get install pdsh")
    for what, path in (("folder", str(Path.cwd())), ("interpreter", sys.executable)):
        if not _PLAIN.fullmatch(path):
            problems.append(f"the {what} {path} has characters that DeepSpeed does not quote; rename it")
    return problems


def compare(hosts: Sequence[Host], expected_data: Mapping[str, int | None], precision: str) -> None:
    """Add to each host's problems what a launch would fail on; the first host that answered is the reference."""
    answered = [host for host in hosts if host.facts]
    machines: dict[str, Host] = {}
    for host in answered:
        host.problems += _of_one(host, len(hosts), expected_data, precision)
        if host is not answered[0]:
            host.problems += _differences(host, answered[0])
        first = machines.setdefault(host.facts.get("network", {}).get("machine", host.name), host)
        if first is not host:
            host.problems.append(f"the same machine as {first.name}; write one line for it, with all of its slots")


def _of_one(host: Host, hosts: int, expected_data: Mapping[str, int | None], precision: str) -> Iterator[str]:
    if devices := host.facts.get("devices"):
        gpus = len(devices["gpus"])
        if 0 < gpus < host.slots:
            yield f"{gpus} GPUs for {host.slots} slots; write slots={gpus}, or look why the others are not seen"
        if not devices["knows_precision"]:
            remedy = f'write "{precision}": {{"enabled": false}} in the config'
            yield f"its {_device(host)} does not support {precision}; {remedy}"
    address = host.facts.get("network", {}).get("address")
    if hosts > 1 and address and is_loopback(address):
        yield (
            f"its own name leads to {address}, where no other host reaches it; write its address beside its name in "
            "its /etc/hosts, or GLOO_SOCKET_IFNAME=<interface> into .deepspeed_env"
        )
    if unreached := host.facts.get("unreached"):
        yield (
            f"it does not reach {_names(unreached)}; open all ports between the hosts, or name the interface that "
            "they share: GLOO_SOCKET_IFNAME=<interface> in .deepspeed_env"
        )
    if data := host.facts.get("data"):
        for key, number in expected_data.items():
            if number is not None and data[key] != number:
                yield f"the data has {data[key]:,} {key.replace('_', ' ')}, the config says {number:,}; correct either"
    if unseen := host.facts.get("unseen"):
        remedy = "name one on a file system that all hosts mount (--output)"
        yield f"it does not share the output folder with {unseen}; {remedy}"


def _differences(host: Host, first: Host) -> Iterator[str]:
    """What is different on the first host, and must not be."""
    mine, theirs = host.facts, first.facts
    known = mine.keys() & theirs.keys()
    if "checkout" in known:
        yield from _code_differences(mine["checkout"], theirs["checkout"], first.name)
    if "devices" in known and bool(mine["devices"]["gpus"]) != bool(theirs["devices"]["gpus"]):
        remedy = "check GPUs and drivers, or leave the host out"
        yield f"it would train on {_device(host)}, {first.name} on {_device(first)}; {remedy}"
    if "data" in known and mine["data"] != theirs["data"]:
        yield f"the data has {_counts(host)}, on {first.name} {_counts(first)}; copy what is missing"
    if "clock" in known and abs(apart := mine["clock"] - theirs["clock"]) > CLOCK_LIMIT_SECONDS:
        order = "ahead of" if apart > 0 else "behind"
        yield f"its clock is {abs(apart):.1f} s {order} {first.name}'s; set both by NTP"


def _code_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], first: str) -> Iterator[str]:
    for package, version in mine["versions"].items():
        if version != theirs["versions"][package]:
            yield f"{package} {version}, {first} has {theirs['versions'][package]}; install the same"
    if mine["code_sha256"] != theirs["code_sha256"]:
        yield f"other code in recipe/ than on {first}; bring the checkouts to one state"
    elif mine["commit"] != theirs["commit"]:
        commits = f"git commit {mine['commit'] or 'unknown'}, {first} has {theirs['commit'] or 'an unknown one'}"
        yield f"{commits}; bring the checkouts to one state"
    if mine["config_sha256"] != theirs["config_sha256"]:
        yield f"another config than on {first}; copy one file to all hosts"


def _counts(host: Host) -> str:
    data = host.facts["data"]
    pack = f" in pack {data['pack'][:8]}" if "pack" in data else ""
    return f"{data['classes']:,} classes, {data['train_images']:,} + {data['validation_images']:,} images{pack}"


def _device(host: Host) -> str:
    gpus = host.facts["devices"]["gpus"]
    return f"{len(gpus)} × {', '.join(dict.fromkeys(gpus))}" if gpus else "CPU"


def _code(host: Host) -> str:
    found = host.facts["checkout"]
    return (found["commit"] or found["code_sha256"][:8]) + ("+" if found["is_changed"] else "")


def _round_trip(host: Host) -> str:
    found = host.facts["exchange"]
    return f"{found['latency_seconds'] * 1000:.2f} ms to {found['latency_with']}"


def _bandwidth(host: Host) -> str:
    found = host.facts["exchange"]
    megabits = found["bytes_per_second"] * 8 / 1e6
    rate = f"{megabits / 1000:.1f} Gbit/s" if megabits >= 1000 else f"{megabits:.0f} Mbit/s"
    return f"{rate} to {found['bandwidth_with']}"


_COLUMNS: dict[str, Callable[[Host], str]] = {
    "host": lambda host: host.name,
    "slots": lambda host: str(host.slots),
    "device": _device,
    "address": lambda host: host.facts["network"]["address"],
    "Python": lambda host: host.facts["checkout"]["versions"]["python"],
    "torch": lambda host: host.facts["checkout"]["versions"]["torch"],
    "DeepSpeed": lambda host: host.facts["checkout"]["versions"]["deepspeed"],
    "timm": lambda host: host.facts["checkout"]["versions"]["timm"],
    "code": _code,
    "data": _counts,
    "clock": lambda host: f"{host.facts['clock']:+.2f} s",
    "slowest round trip": _round_trip,
    "lowest bandwidth": _bandwidth,
}


def format_table(hosts: Sequence[Host], width: int | None = None) -> str:
    """A row per host, without the columns of which nothing is known."""

    def shown(cell: Callable[[Host], str], host: Host) -> str:
        try:
            return printable(cell(host))
        except KeyError:
            return UNKNOWN

    cells = [[title, *(shown(cell, host) for host in hosts)] for title, cell in _COLUMNS.items()]
    known = [column for column in cells if set(column[1:]) != {UNKNOWN}]
    return table(list(zip(*known, strict=True)), width or columns(10_000))


def format_problems(hosts: Sequence[Host]) -> list[str]:
    """One line per problem; hosts with the same one share a line."""
    sharing: dict[str, list[str]] = {}
    for host in hosts:
        for problem in dict.fromkeys(host.problems):
            sharing.setdefault(problem, []).append(host.name)
    return [printable(f"{_names(names)}: {problem}") for problem, names in sharing.items()]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
