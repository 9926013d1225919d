"""Saves the engine's state as a checkpoint, and loads the newest one that is intact."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from recipe.checkpoints import manifest
from recipe.checkpoints.manifest import PLAN, Checkpoint
from recipe.engine import read_overflows

UNFINISHED = ".unfinished"
OF_RANK = "rank-{:05d}.pt"

# DeepSpeed pickles these classes into the shards of ZeRO stages 1 to 3; stage 0 has only tensors and containers.
ZERO_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

# Of DeepSpeed's ``LossScaleConfig`` and ``DynamicLossScaler``.
LOSS_SCALE_SETTINGS = ("scale_factor", "scale_window", "min_scale", "delayed_shift", "consecutive_hysteresis")

# torch reports a full disk as an unexpected position in the file, and names the source file that noticed it.
TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it and the cause."""


def save(
    engine: DeepSpeedEngine,
    folder: Path,
    *,
    top1: float | None,
    client_state: dict[str, Any],
    plan: str,
    training_sha256: str,
    data: manifest.Data | None = None,
    own_state: Any = None,
) -> Path:
    """Write the state of ``engine`` and ``client_state`` (plain values and tensors) to ``folder``. A collective.

    ``plan`` is the text of ``plan.json``, ``own_state`` the state that only this rank has, if any; for ``top1``,
    ``training_sha256`` and ``data`` see ``Checkpoint``. Returns the path of the checkpoint.

    Raises:
        CheckpointError: it could not be written; older checkpoints are untouched.
    """
    read_overflows(engine)
    tag = f"step-{engine.global_steps:08d}"
    unfinished = folder / UNFINISHED
    if dist.get_rank() == 0:
        manifest.clear(unfinished)
    dist.barrier()
    try:
        engine.save_checkpoint(str(unfinished), tag=tag, client_state=client_state, save_latest=False)
        if own_state is not None:
            torch.save(own_state, unfinished / tag / OF_RANK.format(dist.get_rank()))
        dist.barrier()  # every rank may write a part
        if dist.get_rank() == 0:
            (unfinished / tag / PLAN).write_text(plan, encoding="utf-8")
            head = {"step": engine.global_steps, "top1": top1, "training_sha256": training_sha256}
            head |= {"world_size": dist.get_world_size(), "data": data and data.model_dump()}
            manifest.complete(unfinished / tag, head)
            manifest.publish(unfinished / tag, folder / tag)
            manifest.clear(unfinished)  # and with it the script that DeepSpeed adds to ZeRO shards
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(word in str(error) for word in TORCH_CANNOT_WRITE):
            raise
        no_room = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(folder).free
        if dist.get_rank() == 0:
            manifest.clear(unfinished)
        raise CheckpointError(
            f"{folder / tag} could not be written, with {free / 2**20:,.0f} MiB free on its disk: {error}; "
            f"{'make room' if no_room else 'fix it'}, and the same command resumes from the newest intact one"
        ) from error
    dist.barrier()
    return folder / tag


def load_newest(
    engine: DeepSpeedEngine, checkpoints: Sequence[Checkpoint]
) -> tuple[Checkpoint | None, dict[str, Any], list[str]]:
    """Load the first intact one of ``checkpoints`` into ``engine``, on every rank, and set newer ones aside.

    Returns the checkpoint (None if none is intact), its client state, and a message for each that was skipped.

    Raises:
        CheckpointError: intact checkpoints cannot be loaded.
    """
    messages: list[str] = []
    tried = False
    for checkpoint in checkpoints:
        problem: list[str | None] = [manifest.damage(checkpoint) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(problem)
        client_state: dict[str, Any] = {}
        if problem == [None]:
            tried = True
            try:
                client_state = _load(engine, checkpoint.path)
            except Exception as error:  # whatever is in the file, an older checkpoint may load
                problem = [f"it cannot be loaded: {type(error).__name__}: {error}"]
            problems = [problem[0]] * dist.get_world_size()
            dist.all_gather_object(problems, problem[0])
            problem = [next(filter(None, problems), None)]
        if problem == [None]:
            if dist.get_rank() == 0:
                manifest.set_aside(checkpoints[: len(messages)])
            return checkpoint, client_state, messages
        messages.append(f"checkpoint {checkpoint.path} is skipped: {problem[0]}")
    if tried:  # the engine may hold parts of it
        raise CheckpointError(f"no checkpoint can be loaded: {'; '.join(messages)}")
    return None, {}, messages


def load_own(found: Checkpoint, device: torch.device) -> Any:
    """Load this rank's ``own_state``; None if there is none, or another number of ranks wrote it."""
    name = OF_RANK.format(dist.get_rank())
    if name not in found.files or found.world_size != dist.get_world_size():
        return None
    return torch.load(found.path / name, map_location=device, weights_only=True)


def _load(engine: DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    # DeepSpeed loads with weights_only=False, which could run code from a file; this variable overrides it.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    restore_settings = _keep_settings(engine)
    with torch.serialization.safe_globals(ZERO_CLASSES):
        try:
            path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        except pickle.UnpicklingError:
            raise CheckpointError("it holds more than tensors and plain values, which could run code") from None
    if path is None:
        raise CheckpointError("DeepSpeed finds no checkpoint in it")
    restore_settings()
    engine.lr_scheduler.step(engine.global_steps)
    return client_state


def _keep_settings(engine: DeepSpeedEngine) -> Callable[[], None]:
    """A function that gives the optimizer and its loss scale the config's settings back.

    They load those of the checkpoint with their state: momentum, weight decay, clipping, the loss scale's window.
    """

    def loss_scale() -> Any:
        return getattr(engine.optimizer, "loss_scale_config", None) or getattr(engine.optimizer, "loss_scaler", None)

    groups = [group | {"params": None} for group in engine.basic_optimizer.param_groups]
    clip_grad = getattr(engine.optimizer, "clip_grad", None)
    scaling = {name: getattr(loss_scale(), name) for name in LOSS_SCALE_SETTINGS if hasattr(loss_scale(), name)}

    def restore() -> None:
        for group, own in zip(engine.basic_optimizer.param_groups, groups, strict=True):
            group.update(own | {"params": group["params"]})
        if clip_grad is not None:
            engine.optimizer.clip_grad = clip_grad
        for name, value in scaling.items():
            setattr(loss_scale(), name, value)

    return restore
