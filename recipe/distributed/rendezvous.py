"""The ranks' rendezvous: they compare what they would train; either all train, or none does and one reports why.

It takes place at a store before there is a process group: ranks with other files, versions or devices, or of which one
has found something wrong, would hang in the group's first collective.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store

from recipe.distributed.code_state import code_sha256, versions

ASK_EVERY_SECONDS = 0.1
FAREWELL_SECONDS = 5.0  # for which rank 0, whose process holds the store, waits for the others to have read

Facts = dict[str, str]
"""What a rank brings to the rendezvous: its ``host``, the ``refusal`` if it has found something wrong, and the rest."""

# What must be the same on all ranks, in the order in which it is compared, and the objection where it is not.
OBJECTIONS = {
    "code": "run different code of recipe/; bring the checkouts to one state",
    "data": "would take {other} and {first}; give all hosts the same data and config",
    "config": "read different configs; copy one file to all hosts",
    "versions": "have different versions: {other} and {first}; install the same",
    "device": "would train on {other} and {first}; check the GPUs and the drivers, or leave the host out",
    "checkpoint": "see different checkpoints in the output folder: {other} and {first}; share one --output",
}


class MeetingError(RuntimeError):
    """The ranks could not meet; the message says where, and what may be the cause."""


class DisagreementError(ValueError):
    """A rank refuses the run, or the ranks would train different things; the message is the same on all."""


@dataclass(frozen=True)
class Meeting:
    """A rendezvous that succeeded: ``hosts`` has the name of each rank's host; ``name`` is unique to it."""

    store: Store
    name: str
    rank: int
    hosts: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.hosts)

    @property
    def group_store(self) -> Store:
        """Where the process group exchanges addresses; torchrun's store still holds those of ranks it has ended."""
        return PrefixStore(f"group/{self.name}", self.store)


def own_facts(refusal: Exception | None, **facts: str) -> Facts:
    """What this rank brings to the rendezvous: ``facts`` of its run, by the names in ``OBJECTIONS``, or its refusal."""
    own = {
        "host": socket.gethostname(),
        "code": code_sha256(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    return own | facts | ({} if refusal is None else {"refusal": str(refusal)})


def meet(own: Facts, timeout: timedelta) -> Meeting:
    """Meet the ranks of the environment (RANK, WORLD_SIZE, MASTER_ADDR …); without one there is a single rank.

    Raises:
        DisagreementError: a rank refuses, or they differ in what must be the same.
        MeetingError: the port is taken, or a rank does not come in time; all that have come say which.
    """
    use_an_own_address()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store = open_store(timeout, holds_it=rank == 0)
        verdict = _gather(own, PrefixStore("meeting", store), rank, world_size, deadline)
    except DistError as error:
        cause = str(error).splitlines()[0]
        raise MeetingError(
            f"the ranks could not meet at {_address()}: {cause}; a second run on a machine needs a port of its own: "
            "deepspeed --master_port 29501 …"
        ) from error
    if verdict["absent"] is not None:
        raise MeetingError(verdict["absent"])
    if verdict["objection"] is not None:
        raise DisagreementError(verdict["objection"])
    return Meeting(store, verdict["name"], rank, tuple(verdict["hosts"]))


def open_store(timeout: timedelta, holds_it: bool) -> Store:
    """A connection to the store at MASTER_ADDR and MASTER_PORT; ``holds_it`` makes it, unless torchrun's agent has."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=holds_it and not agents,
        timeout=timeout,
        wait_for_workers=False,
    )


def use_an_own_address() -> None:
    """Without a launcher's environment, as in ``python recipe/train.py …``, describe a launch of a single rank."""
    if not os.environ.get("RANK"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def objection_of(everyone: Sequence[Facts]) -> str | None:
    """Why the ranks must not train together: what the lowest rank refuses, else the first difference; or None."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if "refusal" in other:
            where = "" if rank == 0 else f"rank {rank} on {other['host']}: "
            return where + other["refusal"]
    for rank, other in enumerate(everyone):
        for name, objection in OBJECTIONS.items():
            if other.get(name) != first.get(name):
                differing = objection.format(other=other[name], first=first[name])
                return f"rank {rank} on {other['host']} and rank 0 on {first['host']} {differing}"
    return None


def _gather(own: Facts, store: Store, rank: int, world_size: int, deadline: float) -> dict[str, Any]:
    """Rank 0's verdict on what the ranks brought along: ``name``, ``hosts``, ``objection`` and who is ``absent``."""
    # Rank 0 calls, and answers those that have heard it. A store may hold what an earlier launch left (torchrun's
    # outlives its ranks), and a rank of another run may come late, to a port that is taken: neither gets in.
    nonce = secrets.token_hex(8)
    if rank != 0:
        call = ""
        while not store.check([f"verdict/{nonce}"]):
            # Rank 0, whose time is over first, says who has not come.
            if time.monotonic() > deadline + FAREWELL_SECONDS:
                raise MeetingError(_late("rank 0 has not answered"))
            time.sleep(ASK_EVERY_SECONDS)
            if store.check(["call"]) and (latest := store.get("call").decode()) != call:
                call = latest
                store.set(f"{call}/facts/{rank}", json.dumps({"nonce": nonce} | own))
        verdict: dict[str, Any] = json.loads(store.get(f"verdict/{nonce}"))
        store.set(f"read/{nonce}", "")
        return verdict
    store.set("call", nonce)
    keys = {other: f"{nonce}/facts/{other}" for other in range(1, world_size)}
    _wait(store, list(keys.values()), deadline - time.monotonic())
    brought = {other: json.loads(store.get(key)) for other, key in keys.items() if store.check([key])}
    missing = [other for other in keys if other not in brought]
    nonces = [facts.pop("nonce") for facts in brought.values()]
    everyone = [own, *brought.values()]
    verdict = {"name": nonce, "hosts": [other["host"] for other in everyone]}
    verdict["absent"] = _late(f"{name_ranks(missing)} of {world_size} did not come") if missing else None
    verdict["objection"] = None if missing else objection_of(everyone)
    for other in nonces:
        store.set(f"verdict/{other}", json.dumps(verdict))
    _wait(store, [f"read/{other}" for other in nonces], FAREWELL_SECONDS)
    return verdict


def _wait(store: Store, keys: list[str], seconds: float) -> None:
    with suppress(DistError):  # the time is over
        store.wait(keys, timedelta(seconds=seconds))


def _late(problem: str) -> str:
    return (
        f"{problem} at {_address()} in time; python -m recipe hosts HOSTFILE finds out why, or raise "
        "recipe.distributed.timeout_seconds where hosts start slowly"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def name_ranks(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str] | None = None) -> str:
    """Ranks in words: "rank 3 on node-1", "ranks 2, 3 on node-1" or, of more than eight, the first eight."""
    shown = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    named = f"rank{'s' if len(ranks) > 1 else ''} {shown}"
    if hosts is None:
        return named
    return f"{named} on {', '.join(dict.fromkeys(hosts[rank] for rank in ranks[:8]))}"
