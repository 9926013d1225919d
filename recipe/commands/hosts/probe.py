"""The process that ``python -m recipe hosts`` starts on each host, to answer questions read from stdin.

A question is a line of JSON: the name of a function in ``QUESTIONS`` and its arguments. An answer is a line of stdout
that begins with ``MARK``; a login or a library may print others. The probe ends when stdin does.
"""

import hashlib
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from recipe.distributed import code_sha256, versions

MARK = "recipe-hosts: "  # begins each answer
LIFETIME_SECONDS = 300  # then the probe ends, even if the host that asks is cut off
REACH_SECONDS = 3
GROUP_SECONDS = 10  # how long the hosts wait for each other
LATENCY_BYTES, LATENCY_ROUNDS = 8, 9
BANDWIDTH_BYTES, BANDWIDTH_ROUNDS = 4 * 2**20, 2

# Sockets and stores that other hosts connect to until the probe ends.
kept_open: list[Any] = []
tokens: list[Path] = []


def ready(environment: Mapping[str, str]) -> None:
    """Set the variables that DeepSpeed will pass to the ranks."""
    os.environ.update(environment)


def clock() -> float:
    """Seconds on this host's clock."""
    return time.time()


def checkout(config: str | None) -> dict[str, Any]:
    """The code and the package versions that this host would run, and the config's digest."""
    try:
        words = ("git", "rev-parse", "--short=8", "HEAD")
        commit = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "versions": versions(),
        "code_sha256": code_sha256(),
        "commit": commit,
        "config_sha256": config and hashlib.sha256(Path(config).read_bytes()).hexdigest(),
    }


def network() -> dict[str, Any]:
    """The machine's identity, the address at which gloo would listen, and a port that this probe has opened there."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    address = _gloo_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=1024)
    kept_open.append(listener)
    return {
        "machine": f"{boot} {os.stat('/proc/self/ns/net').st_ino}",
        "address": address,
        "port": listener.getsockname()[1],
    }


def _gloo_address() -> str:
    """The address that torch's ProcessGroupGloo binds to: the named interface's, or that of the host's name."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]:
        addresses = psutil.net_if_addrs()
        for found in addresses.get(interface, []):
            if found.family == socket.AF_INET:
                return found.address
        problem = f"GLOO_SOCKET_IFNAME names {interface}, which has no IPv4 address"
        raise ValueError(f"{problem}; the interfaces are {', '.join(sorted(addresses))}")
    with suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with socket.socket(family, socket.SOCK_STREAM) as bound, suppress(OSError):
                bound.bind(address)
                return str(address[0])
    return "127.0.0.1"  # gloo's fallback


def take_port(port: int) -> None:
    """Raise OSError if rank 0 could not listen at the port."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        raise OSError(os.strerror(error.errno or 0)) from None


def write_token(output: str, nonce: str, name: str) -> None:
    """Write a small file into the output folder, or its nearest parent that exists, for the other hosts to look for."""
    folder = next(folder for folder in (Path(output), *Path(output).absolute().parents) if folder.exists())
    tokens.append(folder / f".hosts-{nonce}-{name}")
    tokens[0].write_text(nonce, encoding="utf-8")


def unseen(nonce: str, name: str) -> str | None:
    """The other host's name, unless its token is beside this host's. NFS may cache a listing: the file is looked up."""
    return None if tokens[0].with_name(f".hosts-{nonce}-{name}").exists() else name


def devices(precision: str) -> dict[str, Any]:
    """The GPUs that torch sees, and whether they, or the CPU without any, support the precision."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    return {"gpus": gpus, "knows_precision": precision not in supported or bool(supported[precision]())}


def data(
    folder: str, source: Literal["imagefolder", "pack", "huggingface"] | None = None, **options: Any
) -> dict[str, Any]:
    """Count the classes and images as a run does; without a ``source`` it is recognised by the folder's content."""
    from recipe.data import HEADER, open_datasets, recognise

    source = source or recognise(folder)
    train, validation = open_datasets(source, folder, image_size=8, crop="none", flip=False, seed=0, **options)
    counts = {"classes": train.classes, "train_images": len(train), "validation_images": len(validation)}
    # The header has the SHA-256 of every file.
    pack = {"pack": hashlib.sha256(Path(folder, HEADER).read_bytes()).hexdigest()} if source == "pack" else {}
    return counts | pack


