"""``python -m recipe hosts``: compares the hosts of a hostfile and reports, in seconds, what a launch would fail on."""

import argparse
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
PACKAGES = ("Python", "torch", "torchvision", "DeepSpeed", "timm")
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
    general, notes = examine(hosts, launch)
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
    data: dict[str, Any] = {"folder": arguments.data}
    expected: dict[str, int | None] = {}
    if arguments.config:
        config = read_config(arguments.config, overrides(arguments))
        source = config.recipe.data
        plan = make_plan(config, world_size, look=look if source.needs_counting else None)
        precision, config_path, name = plan.precision, str(arguments.config), arguments.config.stem
        special = {"source", "pack_short_side", "pack_raw", "validation_share"}
        data = {"folder": source.path} | source.model_dump(include=special)
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
        problems.append(
            "pdsh, with which DeepSpeed starts the ranks on other hosts, is not installed here; apt-get install pdsh"
        )
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
        host.problems += _differences(host, answered[0])
        first = machines.setdefault(host.facts.get("network", {}).get("machine", host.name), host)
        if first is not host:
            host.problems.append(f"the same machine as {first.name}; write one line for it, with all of its slots")


def _of_one(host: Host, hosts: int, expected_data: Mapping[str, int | None], precision: str) -> Iterator[str]:
    if devices := host.facts.get("devices"):
        gpus = len(devices["gpus"])
        if 0 < gpus < host.slots:
            yield f"{gpus} GPUs for {host.slots} slots; write slots={gpus}, or find out why the others are not seen"
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
    for title, remedy in _ALIKE.items():
        mine, theirs = _cell(title, host), _cell(title, first)
        if mine != theirs and UNKNOWN not in (mine, theirs):
            yield f"{title} {mine}, {first.name} has {theirs}; {remedy}"
    known = host.facts.keys() & first.facts.keys()
    if "devices" in known and bool(host.facts["devices"]["gpus"]) != bool(first.facts["devices"]["gpus"]):
        remedy = "check GPUs and drivers, or leave the host out"
        yield f"it would train on {_device(host)}, {first.name} on {_device(first)}; {remedy}"
    if "clock" in known and abs(apart := host.facts["clock"] - first.facts["clock"]) > CLOCK_LIMIT_SECONDS:
        order = "ahead of" if apart > 0 else "behind"
        yield f"its clock is {abs(apart):.1f} s {order} {first.name}'s; set both by NTP"


def _device(host: Host) -> str:
    gpus = host.facts["devices"]["gpus"]
    return f"{len(gpus)} × {', '.join(dict.fromkeys(gpus))}" if gpus else "CPU"


def _version(package: str) -> Callable[[Host], str]:
    return lambda host: host.facts["checkout"]["versions"][package.lower()]


def _data(host: Host) -> str:
    data = host.facts["data"]
    pack = f" in pack {data['pack'][:8]}" if "pack" in data else ""
    return f"{data['classes']:,} classes, {data['train_images']:,} + {data['validation_images']:,} images{pack}"


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
    **{package: _version(package) for package in PACKAGES},
    "code": lambda host: "{commit} {code_sha256:.8}".format(**host.facts["checkout"]).strip(),
    "config": lambda host: host.facts["checkout"]["config_sha256"][:8],
    "data": _data,
    "clock": lambda host: f"{host.facts['clock']:+.2f} s",
    "slowest round trip": lambda host: "{latency_ms:.2f} ms to {latency_with}".format(**host.facts["exchange"]),
    "lowest bandwidth": _bandwidth,
}
# The columns that must be the same on all hosts, with the remedy where they are not.
_ALIKE = {
    **dict.fromkeys(PACKAGES, "install the same"),
    "code": "bring the checkouts to one state",
    "config": "copy one file to all hosts",
    "data": "copy what is missing",
}


def _cell(title: str, host: Host) -> str:
    try:
        return printable(_COLUMNS[title](host))
    except (KeyError, TypeError):  # it has not answered, or there is no config
        return UNKNOWN


def format_table(hosts: Sequence[Host], width: int | None = None) -> str:
    """A row per host, without the columns of which nothing is known."""
    cells = [[title, *(_cell(title, host) for host in hosts)] for title in _COLUMNS]
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
