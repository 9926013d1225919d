"""Checkpoints on disk: their names and manifests, and how a complete one is told from a damaged one.

A checkpoint is a folder ``checkpoints/step-<steps done>/`` with DeepSpeed's files, the plan of the run, and
``manifest.json``, which lists the size and SHA-256 of every other file. It is written under a temporary name and
renamed once everything is on the disk, so a folder with its final name is complete.
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
REPLACED = ".replaced"  # suffix of a checkpoint while a new one of the same step takes its name
ASIDE = ".aside"  # suffix of a checkpoint that turned out to be unusable


class File(BaseModel, frozen=True, strict=True):
    """A checkpoint file as it was written."""

    size: int = Field(alias="bytes")
    sha256: str


class Data(BaseModel, frozen=True, strict=True):
    """The data a run trains on: its class names in the order of their indices, and a digest of the images."""

    classes: list[str]
    digest: str


class Checkpoint(BaseModel, frozen=True, strict=True, allow_inf_nan=False):
    """The manifest of a complete checkpoint.

    ``step`` is the number of updates done, ``top1`` the validation accuracy in per cent (None if not validated),
    ``training_sha256`` a digest of the configuration (see ``resume``), ``world_size`` the number of ranks.
    """

    path: Path = Path()
    step: int
    top1: float | None = Field(ge=0, le=100)
    training_sha256: str
    world_size: int
    data: Data | None = None
    files: dict[str, File] = Field(min_length=1)


def complete(written: Path, head: dict[str, Any]) -> None:
    """Add the manifest and flush all files to the disk."""
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    (written / MANIFEST).write_text(json.dumps(head | {"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (*written.rglob("*"), written):
        _fsync(path)


def publish(whole: Path, name: Path) -> None:
    """Rename a complete checkpoint to ``name``. At any moment either it or the one it replaces can be found."""
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
    """The checkpoints in ``folder`` that have a readable manifest, newest first. Their files are not verified."""
    found = [checkpoint for path in folder.glob(f"step-*/{MANIFEST}") if (checkpoint := _read(path)) is not None]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.path.suffix != REPLACED), reverse=True)


def unreadable(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` whose manifest cannot be read."""
    manifests = folder.glob(f"step-*/{MANIFEST}")
    return sorted(path.parent for path in manifests if path.parent.suffix != ASIDE and _read(path) is None)


def set_aside(checkpoints: Sequence[Checkpoint]) -> None:
    """Rename unusable checkpoints so that they are not found, and do not count as some of those to keep."""
    for checkpoint in checkpoints:
        aside = checkpoint.path.with_name(checkpoint.path.name + ASIDE)
        clear(aside)
        with suppress(OSError):
            os.rename(checkpoint.path, aside)


def damage(checkpoint: Checkpoint) -> str | None:
    """Describe the first file that differs from the manifest; None if all files are intact."""
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
    """Remove all checkpoints but the newest ``keep_last`` and, with ``keep_best``, the most accurate one."""
    checkpoints = find(folder)
    kept = checkpoints[:keep_last] + (best_first(checkpoints)[:1] if keep_best else [])
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            remove(checkpoint.path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; what is left of it is never taken for a checkpoint. Failing to remove it ends no run."""
    with suppress(OSError):
        if not checkpoint.is_symlink():
            # Without its manifest it is not a checkpoint, even if the removal is interrupted.
            (checkpoint / MANIFEST).unlink()
        clear(checkpoint)


def best_path(folder: Path) -> Path | None:
    """The path of the checkpoint with the best top-1 accuracy; None if none was validated."""
    return next((checkpoint.path for checkpoint in best_first(find(folder))), None)


def best_first(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The validated checkpoints, by descending top-1 accuracy; of equally accurate ones the newest first."""
    validated = [checkpoint for checkpoint in checkpoints if checkpoint.top1 is not None]
    return sorted(validated, key=lambda checkpoint: (checkpoint.top1, checkpoint.step), reverse=True)


def _read(path: Path) -> Checkpoint | None:
    """Parse a manifest; None if it is torn, has wrong types, or belongs to a folder of another step."""
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
