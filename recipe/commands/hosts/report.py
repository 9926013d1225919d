"""What the hosts answered, compared and put into a table and into lines that a person can act on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from recipe.config import printable
from recipe.plan import columns
from recipe.reporting import table

CLOCK_LIMIT_SECONDS = 5.0
NAMES_SHOWN = 4
UNKNOWN = "–"


@dataclass
class Host:
    """A host of the hostfile, and what was learnt: ``facts`` are its answers, by question."""

    name: str
    slots: int
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_gone: bool = False


def compare(hosts: Sequence[Host], expected_data: Mapping[str, int | None], precision: str) -> None:
    """Add to each host's problems what a launch would stumble over, measured by the first host that answers."""
    asked = [host for host in hosts if host.facts]
    for host in asked:
        host.problems += _of_slots(host, precision) + _of_network(host, len(hosts)) + _of_data(host, expected_data)
        if host is not asked[0]:
            host.problems += _apart(host, asked[0])
    machines: dict[str, Host] = {}
    for host in asked:
        first = machines.setdefault(host.facts.get("network", {}).get("machine", host.name), host)
        if first is not host:
            host.problems.append(f"the same machine as {first.name}; write one line for it, with all of its slots")


def _of_slots(host: Host, precision: str) -> list[str]:
    found = host.facts.get("devices")
    if found is None:
        return []
    problems = []
    gpus = len(found["gpus"])
    if 0 < gpus < host.slots:
        problems.append(f"{gpus} GPUs for {host.slots} slots; write slots={gpus}, or look why the others are not seen")
    if not found["knows_precision"]:
        problems.append(
            f'its {_device(host)} does not support {precision}; write "{precision}": {{"enabled": false}} in the config'
        )
    return problems


def _of_network(host: Host, hosts: int) -> list[str]:
    problems = []
    address = host.facts.get("network", {}).get("address")
    if hosts > 1 and address is not None and is_loopback(address):
        problems.append(
            f"its own name leads to {address}, where no other host reaches it; write its address beside its name in "
            "its /etc/hosts, or GLOO_SOCKET_IFNAME=<interface> into .deepspeed_env"
        )
    if unreached := host.facts.get("unreached"):
        problems.append(
            f"it does not reach {_names(unreached)}; open all ports between the hosts, or name the interface that "
            "they share: GLOO_SOCKET_IFNAME=<interface> in .deepspeed_env"
        )
    return problems


def is_loopback(address: str) -> bool:
    """Whether an address leads nowhere from another host."""
    return ip_address(address.partition("%")[0]).is_loopback


def _of_data(host: Host, expected: Mapping[str, int | None]) -> list[str]:
    found = host.facts.get("data")
    if found is None:
        return []
    return [
        f"the data has {found[key]:,} {key.replace('_', ' ')}, the config says {number:,}; correct either"
        for key, number in expected.items()
        if number is not None and found[key] != number
    ]


def _apart(host: Host, first: Host) -> list[str]:
    """How a host differs from the first one where it must not."""
    problems = []
    mine, theirs = host.facts, first.facts
    shared = mine.keys() & theirs.keys()
    if "checkout" in shared:
        problems += _code_apart(mine["checkout"], theirs["checkout"], first.name)
    if "devices" in shared and bool(mine["devices"]["gpus"]) != bool(theirs["devices"]["gpus"]):
        problems.append(
            f"it would train on {_device(host)}, {first.name} on {_device(first)}; check GPUs and drivers, or leave "
            "the host out"
        )
    if "data" in shared and mine["data"] != theirs["data"]:
        problems.append(f"the data has {_counts(host)}, on {first.name} {_counts(first)}; copy what is missing")
    if host.name in theirs.get("unseen", []) or first.name in mine.get("unseen", []):
        problems.append(
            f"it does not share the output folder with {first.name}; name one on a file system that all hosts mount "
            "(--output)"
        )
    if "clock" in shared and abs(apart := mine["clock"] - theirs["clock"]) > CLOCK_LIMIT_SECONDS:
        order = "ahead of" if apart > 0 else "behind"
        problems.append(f"its clock is {abs(apart):.1f} s {order} {first.name}'s; set both by NTP")
    return problems


def _code_apart(mine: Mapping[str, Any], theirs: Mapping[str, Any], first: str) -> list[str]:
    problems = [
        f"{package} {version}, {first} has {theirs['versions'][package]}; install the same"
        for package, version in mine["versions"].items()
        if version != theirs["versions"][package]
    ]
    if mine["code_sha256"] != theirs["code_sha256"]:
        problems.append(f"other code in recipe/ than on {first}; bring the checkouts to one state")
    elif mine["commit"] != theirs["commit"]:
        commits = f"git commit {mine['commit'] or 'unknown'}, {first} has {theirs['commit'] or 'an unknown one'}"
        problems.append(f"{commits}; bring the checkouts to one state")
    if mine["config_sha256"] != theirs["config_sha256"]:
        problems.append(f"another config than on {first}; copy one file to all hosts")
    return problems


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


def _rate(bytes_per_second: float) -> str:
    megabits = bytes_per_second * 8 / 1e6
    return f"{megabits / 1000:.1f} Gbit/s" if megabits >= 1000 else f"{megabits:.0f} Mbit/s"


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
    "slowest round trip": lambda host: (
        f"{host.facts['exchange']['latency_seconds'] * 1000:.2f} ms to {host.facts['exchange']['latency_with']}"
    ),
    "lowest bandwidth": lambda host: (
        f"{_rate(host.facts['exchange']['bytes_per_second'])} to {host.facts['exchange']['bandwidth_with']}"
    ),
}


def format_table(hosts: Sequence[Host], width: int | None = None) -> str:
    """A row per host; a column that nothing is known for is left out."""
    cells = [[title, *(_known(cell, host) for host in hosts)] for title, cell in _COLUMNS.items()]
    known = [column for column in cells if set(column[1:]) != {UNKNOWN}]
    return table(list(zip(*known, strict=True)), width or columns(10_000))


def _known(cell: Callable[[Host], str], host: Host) -> str:
    try:
        return printable(cell(host))
    except KeyError:
        return UNKNOWN


def format_problems(hosts: Sequence[Host]) -> list[str]:
    """A line a problem; hosts with the same one share a line."""
    sharing: dict[str, list[str]] = {}
    for host in hosts:
        for problem in dict.fromkeys(host.problems):
            sharing.setdefault(problem, []).append(host.name)
    return [printable(f"{_names(names)}: {problem}") for problem, names in sharing.items()]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown} and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
