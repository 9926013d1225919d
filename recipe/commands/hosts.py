"""``python -m recipe hosts``: whether a launch on the hosts of a hostfile would work, in seconds, before it starts."""

import argparse
import asyncio
import json
import re
import secrets
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.commands.host_report import Host, compare, format_problems, format_table, is_loopback
from recipe.commands.host_visit import AnswerError, Visit, VisitError, explain, output_of, ssh_options
from recipe.config import Config, read_config
from recipe.deepspeed_env import deepspeed_env_files, read_deepspeed_env
from recipe.hostfile import read_hostfile
from recipe.launcher import is_this_machine
from recipe.plan import make_plan
from recipe.strict_json import printable

WORKS, FAILS, REFUSED = 0, 1, 2
DEFAULT_PORT = 29500  # DeepSpeed's
ANSWER_SECONDS = 15
IMPORT_SECONDS = 60  # torch and DeepSpeed from a cold or distant disk
DATA_SECONDS = 60
EXCHANGE_SECONDS = 45
KEEPALIVE_LIMIT_SECONDS = 60
KEEPALIVE = 'export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=3"'
# DeepSpeed and pdsh write the folder and the interpreter into the hosts' command as they are.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")


@dataclass(frozen=True)
class Launch:
    """The launch that is asked about."""

    config: str | None
    precision: str
    data: str | None
    expected_data: Mapping[str, int | None]
    output: str
    port: int
    environment: Mapping[str, str]


def main(argv: Sequence[str]) -> int:
    """Print the table, the problems and a verdict; return 0 if a launch would work, 1 if not, 2 for a refused file."""
    arguments = _parse(argv)
    started = time.monotonic()
    try:
        slots = read_hostfile(arguments.hostfile)
        config = read_config(arguments.config, _overrides(arguments)) if arguments.config else None
        variables, refusals = read_deepspeed_env(deepspeed_env_files() if len(slots) > 1 else [])
        launch = _launch(arguments, config, sum(slots.values()), variables)
    except ValueError as refusal:
        print(f"recipe: {refusal}", file=sys.stderr)
        return REFUSED
    hosts = [Host(name, number) for name, number in slots.items()]
    here = _problems_here(hosts) + [str(refusal) for refusal in refusals]
    try:
        general, notes = asyncio.run(_examine(hosts, launch))
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
    ranks = f"{sum(slots.values())} ranks on {len(hosts)} hosts"
    if problems:
        print(f"A launch would fail or go wrong: {len(problems)} problems ({ranks}; {seconds}).")
        return FAILS
    print(f"A launch would work: {ranks} ({seconds}).")
    return WORKS


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipe hosts", description="Say whether a launch on a hostfile's hosts would work."
    )
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


def _overrides(arguments: argparse.Namespace) -> list[str]:
    data = [] if arguments.data is None else [f"recipe.data.path={json.dumps(arguments.data)}"]
    return [*arguments.set, *data]


def _launch(
    arguments: argparse.Namespace, config: Config | None, world_size: int, variables: Mapping[str, str]
) -> Launch:
    output = arguments.output or str(Path("runs", arguments.config.stem if arguments.config else ""))
    if config is None:
        return Launch(None, "fp32", arguments.data, {}, output, arguments.port, variables)
    plan = make_plan(config, world_size)
    data = config.recipe.data
    is_folder = data.source == "imagefolder"
    expected = {
        "classes": config.recipe.model.num_classes,
        "train_images": plan.train_images,
        "validation_images": plan.validation_images,
    }
    folder = data.path if is_folder else None
    return Launch(str(arguments.config), plan.precision, folder, expected, output, arguments.port, variables)


def _problems_here(hosts: Sequence[Host]) -> list[str]:
    """What stands in the way on this machine, from which DeepSpeed would launch."""
    problems = []
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        problems.append("pdsh, by which DeepSpeed starts the hosts, is not installed here; apt-get install pdsh")
    for what, path in (("folder", str(Path.cwd())), ("interpreter", sys.executable)):
        if len(hosts) > 1 and not _PLAIN.fullmatch(path):
            problems.append(f"the {what} {path} has characters that DeepSpeed does not quote; rename it")
    return problems


