"""``python -m recipe hosts``: checks the hosts of a hostfile for everything that would make a launch fail."""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.commands import refusing
from recipe.commands.hosts.visit import Host, Launch, examine, is_loopback
from recipe.config import printable, read_config
from recipe.data import look
from recipe.distributed import count_slots, deepspeed_env_files, read_deepspeed_env, read_hostfile
from recipe.plan import columns, counted, make_plan
from recipe.reporting import Parser, table, within
from recipe.train import overrides

WORKS, FAILS = 0, 1
DEFAULT_PORT = 29500  # DeepSpeed's
CLOCK_LIMIT_SECONDS = 5.0
NAMES_SHOWN = 4
UNKNOWN = "–"
PACKAGES = ("Python", "torch", "torchvision", "DeepSpeed", "timm")
# DeepSpeed and pdsh do not quote the folder and the interpreter in the command for the hosts.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")


@refusing
def main(argv: Sequence[str]) -> int:
    """Print the table, the problems and the verdict; return 0 if a launch would work, 1 if not, 2 if refused."""
    arguments = _parse(argv)
    started = time.monotonic()
    slots = read_hostfile(arguments.hostfile)
    variables, refusals = read_deepspeed_env(deepspeed_env_files() if len(slots) > 1 else [])
    launch, expected = _launch(arguments, count_slots(slots), variables)
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
    parser = Parser(
        prog="python -m recipe hosts", description="Check whether a launch on the hosts of a hostfile would work."
    )
    parser.add_argument("hostfile", help="the DeepSpeed hostfile")
    parser.add_argument("--config", type=Path, help="the config that will be trained")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the config; repeatable"
    )
    parser.add_argument("--data", help="folder of the data, with train/ and val/")
    parser.add_argument("--output", help="folder of the run (default: runs/<config name>)")
    parser.add_argument(
        "--port", type=within(1, 65535), default=DEFAULT_PORT, help="deepspeed's --master_port (default: 29500)"
    )
    arguments = parser.parse_args(argv)
    if arguments.set and not arguments.config:
        parser.error("--set changes a config: name it with --config")
    return arguments


def _launch(
    arguments: argparse.Namespace, world_size: int, variables: Mapping[str, str]
) -> tuple[Launch, dict[str, int | None]]:
    """The launch to check, and the numbers of classes and images that its config expects."""
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
    """What would stop DeepSpeed on this machine, where the launch would start."""
    if hosts == 1:
        return []
    problems = []
    if shutil.which("pdsh") is None:
        problems.append(
            "pdsh is not installed here, and DeepSpeed starts the ranks on other hosts with it; apt-get install pdsh"
        )
    for what, path in (("folder", str(Path.cwd())), ("interpreter", sys.executable)):
        if not _PLAIN.fullmatch(path):
            problems.append(f"the {what} {path} has characters that DeepSpeed does not quote; rename it")
    return problems


def compare(hosts: Sequence[Host], expected_data: Mapping[str, int | None], precision: str) -> None:
    """Add the problems of each host's answers; the first host that answered is the reference for the others."""
    answered = [host for host in hosts if host.facts]
    machines: dict[str, Host] = {}
    for host in answered:
        host.problems += _own_problems(host, len(hosts), expected_data, precision)
        host.problems += _differences(host, answered[0])
        first = machines.setdefault(host.facts.get("network", {}).get("machine", host.name), host)
        if first is not host:
            host.problems.append(f"the same machine as {first.name}; write one line for it, with all of its slots")


