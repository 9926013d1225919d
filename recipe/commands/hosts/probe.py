"""What ``python -m recipe hosts`` starts on each host: answers the questions that come on its stdin, a line each.

A question is a JSON object with the name of a function below and its arguments. An answer is a line of stdout that
begins with ``MARK``, whatever else a login or a library prints there. The probe ends with its stdin.
"""

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from recipe.commands.hosts.network import exchange, network, take_port, unreached
from recipe.distributed import code_sha256, versions

MARK = "recipe-hosts: "
# Whatever happens to the host that asks, nothing is left on this one after this time.
LIFETIME_SECONDS = 300


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


def data(folder: str, source: str | None, pack_short_side: int | None = None) -> dict[str, Any]:
    """Count an imagefolder or a pack as a run does; without a config the folder tells which it is."""
    from recipe.data import HEADER, open_datasets

    is_pack = source == "pack" or (source is None and Path(folder, HEADER).is_file())
    train, validation = open_datasets(
        "pack" if is_pack else "imagefolder",
        folder,
        8,
        crop="none",
        flip=False,
        seed=0,
        on_bad_image="stop",
        pack_short_side=pack_short_side,
    )
    counted = {"classes": train.classes, "train_images": len(train), "validation_images": len(validation)}
    # Its header has the SHA-256 of every file.
    return counted | ({"pack": hashlib.sha256(Path(folder, HEADER).read_bytes()).hexdigest()} if is_pack else {})


QUESTIONS: dict[str, Callable[..., Any]] = {
    "clock": clock,
    "checkout": checkout,
    "network": network,
    "take_port": take_port,
    "unreached": unreached,
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
