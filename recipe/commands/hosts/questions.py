"""Asks the hosts of a launch, all at once, step by step, what ``python -m recipe hosts`` compares."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.commands.hosts.report import Host, is_loopback
from recipe.commands.hosts.visit import AnswerError, Visit, VisitError, explain, output_of, ssh_options
from recipe.distributed import is_this_machine

ANSWER_SECONDS = 15
IMPORT_SECONDS = 60  # torch and DeepSpeed from a cold or distant disk
DATA_SECONDS = 60
EXCHANGE_SECONDS = 90  # 32 hosts at 100 Mbit/s need half of it
KEEPALIVE_LIMIT_SECONDS = 60
REACH_REMEDY = "open all ports between the hosts, or launch with --master_addr or GLOO_SOCKET_IFNAME"
KEEPALIVE = 'export PDSH_SSH_ARGS_APPEND="-tt -o ServerAliveInterval=5 -o ServerAliveCountMax=3"'


@dataclass(frozen=True)
class Launch:
    """The launch that is asked about."""

    config: str | None
    precision: str
    source: str | None
    pack_short_side: int | None
    data: str | None
    expected_data: Mapping[str, int | None]
    output: str
    port: int
    environment: Mapping[str, str]


async def examine(hosts: Sequence[Host], launch: Launch) -> tuple[list[str], list[str]]:
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
    if (code != 0 or not printed.split()) and not first.is_gone:
        said = said.strip() or "it prints no address"
        reason = explain(code, said, first.name)
        if is_alone:
            reason = (
                f"{said.splitlines()[-1]}; it is this machine, which needs no ssh: launch by deepspeed --num_gpus "
                f"{first.slots} instead of --hostfile"
            )
        problems.append(f"DeepSpeed finds no master address by ssh {first.name} hostname -I: {reason}")
    silent = await quiet
    if silent and not is_alone:
        notes.append(
            f"without ssh keepalives a launch notices after minutes that {', '.join(silent[:4])} "
            f"{'are' if len(silent) > 1 else 'is'} cut off; {KEEPALIVE}"
        )
    devices = [host.facts["devices"] for host in hosts if "devices" in host.facts]
    if devices and not any(found["gpus"] for found in devices):
        notes.append("torch sees no GPU: the ranks train on the CPU")
    return problems, notes


async def _ask(
    hosts: Sequence[Host], visits: Mapping[str, Visit], launch: Launch, asked: "asyncio.Task[tuple[int, str, str]]"
) -> list[str]:
    """Fill the hosts' facts, in steps that all hosts take together; return notes."""
    first, nonce = hosts[0], secrets.token_hex(8)

    async def learn(
        host: Host, question: str, seconds: float, trouble: str = "", remedy: str = "", **parameters: Any
    ) -> None:
        try:
            host.facts[question] = await visits[host.name].ask(question, seconds, **parameters)
        except AnswerError as error:
            host.problems.append(f"{trouble}: {str(error).splitlines()[0]}; {remedy}")

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
        await learn(host, "clock", ANSWER_SECONDS)
        host.facts["clock"] -= (before + time.time()) / 2
        trouble = "its code or config cannot be read"
        await learn(host, "checkout", ANSWER_SECONDS, trouble, "mend it, or copy it there", config=launch.config)
        await learn(host, "network", ANSWER_SECONDS, "its address", "name one of them in .deepspeed_env")
        if host is first:
            remedy = "end what listens there, or launch with deepspeed --master_port and check with --port"
            await learn(host, "take_port", ANSWER_SECONDS, f"port {launch.port}", remedy, port=launch.port)
        trouble, number = f"cannot write to {launch.output}", hosts.index(host)
        parameters = {"output": launch.output, "nonce": nonce, "number": number}
        await learn(host, "write_token", ANSWER_SECONDS, trouble, "mend it, or name another --output", **parameters)

    async def look(host: Host) -> None:
        if host in wrote:
            numbers = [hosts.index(other) for other in wrote]
            trouble, remedy = f"cannot read {launch.output}", "mend it, or name another --output"
            await learn(host, "unseen", ANSWER_SECONDS, trouble, remedy, nonce=nonce, numbers=numbers)
            host.facts["unseen"] = [hosts[number].name for number in host.facts.get("unseen", [])]

    async def work(host: Host) -> None:
        trouble = f"cannot remove its .hosts-… from {launch.output}"
        await learn(host, "remove_token", ANSWER_SECONDS, trouble, "remove it by hand")
        trouble, remedy = "torch or DeepSpeed does not start", "mend the environment"
        await learn(host, "devices", IMPORT_SECONDS, trouble, remedy, precision=launch.precision)
        if launch.data is not None:
            remedy = "mend the folder, or name another --data"
            asked = {"folder": launch.data, "source": launch.source, "pack_short_side": launch.pack_short_side}
            await learn(host, "data", DATA_SECONDS, "the data", remedy, **asked)

    await together(arrive)
    wrote = [host for host in hosts if "write_token" in host.facts]
    await together(look)
    await together(work)

    members = [host for host in hosts if "devices" in host.facts and not host.is_gone]
    address = next(iter((await asked)[1].split()), None)
    if len(hosts) == 1:
        return []
    networks = {host.name: host.facts["network"] for host in members if "network" in host.facts}
    doors = {name: (network["address"], network["port"]) for name, network in networks.items()}
    not_tried = ["the round trip between the hosts was not tried; it comes when the problems above are solved"]
    if len(doors) < len(members) or any(is_loopback(address) for address, _ in doors.values()):
        return not_tried

    async def reach(host: Host) -> None:
        if host in members:
            others = {name: door for name, door in doors.items() if name != host.name}
            await learn(host, "unreached", ANSWER_SECONDS, "the other hosts", REACH_REMEDY, doors=others)

    await together(reach)
    members = [host for host in members if not host.is_gone]
    is_open = all(host.facts.get("unreached") == [] for host in members)
    if first not in members or len(members) < 2 or address is None or "take_port" not in first.facts or not is_open:
        return not_tried

    async def meet(host: Host) -> None:
        if host in members:
            rank, world_size = members.index(host), len(members)
            parameters = {"address": address, "port": launch.port, "rank": rank, "world_size": world_size}
            await learn(host, "exchange", EXCHANGE_SECONDS, "the round trip", REACH_REMEDY, **parameters)

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
