"""What a checkpoint is on the disk: its manifest, its name, and how to tell a whole one from a damaged one.

A checkpoint is a folder ``checkpoints/step-<steps done>/``: what DeepSpeed saved, the plan that it was trained by, and
``manifest.json`` with the size and SHA-256 of every other file. It is written under another name and renamed when all
of it is on the disk, so that what bears the name is whole.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS, PLAN, MANIFEST = "checkpoints", "plan.json", "manifest.json"
REPLACED = ".replaced"  # behind the name of a checkpoint that gives way to another of the same step


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


def complete(written: Path, head: dict[str, Any]) -> None:
    """Add the manifest, and have all of it on the disk."""
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    (written / MANIFEST).write_text(json.dumps(head | {"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _fsync(path)


def publish(whole: Path, name: Path) -> None:
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


def prune(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and, if asked, the one of the best top-1 accuracy."""
    checkpoints = find(folder)
    kept = {checkpoint.path for checkpoint in checkpoints[:keep_last]}
    best_one = best(checkpoints)
    if keep_best and best_one is not None:
        kept.add(best_one.path)
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            remove(checkpoint.path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no moment can its rest be taken for one."""
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
