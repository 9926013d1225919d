"""The ranks' rendezvous: each brings what it would train; all train, or none does and one reports why.

It takes place at a store before there is a process group: ranks with other files, versions or devices, or of which one
has found something wrong, would hang in the group's first collective.
"""

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store

from recipe.distributed.code_state import code_sha256, versions

ASK_EVERY_SECONDS = 0.1
FAREWELL_SECONDS = 5.0  # for which rank 0, whose process holds the store, waits for the others to have read


class MeetingError(RuntimeError):
    """The ranks could not meet; the message says where, and what may be the cause."""


class DisagreementError(ValueError):
    """A rank refuses the run, or the ranks would train different things; the message is the same on all."""


@dataclass(frozen=True)
class Facts:
    """What a rank brings along; the digests are those of texts.

    ``refusal`` is what it has found wrong, ``checkpoint`` the newest in the output folder or "none", ``data`` how many
    images it would take.
    """

    host: str
    config_sha256: str
    code_sha256: str
    versions: str
    device: str
    checkpoint: str
    data: str = ""
    refusal: str | None = None


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


def own_facts(
    refusal: Exception | None, *, config: str = "", device: str = "", checkpoint: str = "none", data: str = ""
) -> Facts:
    """What this rank brings to the rendezvous: what of a run must be the same everywhere, or why it refuses."""
    return Facts(
        host=socket.gethostname(),
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        code_sha256=code_sha256(),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        device=device,
        checkpoint=checkpoint,
        data=data,
        refusal=None if refusal is None else str(refusal),
    )


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
        if other.refusal is not None:
            where = "" if rank == 0 else f"rank {rank} on {other.host}: "
            return where + other.refusal
    for rank, other in enumerate(everyone):
        objections = {
            "code_sha256": "run different code of recipe/; bring the checkouts to one state",
            "data": f"would take {other.data} and {first.data}; give all hosts the same data and config",
            "config_sha256": "read different configs; copy one file to all hosts",
            "versions": f"have different versions: {other.versions} and {first.versions}; install the same",
            "device": f"would train on {other.device} and {first.device}; check the GPUs and the drivers, or leave the "
            "host out of the hostfile",
            "checkpoint": f"see different checkpoints in the output folder: {other.checkpoint} and {first.checkpoint}; "
            "name an --output that all hosts share",
        }
        for name, objection in objections.items():
            if getattr(other, name) != getattr(first, name):
                return f"rank {rank} on {other.host} and rank 0 on {first.host} {objection}"
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
                store.set(f"{call}/facts/{rank}", json.dumps({"nonce": nonce} | asdict(own)))
        verdict: dict[str, Any] = json.loads(store.get(f"verdict/{nonce}"))
        store.set(f"read/{nonce}", "")
        return verdict
    store.set("call", nonce)
    brought = {0: asdict(own)}
    missing = list(range(1, world_size))
    while missing and time.monotonic() < deadline:
        time.sleep(ASK_EVERY_SECONDS)
        here = [other for other in missing if store.check([f"{nonce}/facts/{other}"])]
        brought |= {other: json.loads(store.get(f"{nonce}/facts/{other}")) for other in here}
        missing = [other for other in missing if other not in brought]
    nonces = [words.pop("nonce") for other, words in brought.items() if other != 0]
    everyone = [Facts(**words) for _, words in sorted(brought.items())]
    verdict = {"name": nonce, "hosts": [other.host for other in everyone], "objection": objection_of(everyone)}
    verdict["absent"] = _late(f"{name_ranks(missing)} of {world_size} did not come") if missing else None
    for other in nonces:
        store.set(f"verdict/{other}", json.dumps(verdict))
    farewell = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < farewell and not store.check([f"read/{other}" for other in nonces]):
        time.sleep(ASK_EVERY_SECONDS)
    return verdict


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
