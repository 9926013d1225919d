"""Save, find, verify, load and prune checkpoints.

A checkpoint is DeepSpeed's own folder, ``checkpoints/step-<steps done>/``, plus the plan that it was trained by and
``manifest.json`` with the size and SHA-256 of every other file. It is written under another name and renamed when all
of it is on the disk, so that what bears the name is whole.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
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

CHECKPOINTS, PLAN, MANIFEST = "checkpoints", "plan.json", "manifest.json"
UNFINISHED = ".unfinished"
REPLACED = ".replaced"  # behind the name of a checkpoint that gives way to another of the same step

# What DeepSpeed pickles into the shards of ZeRO stages 1 to 3; plain tensors and containers suffice at stage 0.
ZERO_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it and says what is known of the cause."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written to its end: ``step`` updates done, ``top1`` in per cent if it was validated.

    ``training_sha256`` tells trainings apart (``recipe.resume``); ``world_size`` ranks wrote it; ``files`` has the size
    in bytes and the SHA-256 of each file as it was written.
    """

    path: Path
    step: int
    top1: float | None
    training_sha256: str
    world_size: int
    files: dict[str, tuple[int, str]]


def save(
    engine: DeepSpeedEngine,
    folder: Path,
    *,
    top1: float | None,
    client_state: dict[str, Any],
    plan: str,
    training_sha256: str,
) -> Path:
    """Write the state of ``engine`` and ``client_state`` (plain values and tensors) below ``folder``.

    Every rank calls this, and knows when it returns that the checkpoint is on the disk.

    Args:
        top1: Of the validation that belongs to it, in per cent.
        plan: The text of its ``plan.json``.
        training_sha256: See ``Checkpoint``.

    Raises:
        CheckpointError: it could not be written; the older ones are as they were.
    """
    tag = f"step-{engine.global_steps:08d}"
    unfinished = folder / UNFINISHED
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(unfinished), tag=tag, client_state=client_state, save_latest=False)
        dist.barrier()  # at ZeRO stages every rank writes a shard
        if dist.get_rank() == 0:
            (unfinished / tag / PLAN).write_text(plan, encoding="utf-8")
            head = {"step": engine.global_steps, "top1": top1, "training_sha256": training_sha256}
            _complete(unfinished / tag, head | {"world_size": dist.get_world_size()})
            _publish(unfinished / tag, folder / tag)
            # And with it the script that DeepSpeed adds for ZeRO shards: no code in checkpoints.
            shutil.rmtree(unfinished)
    except (OSError, RuntimeError) as error:
        # torch says of a full disk only that it is at an unexpected position.
        free = shutil.disk_usage(folder).free
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"{folder / tag} could not be written, with {free / 2**20:,.0f} MiB free on its disk: {error}; the older "
            "checkpoints are whole: make room, and the same command goes on from the newest"
        ) from error
    dist.barrier()
    return folder / tag


def _complete(written: Path, head: dict[str, Any]) -> None:
    """Add the manifest, and have all of it on the disk."""
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    (written / MANIFEST).write_text(json.dumps(head | {"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _fsync(path)


def _publish(whole: Path, name: Path) -> None:
    """Give a whole checkpoint its name. At no moment is there neither it nor the one that it replaces."""
    replaced = name.with_name(name.name + REPLACED)
    if name.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(name, replaced)
    os.rename(whole, name)
    _fsync(name.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def find(folder: Path) -> list[Checkpoint]:
    """The checkpoints below ``folder`` that have a manifest, the newest first; their files are not looked at."""
    found = []
    for path in folder.glob(f"step-*/{MANIFEST}"):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            step, top1 = manifest["step"], manifest["top1"]
            top1 = None if top1 is None else float(top1)
            training_sha256, world_size = str(manifest["training_sha256"]), int(manifest["world_size"])
            sums = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if sums and path.parent.name.removesuffix(REPLACED) == f"step-{step:08}":
            found.append(Checkpoint(path.parent, step, top1, training_sha256, world_size, sums))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.suffix != REPLACED), reverse=True)


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


def load_newest(
    engine: DeepSpeedEngine, checkpoints: Sequence[Checkpoint]
) -> tuple[Checkpoint | None, dict[str, Any], list[str]]:
    """Put ``engine`` into the state of the first of ``checkpoints`` that is whole and can be loaded, on every rank.

    Returns:
        The checkpoint (None if none is whole), its client state, and a message for each that was left aside.

    Raises:
        CheckpointError: those that are whole cannot be loaded.
    """
    messages: list[str] = []
    tried = False
    for checkpoint in checkpoints:
        problem: list[str | None] = [damage(checkpoint) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(problem)
        client_state: dict[str, Any] = {}
        if problem == [None]:
            tried = True
            try:
                client_state = _load(engine, checkpoint.path)
            except Exception as error:  # whatever is in the file: an older checkpoint may do
                problem = [f"it cannot be loaded: {type(error).__name__}: {error}"]
            problems = [problem[0]] * dist.get_world_size()
            dist.all_gather_object(problems, problem[0])
            problem = [next(filter(None, problems), None)]
        if problem == [None]:
            return checkpoint, client_state, messages
        messages.append(f"checkpoint {checkpoint.path} is left aside: {problem[0]}")
    if tried:  # and the engine holds parts of it
        raise CheckpointError(f"no checkpoint can be loaded: {'; '.join(messages)}")
    return None, {}, messages


def _load(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    with _weights_only(), torch.serialization.safe_globals(ZERO_CLASSES):
        try:
            path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        except pickle.UnpicklingError:
            raise CheckpointError("it holds more than tensors and plain values, which could run code") from None
    if path is None:
        raise CheckpointError("DeepSpeed finds none in it")
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
            _remove(checkpoint.path)


def _remove(checkpoint: Path) -> None:
    # Without its manifest it is no checkpoint any more, however far the removal gets.
    (checkpoint / MANIFEST).unlink()
    shutil.rmtree(checkpoint)


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
