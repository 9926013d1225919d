"""The process that ``python -m recipe hosts`` starts on each host; it answers the questions that it reads from stdin.

A question is a line with a JSON object: the name of a function in ``QUESTIONS`` and its arguments. The answer is a line
of stdout that begins with ``MARK``, whatever else a login or a library prints there. The probe ends when stdin does.
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
LIFETIME_SECONDS = 300  # after which the probe ends, whatever happens to the host that asks
REACH_SECONDS = 3
GROUP_SECONDS = 10  # for which the hosts wait for each other
LATENCY_BYTES, LATENCY_ROUNDS = 8, 9
BANDWIDTH_BYTES, BANDWIDTH_ROUNDS = 4 * 2**20, 2

# Sockets and stores to which other hosts connect until the probe ends.
kept_open: list[Any] = []
tokens: list[Path] = []


def ready(environment: Mapping[str, str]) -> None:
    """Take the variables that DeepSpeed will pass to the ranks."""
    os.environ.update(environment)


def clock() -> float:
    """Seconds on this host's clock."""
    return time.time()


def checkout(config: str | None) -> dict[str, Any]:
    """The code that this host would run, and the config's digest."""
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
    """The machine's identity, and the address at which gloo listens, with a port that is open there."""
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
    """The address that torch's ProcessGroupGloo takes: the named interface's, or what the host's name resolves to."""
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
    """Leave a small file where the output will be, from which other hosts see that they share the file system.

    It lies in the output folder, or in the nearest one above that exists.
    """
    folder = next(folder for folder in (Path(output), *Path(output).absolute().parents) if folder.exists())
    tokens.append(folder / f".hosts-{nonce}-{name}")
    tokens[0].write_text(nonce, encoding="utf-8")


def unseen(nonce: str, name: str) -> str | None:
    """The other host's name, if its token is not beside this host's. Not listed, since NFS may know an old listing."""
    return None if tokens[0].with_name(f".hosts-{nonce}-{name}").exists() else name


def remove_token() -> None:
    """Remove this host's token, if there is one."""
    while tokens:
        tokens.pop().unlink(missing_ok=True)


def devices(precision: str) -> dict[str, Any]:
    """The GPUs that torch sees, and whether DeepSpeed trains in the precision on them, or on this CPU."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    return {"gpus": gpus, "knows_precision": precision not in supported or bool(supported[precision]())}


def data(
    folder: str,
    source: Literal["imagefolder", "pack", "huggingface"] | None = None,
    **special: Any,
) -> dict[str, Any]:
    """Count the images as a run does; without a config the folder's content decides what it is.

    ``special`` are the last arguments of ``open_datasets``.
    """
    from recipe.data import HEADER, open_datasets, recognise

    source = source or recognise(folder)
    train, validation = open_datasets(source, folder, 8, "none", False, 0, "stop", **special)
    counts = {"classes": train.classes, "train_images": len(train), "validation_images": len(validation)}
    # The header holds the SHA-256 of every file.
    pack = {"pack": hashlib.sha256(Path(folder, HEADER).read_bytes()).hexdigest()} if source == "pack" else {}
    return counts | pack


def unreached(networks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The hosts that this one cannot connect to, at the address and port that they found for ``network``."""

    def is_shut(host: str) -> bool:
        try:
            socket.create_connection((networks[host]["address"], networks[host]["port"]), REACH_SECONDS).close()
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(max_workers=32) as pool:
        return [host for host, shut in zip(networks, pool.map(is_shut, networks), strict=True) if shut]


def exchange(address: str, port: int, rank: int, hosts: Sequence[str]) -> dict[str, Any]:
    """Meet the other hosts as ranks do and exchange messages with each: latency and bandwidth of the slowest pair.

    If some do not come, only their names: ``missing``.
    """
    import torch.distributed as dist

    timeout, world_size = timedelta(seconds=GROUP_SECONDS), len(hosts)
    try:
        store = dist.TCPStore(address, port, None, rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise ConnectionError(f"does not reach {address}:{port} on the first host") from error
    kept_open.append(store)
    store.set(f"here/{rank}", "")
    try:
        store.wait([f"here/{other}" for other in range(world_size)])
    except dist.DistError:
        return {"missing": [host for other, host in enumerate(hosts) if not store.check([f"here/{other}"])]}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    latency, bandwidth = [], []
    for distance in range(1, world_size):
        ahead, behind = (rank + distance) % world_size, (rank - distance) % world_size
        seconds = _round_trip_seconds(ahead, behind, LATENCY_BYTES, LATENCY_ROUNDS)
        latency.append((seconds * 1000, hosts[ahead]))
        seconds = _round_trip_seconds(ahead, behind, BANDWIDTH_BYTES, BANDWIDTH_ROUNDS)
        bandwidth.append((2 * BANDWIDTH_BYTES / seconds, hosts[ahead]))
    dist.barrier()
    found = dict(zip(("latency_ms", "latency_with"), max(latency), strict=True))
    return found | dict(zip(("bytes_per_second", "bandwidth_with"), min(bandwidth), strict=True))


def _round_trip_seconds(ahead: int, behind: int, size_bytes: int, rounds: int) -> float:
    """The median time of a message to the rank ahead and one back from it, while all ranks do the same."""
    import torch
    import torch.distributed as dist

    message = torch.zeros(size_bytes, dtype=torch.uint8)
    received = torch.empty_like(message)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        for receiver, sender in ((ahead, behind), (behind, ahead)):
            # The receive is posted first: on the way to the same rank its readiness would queue behind the message.
            for work in (dist.irecv(received, sender), dist.isend(message, receiver)):
                assert work is not None
                work.wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median_high(seconds)


_REACH = "open all ports between the hosts, or launch with --master_addr or GLOO_SOCKET_IFNAME"
_PORT = "end what listens there, or launch with deepspeed --master_port and check with --port"
_OUTPUT = "fix it, or name another --output"
# What can be asked: the seconds for an answer, and what to report with an error: the trouble and its remedy.
QUESTIONS: dict[Callable[..., Any], tuple[int, str, str]] = {
    ready: (30, "its probe does not start", "try it by hand"),  # the login, and Python from a cold or distant disk
    clock: (15, "its clock cannot be read", "fix it"),
    checkout: (15, "its code or config cannot be read", "fix it, or copy it there"),
    network: (15, "its address", "name one of them in .deepspeed_env"),
    take_port: (15, "port {port}", _PORT),
    write_token: (15, "cannot write to {output}", _OUTPUT),
    unseen: (15, "cannot read {output}", _OUTPUT),
    remove_token: (15, "cannot remove its .hosts-… from {output}", "remove it by hand"),
    # torch and DeepSpeed are imported, maybe from a cold or distant disk
    devices: (60, "torch or DeepSpeed does not start", "repair the environment"),
    data: (60, "the data", "fix the folder, or name another --data"),
    unreached: (15, "the other hosts", _REACH),
    exchange: (90, "the round trip", _REACH),  # 32 hosts at 100 Mbit/s need half of it
}


def main() -> None:
    """Answer until stdin ends."""
    # Through ``finally``, which the signal's default would skip.
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("the host that asked is gone"))
    signal.alarm(LIFETIME_SECONDS)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    # An answer may wait for a disk or a host that hangs; the end must not.
    threading.Thread(target=_answer, args=(waiting,), daemon=True).start()
    try:
        for line in sys.stdin:
            waiting.put(line)
    finally:
        remove_token()
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