def _own_problems(host: Host, hosts: int, expected_data: Mapping[str, int | None], precision: str) -> Iterator[str]:
    if devices := host.facts.get("devices"):
        gpus = len(devices["gpus"])
        if 0 < gpus < host.slots:
            remedy = f"write slots={gpus}, or find out why torch does not see more"
            yield f"{counted(gpus, 'GPU')} for {host.slots} slots; {remedy}"
        if not devices["knows_precision"]:
            remedy = f'use "{precision}": {{"enabled": false}} in the config'
            yield f"its {_device(host)} does not support {precision}; {remedy}"
    address = host.facts.get("network", {}).get("address")
    if hosts > 1 and address and is_loopback(address):
        yield (
            f"its own name resolves to {address}, which other hosts cannot reach; give the name its address in its "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME=<interface> in .deepspeed_env"
        )
    if unreached := host.facts.get("unreached"):
        yield (
            f"it cannot reach {_names(unreached)}; open all ports between the hosts, or name their common interface: "
            "GLOO_SOCKET_IFNAME=<interface> in .deepspeed_env"
        )
    if data := host.facts.get("data"):
        for key, number in expected_data.items():
            if number is not None and data[key] != number:
                found = f"the data has {data[key]:,} {key.replace('_', ' ')}"
                yield f"{found}, the config says {number:,}; correct one of them"
    if unseen := host.facts.get("unseen"):
        yield f"it does not share the output folder with {unseen}; name one that all hosts mount (--output)"


def _differences(host: Host, first: Host) -> Iterator[str]:
    """How a host differs from the first one where all hosts must agree."""
    for title, remedy in _ALIKE.items():
        mine, theirs = _cell(title, host), _cell(title, first)
        if mine != theirs and UNKNOWN not in (mine, theirs):
            yield f"{title} {mine}, {first.name} has {theirs}; {remedy}"
    known = host.facts.keys() & first.facts.keys()
    if "devices" in known and bool(host.facts["devices"]["gpus"]) != bool(first.facts["devices"]["gpus"]):
        devices = f"it would train on {_device(host)}, {first.name} on {_device(first)}"
        yield f"{devices}; check GPUs and drivers, or remove the host"
    if "clock" in known and abs(apart := host.facts["clock"] - first.facts["clock"]) > CLOCK_LIMIT_SECONDS:
        order = "ahead of" if apart > 0 else "behind"
        yield f"its clock is {abs(apart):.1f} s {order} {first.name}'s; synchronise both by NTP"


def _device(host: Host) -> str:
    gpus = host.facts["devices"]["gpus"]
    return f"{len(gpus)} × {', '.join(dict.fromkeys(gpus))}" if gpus else "CPU"


def _version(package: str) -> Callable[[Host], str]:
    return lambda host: host.facts["checkout"]["versions"][package.lower()]


def _data(host: Host) -> str:
    data = host.facts["data"]
    pack = f" in pack {data['pack'][:8]}" if "pack" in data else ""
    return f"{data['classes']:,} classes, {data['train_images']:,} + {data['validation_images']:,} images{pack}"


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
    "slowest round trip": lambda host: host.facts["exchange"]["slowest_round_trip"],
    "lowest bandwidth": lambda host: host.facts["exchange"]["lowest_bandwidth"],
}
# The columns that must be the same on all hosts, each with the remedy if they are not.
_ALIKE = {
    **dict.fromkeys(PACKAGES, "install the same version"),
    "code": "make the checkouts identical",
    "config": "copy the same file to all hosts",
    "data": "copy what is missing",
}


def _cell(title: str, host: Host) -> str:
    try:
        return printable(_COLUMNS[title](host))
    except (KeyError, TypeError):  # no answer, or no config
        return UNKNOWN


def format_table(hosts: Sequence[Host], width: int | None = None) -> str:
    """One row per host, without the columns that are unknown for all hosts."""
    cells = [[title, *(_cell(title, host) for host in hosts)] for title in _COLUMNS]
    known = [column for column in cells if set(column[1:]) != {UNKNOWN}]
    return table(list(zip(*known, strict=True)), width or columns(10_000))


def format_problems(hosts: Sequence[Host]) -> list[str]:
    """One line per problem, which names all hosts that have it."""
    sharing: dict[str, list[str]] = {}
    for host in hosts:
        for problem in dict.fromkeys(host.problems):
            sharing.setdefault(problem, []).append(host.name)
    return [printable(f"{_names(names)}: {problem}") for problem, names in sharing.items()]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