async def _examine(hosts: Sequence[Host], launch: Launch) -> tuple[list[str], list[str]]:
    """Ask all hosts; return the problems and notes that belong to none of them."""
    first = hosts[0]
    is_alone = len(hosts) == 1
    if is_alone and not is_this_machine(first.name.rpartition("@")[2]):
        first.is_gone = True
        return [
            f"{first.name}, the only host, is another machine than this one, and DeepSpeed starts the ranks of a "
            "single host here; run this and deepspeed there"
        ], []
    # DeepSpeed asks so, without pdsh's options, whom the ranks shall meet; of this machine, too.
    asked = asyncio.create_task(
        output_of(["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "--", first.name, "hostname", "-I"], 15)
    )
    quiet = asyncio.create_task(_without_keepalive(hosts))
    visits = {host.name: Visit(host.name, by_ssh=not is_alone, environment=launch.environment) for host in hosts}
    try:
        notes = await _ask(hosts, visits, launch, asked)
    finally:
        await asyncio.gather(*(visit.close() for visit in visits.values()))
    problems = []
    code, printed, said = await asked
    if code != 0 or not printed.split():
        reason = explain(code, said.strip() or "it prints no address", first.name)
        way_out = "; or launch without --hostfile" if is_alone else ""
        if not first.is_gone:
            problems.append(f"DeepSpeed finds no master address by ssh {first.name} hostname -I: {reason}{way_out}")
    silent = await quiet
    if silent and not is_alone:
        notes.append(
            f"without ssh keepalives a launch notices after minutes that {', '.join(silent[:4])} "
            f"{'are' if len(silent) > 1 else 'is'} cut off; {KEEPALIVE}"
        )
    if all(not host.facts["devices"]["gpus"] for host in hosts if "devices" in host.facts):
        notes.append("torch sees no GPU: the ranks train on the CPU")
    return problems, notes


async def _ask(
    hosts: Sequence[Host], visits: Mapping[str, Visit], launch: Launch, asked: "asyncio.Task[tuple[int, str, str]]"
) -> list[str]:
    """Fill the hosts' facts, in steps that all hosts take together; return notes."""
    first, nonce = hosts[0], secrets.token_hex(8)

    async def learn(host: Host, question: str, seconds: float, why: str, **parameters: Any) -> None:
        try:
            host.facts[question] = await visits[host.name].ask(question, seconds, **parameters)
        except AnswerError as error:
            host.problems.append(why.format(str(error).splitlines()[0]))

    async def together(step: Callable[[Host], Awaitable[None]]) -> None:
        async def guarded(host: Host) -> None:
            try:
                await step(host)
            except VisitError as error:
                host.problems.append(str(error))
                host.is_gone = True

        await asyncio.gather(*(guarded(host) for host in hosts if not host.is_gone))

    async def arrive(host: Host) -> None:
        await visits[host.name].open()
        before = time.time()
        await learn(host, "clock", ANSWER_SECONDS, "{}")
        host.facts["clock"] -= (before + time.time()) / 2
        await learn(host, "checkout", ANSWER_SECONDS, "its code or config cannot be read: {}", config=launch.config)
        await learn(host, "network", ANSWER_SECONDS, "{}; name one of them in .deepspeed_env")
        if host is first:
            why = f"port {launch.port}: {{}}; end what listens there, or launch with deepspeed --master_port"
            await learn(host, "take_port", ANSWER_SECONDS, why, port=launch.port)
        why = f"cannot write to {launch.output}: {{}}; mend it, or name another --output"
        number = hosts.index(host)
        await learn(host, "write_token", ANSWER_SECONDS, why, output=launch.output, nonce=nonce, number=number)

    async def look(host: Host) -> None:
        if host in wrote:
            numbers = [hosts.index(other) for other in wrote]
            await learn(host, "unseen", ANSWER_SECONDS, "{}", nonce=nonce, numbers=numbers)
            host.facts["unseen"] = [hosts[number].name for number in host.facts.get("unseen", [])]

    async def work(host: Host) -> None:
        await learn(host, "remove_token", ANSWER_SECONDS, "cannot remove what it wrote to the output folder: {}")
        why = "torch or DeepSpeed does not start: {}; mend the environment"
        await learn(host, "devices", IMPORT_SECONDS, why, precision=launch.precision)
        if launch.data is not None:
            await learn(host, "data", DATA_SECONDS, "{} (--data)", folder=launch.data)

    await together(arrive)
    wrote = [host for host in hosts if "write_token" in host.facts]
    await together(look)
    await together(work)

    members = [host for host in hosts if "devices" in host.facts and not host.is_gone]
    address = next(iter((await asked)[1].split()), None)
    if len(hosts) == 1:
        return []
    if (
        first not in members
        or len(members) < 2
        or address is None
        or "take_port" not in first.facts
        or any(is_loopback(host.facts.get("network", {}).get("address", "lo")) for host in members)
    ):
        return ["the round trip between the hosts was not tried; it comes when the problems above are solved"]

    async def meet(host: Host) -> None:
        if host in members:
            why = "{}; open all ports between the hosts, or launch with --master_addr or GLOO_SOCKET_IFNAME"
            rank, world_size = members.index(host), len(members)
            parameters = {"address": address, "port": launch.port, "rank": rank, "world_size": world_size}
            await learn(host, "exchange", EXCHANGE_SECONDS, why, **parameters)

    await together(meet)
    for host in members:
        _name_partners(host, members, f"{address}:{launch.port}")
    return []


def _name_partners(host: Host, members: Sequence[Host], meeting_place: str) -> None:
    """Put names for numbers into the answers to "exchange", and blame those who did not come."""
    answer = host.facts.pop("exchange", None)
    if answer is None:
        return
    if answer["missing"]:
        for number in answer["missing"]:
            if not members[number].problems:
                members[number].problems.append(f"it did not come to {meeting_place}; open all ports between the hosts")
        return
    for key in ("latency_with", "bandwidth_with"):
        answer[key] = members[answer[key]].name
    host.facts["exchange"] = answer


async def _without_keepalive(hosts: Sequence[Host]) -> list[str]:
    """The hosts at which ssh would wait for a lost connection for as long as TCP does, or nearly."""

    async def interval(host: Host) -> int:
        _, printed, _ = await output_of(["ssh", "-G", *ssh_options(), "--", host.name], 5)
        settings = dict(line.partition(" ")[::2] for line in printed.splitlines())
        # Debian's ssh takes 300 under BatchMode.
        return int(settings.get("serveraliveinterval", KEEPALIVE_LIMIT_SECONDS))

    intervals = await asyncio.gather(*map(interval, hosts))
    return [
        host.name for host, seconds in zip(hosts, intervals, strict=True) if not 0 < seconds <= KEEPALIVE_LIMIT_SECONDS
    ]
