"""How the hosts reach each other: what the probe on each of them finds out about addresses, ports and speed."""

import fcntl
import json
import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

SIOCGIFADDR = 0x8915  # of <linux/sockios.h>
REACH_SECONDS = 3
GROUP_SECONDS = 10  # for which the hosts wait for each other
LATENCY_BYTES, LATENCY_ROUNDS = 8, 9
BANDWIDTH_BYTES, BANDWIDTH_ROUNDS = 4 * 2**20, 2

# Other hosts come to these until the probe ends.
kept_open: list[Any] = []


def network() -> dict[str, Any]:
    """Which machine this is, and where gloo would have the other hosts look for it, with a port that is open there."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    address = _gloo_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.create_server((address, 0), family=family, backlog=1024)
    kept_open.append(door)
    return {
        "machine": f"{boot} {os.stat('/proc/self/ns/net').st_ino}",
        "address": address,
        "port": door.getsockname()[1],
    }


def _gloo_address() -> str:
    """As torch's ProcessGroupGloo chooses it: of the interface that is named, or what the own name resolves to."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
    if interfaces:
        return _address_of_interface(interfaces.partition(",")[0])
    try:
        resolved = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        resolved = []
    for family, _, _, _, address in resolved:
        with socket.socket(family, socket.SOCK_STREAM) as bound:
            try:
                bound.bind(address)
            except OSError:
                continue
        return str(address[0])
    return "127.0.0.1"  # where gloo goes if nothing else can be bound


def _address_of_interface(name: str) -> str:
    there = sorted(other for _, other in socket.if_nameindex())
    if name not in there:
        raise ValueError(f"GLOO_SOCKET_IFNAME names {name}, but the interfaces are {', '.join(there)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            raise ValueError(f"GLOO_SOCKET_IFNAME names {name}, which has no IPv4 address") from None
    return socket.inet_ntoa(answer[20:24])


def take_port(port: int) -> None:
    """Raise OSError if rank 0 could not listen at the port."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise OSError(os.strerror(error.errno or 0)) from None


def unreached(doors: dict[str, tuple[str, int]]) -> list[str]:
    """The hosts whose doors, their addresses and open ports, this one cannot come to."""

    def is_shut(door: tuple[str, int]) -> bool:
        address, port = door
        try:
            socket.create_connection((address, port), timeout=REACH_SECONDS).close()
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(max_workers=32) as pool:
        return [host for host, shut in zip(doors, pool.map(is_shut, doors.values()), strict=True) if shut]


def exchange(address: str, port: int, rank: int, world_size: int) -> dict[str, Any]:
    """Meet the other hosts as ranks do, and send messages to each: ``missing`` hosts, or how fast the worst pair is."""
    import torch.distributed as dist

    timeout = timedelta(seconds=GROUP_SECONDS)
    try:
        store = dist.TCPStore(address, port, None, rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise ConnectionError(f"does not reach {address}:{port} on the first host") from error
    kept_open.append(store)
    store.set(f"here/{rank}", "")
    if rank == 0:
        deadline = time.monotonic() + GROUP_SECONDS
        everyone = [f"here/{other}" for other in range(world_size)]
        while not store.check(everyone) and time.monotonic() < deadline:
            time.sleep(0.05)
        store.set("missing", json.dumps([other for other, key in enumerate(everyone) if not store.check([key])]))
    store.wait(["missing"], timeout + timedelta(seconds=5))
    missing = json.loads(store.get("missing"))
    if missing:
        return {"missing": missing}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    pairs = [
        (_round_trips(rank, distance, world_size), (rank + distance) % world_size) for distance in range(1, world_size)
    ]
    dist.barrier()
    (latency, slow), (bandwidth, narrow) = (
        max((times[0], other) for times, other in pairs),
        min((BANDWIDTH_BYTES / times[1], other) for times, other in pairs),
    )
    return {
        "missing": [],
        "latency_seconds": latency,
        "latency_with": slow,
        "bytes_per_second": bandwidth,
        "bandwidth_with": narrow,
    }


def _round_trips(rank: int, distance: int, world_size: int) -> tuple[float, float]:
    """Seconds of a small message to the host so far ahead and back, and of a large one there, while all do the same."""
    import torch
    import torch.distributed as dist

    ahead, behind = (rank + distance) % world_size, (rank - distance) % world_size

    def shift(buffer: torch.Tensor, to: int, source: int) -> torch.Tensor:
        received = torch.empty_like(buffer)
        # First what says that this rank is ready: on the way to the same rank it would queue behind the message.
        for work in (dist.irecv(received, source), dist.isend(buffer, to)):
            assert work is not None
            work.wait()
        return received

    def timed(size: int, rounds: int) -> float:
        seconds = []
        message = torch.zeros(size, dtype=torch.uint8)
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            shift(shift(message, ahead, behind), behind, ahead)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2]

    return timed(LATENCY_BYTES, LATENCY_ROUNDS), timed(BANDWIDTH_BYTES, BANDWIDTH_ROUNDS) / 2
