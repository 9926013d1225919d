"""What ``python -m recipe hosts`` starts on each host: answers the questions that come on its stdin, a line each.

A question is a JSON object with the name of a function below and its arguments. An answer is a line of stdout that
begins with ``MARK``, whatever else a login or a library prints there. The probe ends with its stdin.
"""

import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from recipe.code_state import code_sha256, versions

MARK = "recipe-hosts: "
# Whatever happens to the host that asks, nothing is left on this one after this time.
LIFETIME_SECONDS = 300

GROUP_SECONDS = 10  # for which the hosts wait for each other
LATENCY_BYTES, LATENCY_ROUNDS = 8, 9
BANDWIDTH_BYTES, BANDWIDTH_ROUNDS = 4 * 2**20, 2

# The first host's serves the others until the probe ends.
meeting_places: list[Any] = []


def clock() -> float:
    """Seconds of this host's clock."""
    return time.time()


def checkout(config: str | None) -> dict[str, Any]:
    """What code this host would run, on which config."""
    text = None if config is None else Path(config).read_bytes()
    return {
        "versions": versions(),
        "code_sha256": code_sha256(),
        "commit": _git("rev-parse", "--short=8", "HEAD"),
        "is_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "config_sha256": None if text is None else hashlib.sha256(text).hexdigest(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def network() -> dict[str, str]:
    """Which machine this is, and the address at which gloo would have the other hosts look for it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"machine": f"{boot} {os.stat('/proc/self/ns/net').st_ino}", "address": _gloo_address()}


def _gloo_address() -> str:
    """As torch's ProcessGroupGloo chooses it: of the interface that is named, or what the own name resolves to."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
    if interfaces:
        there = {name for _, name in socket.if_nameindex()}
        absent = [name for name in interfaces.split(",") if name not in there]
        if absent:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME names {', '.join(absent)}, but the interfaces are {', '.join(sorted(there))}"
            )
        return interfaces
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


def take_port(port: int) -> None:
    """Raise OSError if rank 0 could not listen at the port."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise OSError(os.strerror(error.errno or 0)) from None


class Token:
    """A small file in the place of the output, by which the hosts find out whether they share it."""

    own: Path | None = None

    @classmethod
    def write(cls, output: str, nonce: str, number: int) -> None:
        """Leave this host's token in the folder of the output, or in the nearest one above that is there."""
        folder = next(folder for folder in (Path(output), *Path(output).absolute().parents) if folder.exists())
        cls.own = folder / f".hosts-{nonce}-{number}"
        cls.own.write_text(nonce, encoding="utf-8")

    @classmethod
    def unseen(cls, nonce: str, numbers: list[int]) -> list[int]:
        """The hosts whose tokens this one does not see. Each name is looked up: NFS may know an old listing."""
        assert cls.own is not None
        return [number for number in numbers if not cls.own.with_name(f".hosts-{nonce}-{number}").exists()]

    @classmethod
    def remove(cls) -> None:
        """Remove this host's token, if there is one."""
        if cls.own is not None:
            cls.own.unlink(missing_ok=True)
            cls.own = None


def devices(precision: str) -> dict[str, Any]:
    """The GPUs that torch sees, and whether they, or this CPU, know the precision, by what DeepSpeed says."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    return {"gpus": gpus, "knows_precision": precision not in supported or bool(supported[precision]())}


def data(folder: str) -> dict[str, int]:
    """Count an imagefolder as a run does."""
    from recipe.data.imagefolder import open_imagefolder

    train, validation = open_imagefolder(folder, image_size=8, crop="none", flip=False, seed=0, on_bad_image="stop")
    return {"classes": train.classes, "train_images": len(train), "validation_images": len(validation)}


def exchange(address: str, port: int, rank: int, world_size: int) -> dict[str, Any]:
    """Meet the other hosts as ranks do, and send messages to each: ``missing`` hosts, or how fast the worst pair is."""
    import torch.distributed as dist

    timeout = timedelta(seconds=GROUP_SECONDS)
    try:
        store = dist.TCPStore(address, port, None, rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise ConnectionError(f"does not reach {address}:{port} on the first host") from error
    meeting_places.append(store)
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
        sent = dist.isend(buffer, to)
        dist.recv(received, source)
        assert sent is not None
        sent.wait()
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


QUESTIONS: dict[str, Callable[..., Any]] = {
    "clock": clock,
    "checkout": checkout,
    "network": network,
    "take_port": take_port,
    "write_token": Token.write,
    "unseen": Token.unseen,
    "remove_token": Token.remove,
    "devices": devices,
    "data": data,
    "exchange": exchange,
}


def say(answer: Any) -> None:
    """Write a line that the asking host finds."""
    print(MARK + json.dumps(answer), flush=True)


def answer(questions: "queue.SimpleQueue[str]") -> None:
    """Answer one question after the other."""
    while True:
        question = json.loads(questions.get())
        os.environ.update(question.pop("environment"))
        try:
            say({"answer": QUESTIONS[question.pop("ask")](**question)})
        except Exception as error:
            say({"error": str(error) or type(error).__name__})


def expire(signum: int, frame: FrameType | None) -> None:
    """End, through ``finally``."""
    sys.exit("the host that asked is gone")


def main() -> None:
    """Answer until nobody asks any more."""
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(LIFETIME_SECONDS)
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    # An answer may wait for a disk or a host that hangs; the end must not.
    threading.Thread(target=answer, args=(questions,), daemon=True).start()
    say("ready")
    try:
        for line in sys.stdin:
            questions.put(line)
    finally:
        Token.remove()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
