"""How the ranks of a launch meet: each says what it would train, and all go on, or none does and one says why.

They meet at the store of torch's rendezvous, before there is a process group: ranks that hold other files, other
versions or another device, or of which one has found something wrong, would hang in the group's first collective.
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
    """A rank refuses the run, or the ranks would train different things; the same message on all of them."""


@dataclass(frozen=True)
class Facts:
    """What a rank brings along.

    ``refusal`` is what it has found wrong, ``checkpoint`` the newest in the output folder or "none", ``data`` how many
    images it would take; digests are those of texts.
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
    """Where the ranks have met: ``hosts`` has the name of each rank's host; ``name`` is this meeting's alone."""

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
    """Why the ranks must not train together, or None. The lowest rank that objects is heard, then what differs."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other.refusal is not None:
            where = "" if rank == 0 else f"rank {rank} on {other.host}: "
            return where + other.refusal
    for rank, other in enumerate(everyone):
        pair = f"rank {rank} on {other.host} and rank 0 on {first.host}"
        if other.code_sha256 != first.code_sha256:
            return f"{pair} run different code of recipe/; bring the checkouts to one state"
        if other.data != first.data:
            return f"{pair} would take {other.data} and {first.data}; give all hosts the same data and config"
        if other.config_sha256 != first.config_sha256:
            return f"{pair} read different configs; copy one file to all hosts"
        if other.versions != first.versions:
            return f"{pair} have different versions: {other.versions} and {first.versions}; install the same"
        if other.device != first.device:
            return (
                f"{pair} would train on {other.device} and {first.device}; check the GPUs and the drivers, or leave "
                "the host out of the hostfile"
            )
        if other.checkpoint != first.checkpoint:
            return (
                f"{pair} see different checkpoints in the output folder: {other.checkpoint} and {first.checkpoint}; "
                "name an --output that all hosts share"
            )
    return None


def _gather(own: Facts, hall: Store, rank: int, world_size: int, deadline: float) -> dict[str, Any]:
    """Rank 0's verdict on what the ranks brought along: ``name``, ``hosts``, ``objection`` and who is ``absent``."""
    # Rank 0 calls, and answers those who have heard it. A store may hold what an earlier launch left (torchrun's
    # outlives its ranks), and a rank of another run may come late, to a port that is taken: neither gets in.
    nonce = secrets.token_hex(8)
    if rank != 0:
        call = ""
        while not hall.check([f"verdict/{nonce}"]):
            # Rank 0, whose time is over first, says who has not come.
            _rest_until(deadline + FAREWELL_SECONDS, "rank 0 has not answered")
            if hall.check(["call"]) and (latest := hall.get("call").decode()) != call:
                call = latest
                hall.set(f"{call}/facts/{rank}", json.dumps({"nonce": nonce} | asdict(own)))
        verdict: dict[str, Any] = json.loads(hall.get(f"verdict/{nonce}"))
        hall.set(f"read/{nonce}", "")
        return verdict
    hall.set("call", nonce)
    hall.set(f"{nonce}/facts/0", json.dumps({"nonce": nonce} | asdict(own)))
    keys = [f"{nonce}/facts/{other}" for other in range(world_size)]
    absent = None
    while not hall.check(keys) and absent is None:
        try:
            missing = [other for other, key in enumerate(keys) if not hall.check([key])]
            _rest_until(deadline, f"{name_ranks(missing)} of {world_size} did not come")
        except MeetingError as error:
            absent = str(error)
    brought = [json.loads(hall.get(key)) for key in keys if hall.check([key])]
    nonces = [words.pop("nonce") for words in brought]
    everyone = [Facts(**words) for words in brought]
    verdict = {"name": nonce, "hosts": [other.host for other in everyone], "absent": absent}
    verdict["objection"] = objection_of(everyone)
    for other in nonces[1:]:
        hall.set(f"verdict/{other}", json.dumps(verdict))
    farewell = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < farewell and not hall.check([f"read/{other}" for other in nonces[1:]]):
        time.sleep(ASK_EVERY_SECONDS)
    return verdict


def _rest_until(deadline: float, problem: str) -> None:
    # Store.wait would not let a signal through.
    if time.monotonic() > deadline:
        raise MeetingError(
            f"{problem} at {_address()} in time; python -m recipe hosts HOSTFILE finds out why, or raise "
            "recipe.distributed.timeout_seconds where hosts start slowly"
        )
    time.sleep(ASK_EVERY_SECONDS)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def name_ranks(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str] | None = None) -> str:
    """Ranks for people: "rank 3 on node-1", "ranks 2, 3 on node-1" or, of more than eight, the first eight."""
    shown = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    named = f"rank{'s' if len(ranks) > 1 else ''} {shown}"
    if hosts is None:
        return named
    return f"{named} on {', '.join(dict.fromkeys(hosts[rank] for rank in ranks[:8]))}"
