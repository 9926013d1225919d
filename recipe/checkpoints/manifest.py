"""Checkpoints on the disk: manifest and name, and how to tell a whole one from a damaged one.

A checkpoint is a folder ``checkpoints/step-<steps done>/``: what DeepSpeed saved, the plan that it was trained by, and
``manifest.json`` with the size and SHA-256 of every other file. It is written under another name and renamed when all
of it is on the disk, so that a folder of that name is whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

CHECKPOINTS, PLAN, MANIFEST = "checkpoints", "plan.json", "manifest.json"
REPLACED = ".replaced"  # behind the name of a checkpoint that gives way to another of the same step
ASIDE = ".aside"  # behind the name of one that turned out to be damaged


class File(BaseModel, frozen=True, strict=True):
    """A file of a checkpoint as it was written."""

    size: int = Field(alias="bytes")
    sha256: str


class Data(BaseModel, frozen=True, strict=True):
    """What a run trains on: the names of the classes, in the order of their numbers, and a digest of the images."""

    classes: list[str]
    digest: str


class Checkpoint(BaseModel, frozen=True, strict=True, allow_inf_nan=False):
    """A checkpoint that was written to its end: ``step`` updates done, ``top1`` in per cent if it was validated.

    ``training_sha256`` tells trainings apart (see ``resume``); ``world_size`` ranks wrote it, trained on
    ``data`` (None: by a version that did not say).
    """

    path: Path = Path()
    step: int
    top1: float | None = Field(ge=0, le=100)
    training_sha256: str
    world_size: int
    data: Data | None = None
    files: dict[str, File] = Field(min_length=1)


def complete(written: Path, head: dict[str, Any]) -> None:
    """Add the manifest, and sync all files to the disk."""
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    (written / MANIFEST).write_text(json.dumps(head | {"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _fsync(path)


def publish(whole: Path, name: Path) -> None:
    """Rename a whole checkpoint to ``name``. At every moment either it or the one that it replaces can be found."""
    replaced = name.with_name(name.name + REPLACED)
    if os.path.lexists(name):
        clear(replaced)
        os.rename(name, replaced)
    os.rename(whole, name)
    _fsync(name.parent)
    clear(replaced)


def clear(path: Path) -> None:
    """Remove a file, a folder or a link (not its target)."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def find(folder: Path) -> list[Checkpoint]:
    """The checkpoints below ``folder`` whose manifests can be read, the newest first; their files are not looked at."""
    found = [checkpoint for path in folder.glob(f"step-*/{MANIFEST}") if (checkpoint := _read(path)) is not None]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.suffix != REPLACED), reverse=True)


def unreadable(folder: Path) -> list[Path]:
    """Those below ``folder`` with a manifest that cannot be read."""
    manifests = folder.glob(f"step-*/{MANIFEST}")
    return sorted(path.parent for path in manifests if path.parent.suffix != ASIDE and _read(path) is None)


def set_aside(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint that is of no use, so that it is not found: it must not be counted as one to keep."""
    aside = checkpoint.path.with_name(checkpoint.path.name + ASIDE)
    with suppress(OSError):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint.path, aside)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files of ``checkpoint``, or None if each is as it was written."""
    for name, written in checkpoint.files.items():
        file = checkpoint.path / name
        try:
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != written.size:
                return f"{file} has {file.stat().st_size} bytes, its manifest says {written.size}"
            if _sha256(file) != written.sha256:
                return f"{file} is not what was written: its SHA-256 differs from the manifest's"
        except OSError as error:
            return f"{file}: {error.strerror}"
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
    """Remove a checkpoint; at no moment can its remains be taken for one. What cannot be removed does not end a run."""
    with suppress(OSError):
        if checkpoint.is_symlink():
            checkpoint.unlink()
            return
        # Without its manifest it is no checkpoint any more, however far the removal gets.
        (checkpoint / MANIFEST).unlink()
        shutil.rmtree(checkpoint)


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The validated checkpoint of the best top-1 accuracy; see ``best_first``."""
    return next(iter(best_first(checkpoints)), None)


def best_path(folder: Path) -> Path | None:
    """Where the ``best`` of a folder's checkpoints lies."""
    found = best(find(folder))
    return None if found is None else found.path


def best_first(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that were validated, by top-1 accuracy; among equals the latest first, which was trained for longer."""
    validated = [checkpoint for checkpoint in checkpoints if checkpoint.top1 is not None]
    return sorted(validated, key=lambda checkpoint: (checkpoint.top1, checkpoint.step), reverse=True)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint of a manifest; None if that is torn, of other types, or under a name that is not its own."""
    try:
        found = Checkpoint.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    is_its_own = path.parent.name.removesuffix(REPLACED) == f"step-{found.step:08}"
    return found.model_copy(update={"path": path.parent}) if is_its_own else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
