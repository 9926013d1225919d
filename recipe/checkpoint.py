"""Save, find, verify, load and prune checkpoints.

A checkpoint is DeepSpeed's own folder, ``checkpoints/step-<steps done>/``, plus ``manifest.json`` with the size and
SHA-256 of every other file. It is written under another name and renamed when all of it is on the disk, so that what
bears the name is whole.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"

# What DeepSpeed pickles into the shards of ZeRO stages 1 to 3; plain tensors and containers suffice at stage 0.
ZERO_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it and says what is known of the cause."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written to its end: ``step`` updates done, ``top1`` in per cent if it was validated.

    ``files`` has the size in bytes and the SHA-256 of each file as it was written.
    """

    path: Path
    step: int
    top1: float | None
    files: dict[str, tuple[int, str]]


def save(engine: DeepSpeedEngine, folder: Path, top1: float | None, client_state: dict[str, Any]) -> Path:
    """Write the state of ``engine`` and ``client_state`` (plain values) below ``folder``; every rank calls this."""
    tag = f"step-{engine.global_steps:08d}"
    unfinished = folder / UNFINISHED
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(unfinished), tag=tag, client_state=client_state, save_latest=False)
        if dist.get_rank() == 0:
            _complete(unfinished / tag, engine.global_steps, top1)
            shutil.rmtree(folder / tag, ignore_errors=True)
            os.rename(unfinished / tag, folder / tag)
            _fsync(folder)
            # And with it the script that DeepSpeed adds for ZeRO shards: no code in checkpoints.
            shutil.rmtree(unfinished)
    except (OSError, RuntimeError) as error:
        # torch says of a full disk only that it is at an unexpected position.
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{folder / tag} could not be written, with {free / 2**20:,.0f} MiB free on its disk: {error}"
        ) from error
    dist.barrier()
    return folder / tag


def _complete(written: Path, step: int, top1: float | None) -> None:
    """Add the manifest, and have all of it on the disk."""
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    manifest = {"step": step, "top1": top1, "files": files}
    (written / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _fsync(path)


def find(folder: Path) -> list[Checkpoint]:
    """The checkpoints below ``folder`` that have a manifest, the newest first; their files are not looked at."""
    found = []
    for path in folder.glob(f"step-*/{MANIFEST}"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            step, top1, files = manifest["step"], manifest["top1"], manifest["files"]
            sums = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
            top1 = None if top1 is None else float(top1)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if sums and path.parent.name == f"step-{step:08}":
            found.append(Checkpoint(path.parent, step, top1, sums))
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and a message for each newer one that is not.

    Rank 0 looks; every rank calls this and gets the same.
    """
    answer: list[Any] = [None, []]
    if dist.get_rank() == 0:
        for checkpoint in find(folder):
            problem = damage(checkpoint)
            if problem is None:
                answer[0] = checkpoint
                break
            answer[1].append(f"checkpoint {checkpoint.path} is left aside: {problem}")
    dist.broadcast_object_list(answer)
    return answer[0], answer[1]


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files of ``checkpoint``, or None if each is as it was written."""
    for name, (size, sha256) in checkpoint.files.items():
        file = checkpoint.path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {size}"
        if _sha256(file) != sha256:
            return f"{file} is not what was written: its SHA-256 differs from the manifest's"
    return None


def load(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Put ``engine`` into the state of ``checkpoint``; return the client state that was saved with it."""
    with _weights_only(), torch.serialization.safe_globals(ZERO_CLASSES):
        try:
            path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{checkpoint} holds more than tensors and plain values, which could run code, and is not loaded; "
                "remove it, and the run goes on from an older one"
            ) from None
    if path is None:
        raise CheckpointError(f"DeepSpeed found no checkpoint in {checkpoint}")
    engine.lr_scheduler.step(engine.global_steps)
    return client_state


@contextmanager
def _weights_only() -> Iterator[None]:
    """DeepSpeed reads with weights_only=False, which would run code from a file; torch lets the environment insist."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def prune(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and, if asked, the one of the best top-1 accuracy."""
    checkpoints = find(folder)
    kept = {checkpoint.path for checkpoint in checkpoints[:keep_last]}
    best_one = best(checkpoints)
    if keep_best and best_one is not None:
        kept.add(best_one.path)
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            # Without its manifest it is no checkpoint any more, however far the removal gets.
            (checkpoint.path / MANIFEST).unlink()
            shutil.rmtree(checkpoint.path)


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The validated checkpoint of the best top-1 accuracy, the earliest of equals."""
    validated = [checkpoint for checkpoint in checkpoints if checkpoint.top1 is not None]
    return max(validated, key=lambda checkpoint: (checkpoint.top1, -checkpoint.step), default=None)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
