"""The ranks' rendezvous: they compare what they are about to train, and either all of them train or none does.

It uses a store, before there is a process group: if ranks differ in files, versions or devices, or one of them refuses
the run, the group's first collective would hang.
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
FAREWELL_SECONDS = 5.0  # how long rank 0, whose process holds the store, waits for the others to read its verdict

Facts = dict[str, str]
"""A rank's report to the rendezvous: its ``host``, its ``refusal`` if it has one, and the keys of ``OBJECTIONS``."""

# The facts that must be equal on all ranks, in the order of comparison, and the objection if they are not.
OBJECTIONS = {
    "code": "run different code in recipe/; bring the checkouts to the same state",
    "data": "see different data: {other} and {first}; give all hosts the same data and config",
    "config": "read different configs; copy one file to all hosts",
    "versions": "have different versions: {other} and {first}; install the same",
    "device": "would train on {other} and {first}; check GPUs and drivers, or leave the host out",
    "checkpoint": "see different checkpoints in the output folder: {other} and {first}; share one --output",
}


class MeetingError(RuntimeError):
    """The rendezvous failed; the message gives its address and a likely cause."""


class DisagreementError(ValueError):
    """A rank refuses the run, or the ranks would train different things; all ranks get the same message."""


@dataclass(frozen=True)
class Meeting:
    """A successful rendezvous: ``hosts`` lists the host of each rank; ``name`` is unique to this rendezvous."""

    store: Store
    name: str
    rank: int
    hosts: tuple[str, ...]

    @property
    def group_store(self) -> Store:
        """A store for the process group's addresses: torchrun's own still holds those of an earlier launch."""
        return PrefixStore(f"group/{self.name}", self.store)


def own_facts(refusal: Exception | None, **facts: str) -> Facts:
    """This rank's facts for the rendezvous: ``facts`` about its run, by the keys of ``OBJECTIONS``, or its refusal."""
    own = {
        "host": socket.gethostname(),
        "code": code_sha256(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    return own | facts | ({} if refusal is None else {"refusal": str(refusal)})


def meet(own: Facts, timeout: timedelta) -> Meeting:
    """Rendezvous with the ranks that RANK, WORLD_SIZE, MASTER_ADDR … describe; without them this is the only rank.

    Raises:
        DisagreementError: a rank refuses, or the ranks' facts differ.
        MeetingError: the port is taken, or a rank does not arrive in time; those that did all say which.
    """
    _describe_single_rank()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store = open_store(timeout, holds_it=rank == 0)
        verdict = _gather(own, PrefixStore("meeting", store), rank, world_size, deadline)
    except DistError as error:
        cause = str(error).splitlines()[0]
        raise MeetingError(
            f"the rendezvous at {_address()} failed: {cause}; a second run on the same machine needs its own port: "
            "deepspeed --master_port 29501 …"
        ) from error
    if verdict["absent"] is not None:
        raise MeetingError(verdict["absent"])
    if verdict["objection"] is not None:
        raise DisagreementError(verdict["objection"])
    return Meeting(store, verdict["name"], rank, tuple(verdict["hosts"]))


def open_store(timeout: timedelta, holds_it: bool) -> Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT; ``holds_it`` creates it, unless torchrun's agent holds it."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=holds_it and not agents,
        timeout=timeout,
        wait_for_workers=False,
    )


def _describe_single_rank() -> None:
    """Without a launcher, as in ``python recipe/train.py …``, set the variables of a single rank on a free port."""
    if not os.environ.get("RANK"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def objection_of(everyone: Sequence[Facts]) -> str | None:
    """Why the ranks must not train together: the lowest rank's refusal, else the first difference; None if they may."""
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
    """Exchange facts; return rank 0's verdict: ``name``, ``hosts``, ``objection`` and a message on ``absent`` ranks."""
    # Rank 0 publishes a random call and answers the ranks that repeat it. That excludes keys that an earlier launch
    # left (torchrun's store outlives its ranks), and ranks of another run that use the same port by mistake.
    nonce = secrets.token_hex(8)
    if rank != 0:
        call = ""
        while not store.check([f"verdict/{nonce}"]):
            # Rank 0 gives up first, and says which rank is missing.
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
    verdict["absent"] = _late(f"{name_ranks(missing)} of {world_size} did not arrive") if missing else None
    verdict["objection"] = None if missing else objection_of(everyone)
    for other in nonces:
        store.set(f"verdict/{other}", json.dumps(verdict))
    _wait(store, [f"read/{other}" for other in nonces], FAREWELL_SECONDS)
    return verdict


def _wait(store: Store, keys: list[str], seconds: float) -> None:
    with suppress(DistError):  # a timeout
        store.wait(keys, timedelta(seconds=seconds))


def _late(problem: str) -> str:
    return (
        f"{problem} at {_address()} in time; python -m recipe hosts HOSTFILE finds out why; if hosts start slowly, "
        "raise recipe.distributed.timeout_seconds"
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def name_ranks(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str] | None = None) -> str:
    """Ranks in words: "rank 3 on node-1", "ranks 2, 3 on node-1"; of more than eight, only the first eight."""
    shown = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    named = f"rank{'s' if len(ranks) > 1 else ''} {shown}"
    if hosts is None:
        return named
    return f"{named} on {', '.join(dict.fromkeys(hosts[rank] for rank in ranks[:8]))}"