def unreached(networks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The hosts that this one cannot connect to at the address and port of their ``network``."""

    def is_open(host: str) -> bool:
        with suppress(OSError):
            socket.create_connection((networks[host]["address"], networks[host]["port"]), REACH_SECONDS).close()
            return True
        return False

    with ThreadPoolExecutor(max_workers=32) as pool:
        return [host for host, opened in zip(networks, pool.map(is_open, networks), strict=True) if not opened]


def exchange(address: str, port: int, rank: int, hosts: Sequence[str]) -> dict[str, Any]:
    """Rendezvous as ranks do, exchange messages with each host, and return the slowest round trip and bandwidth.

    If some hosts do not arrive, return only their names, as ``missing``.
    """
    import torch.distributed as dist

    timeout, world_size = timedelta(seconds=GROUP_SECONDS), len(hosts)
    try:
        store = dist.TCPStore(address, port, None, rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise ConnectionError(f"cannot reach {address}:{port} on the first host") from error
    kept_open.append(store)
    store.set(f"here/{rank}", "")
    try:
        store.wait([f"here/{other}" for other in range(world_size)])
    except dist.DistError:
        return {"missing": [host for other, host in enumerate(hosts) if not store.check([f"here/{other}"])]}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    latency, bandwidth = [], []  # in seconds per round trip, with the other host
    for distance in range(1, world_size):
        ahead, behind = (rank + distance) % world_size, (rank - distance) % world_size
        latency.append((_round_trip_seconds(ahead, behind, LATENCY_BYTES, LATENCY_ROUNDS), hosts[ahead]))
        bandwidth.append((_round_trip_seconds(ahead, behind, BANDWIDTH_BYTES, BANDWIDTH_ROUNDS), hosts[ahead]))
    dist.barrier()
    (slowest, slowest_host), (longest, longest_host) = max(latency), max(bandwidth)
    gigabits = 2 * BANDWIDTH_BYTES * 8 / 1e9
    return {
        "slowest_round_trip": f"{slowest * 1000:.2f} ms to {slowest_host}",
        "lowest_bandwidth": f"{gigabits / longest:.3g} Gbit/s to {longest_host}",
    }


def _round_trip_seconds(ahead: int, behind: int, size_bytes: int, rounds: int) -> float:
    """The median time to send a message to the rank ahead and get one back, while all ranks do the same."""
    import torch
    import torch.distributed as dist

    message = torch.zeros(size_bytes, dtype=torch.uint8)
    received = torch.empty_like(message)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        for receiver, sender in ((ahead, behind), (behind, ahead)):
            # The receive is posted first: its readiness would queue behind a message to the same rank.
            for work in (dist.irecv(received, sender), dist.isend(message, receiver)):
                assert work is not None
                work.wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median_high(seconds)


_REACH = "open all ports between the hosts, or launch with --master_addr or GLOO_SOCKET_IFNAME"
_PORT = "stop what listens there, or launch with deepspeed --master_port and check with --port"
_OUTPUT = "fix it, or name another --output"
# For each question the seconds to answer it, and how an error is reported: the problem and its remedy.
QUESTIONS: dict[Callable[..., Any], tuple[int, str, str]] = {
    ready: (30, "its probe does not start", "try it by hand"),  # the login, and Python from a cold or distant disk
    clock: (15, "its clock cannot be read", "fix it"),
    checkout: (15, "its code or config cannot be read", "fix it, or copy it there"),
    network: (15, "its address", "name one of them in .deepspeed_env"),
    take_port: (15, "port {port}", _PORT),
    write_token: (15, "cannot write to {output}", _OUTPUT),
    unseen: (15, "cannot read {output}", _OUTPUT),
    # torch and DeepSpeed are imported, maybe from a cold or distant disk
    devices: (60, "torch or DeepSpeed does not start", "repair the environment"),
    data: (60, "the data", "fix the folder, or name another --data"),
    unreached: (15, "the other hosts", _REACH),
    exchange: (90, "the round trip", _REACH),  # 32 hosts at 100 Mbit/s need half of it
}


def main() -> None:
    """Answer questions until stdin ends."""
    # An exit runs ``finally``, which the signal's default would skip.
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("the host that asked is gone"))
    signal.alarm(LIFETIME_SECONDS)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    # An answer may wait for a disk or a host that hangs; the end of stdin is handled at once all the same.
    threading.Thread(target=_answer, args=(waiting,), daemon=True).start()
    try:
        for line in sys.stdin:
            waiting.put(line)
    finally:
        for token in tokens:
            with suppress(OSError):
                token.unlink()
        sys.stdout.flush()
        os._exit(0)


def _answer(waiting: "queue.SimpleQueue[str]") -> None:
    functions = {function.__name__: function for function in QUESTIONS}
    while True:
        question = json.loads(waiting.get())
        try:
            answer = {"answer": functions[question.pop("question")](**question)}
        except Exception as error:
            answer = {"error": (str(error) or type(error).__name__).splitlines()[0]}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
