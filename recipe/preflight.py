"""Makes and checks the parts of a run before any rank meets another; whatever is wrong is a ``ValueError``."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from recipe.checkpoints import CHECKPOINTS, LOCK, Resume, Start, choose_start, lock, make_folder
from recipe.config import ConfigError
from recipe.data import EncodedImages, HeldImages, Samples, open_datasets, open_decoder
from recipe.model import BatchNorm, build_model
from recipe.plan import Plan


@dataclass(frozen=True)
class Run:
    """The parts of a run, checked and ready, before any rank has met another."""

    plan: Plan
    output: Path
    device: torch.device
    model: nn.Module
    datasets: tuple[Samples, Samples] | None
    start: Start
    undo: ExitStack
    """what takes back the folders and the lock, for ranks that after all do not train"""


def prepare(plan: Plan, output: Path, resume: Resume, accept_changes: bool = False) -> Run:
    """Check what the plan needs of this machine and make the parts.

    Raises:
        ValueError: a device without the precision, data that cannot be read, a model that does not fit the data, an
            output folder that holds another training, or cannot be made.
    """
    recipe = plan.config.recipe
    is_first = (os.environ.get("RANK") or "0") == "0"
    with ExitStack() as undone_if_refused:
        if is_first:
            # First of all: another run that is about to end changes which checkpoints are there.
            undone_if_refused.callback(_remove_empty, make_folder(output))
            is_new = not (output / LOCK).exists()
            undone_if_refused.enter_context(lock(output))
            if is_new:
                undone_if_refused.callback((output / LOCK).unlink, missing_ok=True)
        start = choose_start(plan, output, resume, accept_changes)
        if is_first:
            undone_if_refused.callback(_remove_empty, make_folder(output / CHECKPOINTS))
        device = choose_device(plan)
        try:
            datasets = open_data(plan, device)
            model = build_model(
                recipe.model.name,
                recipe.model.num_classes,
                recipe.seed,
                recipe.batchnorm.statistics,
                recipe.model.zero_init_last,
                recipe.model.weights,
                recipe.model.freeze,
            )
            check_image_size(model, plan.image_size, samples_averaged(plan))
        except ConfigError:
            raise
        except ValueError as error:
            # Data and model know the key and the value, but not the file.
            raise ValueError(f"{plan.config.source.file}: {error}") from error
        if plan.precision == "fp64":
            model = model.double()
        return Run(plan, output, device, model, datasets, start, undone_if_refused.pop_all())


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def open_data(plan: Plan, device: torch.device) -> tuple[Samples, Samples] | None:
    """Training and validation data; None for synthetic data."""
    recipe, data = plan.config.recipe, plan.config.recipe.data
    if data.source == "synthetic":
        return None
    decoder = None
    if data.decoder != "cpu":
        decoder = open_decoder(data.decoder, plan.image_size, device, threads=max(1, plan.workers))
    training, validation = open_datasets(
        data.source,
        data.path,
        image_size=plan.image_size,
        crop=data.crop,
        flip=data.flip,
        seed=recipe.seed,
        on_bad_image=data.on_bad_image,
        pack_short_side=data.pack_short_side,
    )
    if decoder is not None:
        return EncodedImages(training, decoder, device), EncodedImages(validation, decoder, device)
    if data.on_device or data.source == "digits":
        return HeldImages(training, device, training=True), HeldImages(validation, device, training=False)
    return training, validation


def samples_averaged(plan: Plan) -> int:
    """The number of samples that batch norm averages over."""
    statistics = plan.config.statistics
    if isinstance(statistics, int):
        return statistics
    return plan.micro_batch * (plan.world_size if statistics == "global" else 1)


@torch.no_grad()
def check_image_size(model: nn.Module, image_size: int, samples: int) -> None:
    """Refuse images that the model does not take, as a vision transformer takes those of one size only.

    And those of which so few samples leave batch norm a single value to average over.
    """
    values: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0].numel() // inputs[0].shape[1]))
        for module in model.modules()
        if isinstance(module, BatchNorm)
    ]
    model.eval()
    try:
        model(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"recipe.data.image_size = {image_size}: the model takes no such images: {error}") from None
    for hook in hooks:
        hook.remove()
    if values and min(values) * samples < 2:
        raise ValueError(
            f"recipe.data.image_size = {image_size}: batch norm over {samples} image averages over a single value; "
            "take a larger micro-batch, or a larger image"
        )
    model.train()


def choose_device(plan: Plan) -> torch.device:
    """This rank's GPU, or the CPU where there is none; it must know the plan's precision."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {os.environ.get('RANK', '0')} is the {local_rank + 1}. on this host, which has "
                f"{torch.cuda.device_count()} GPUs; lower slots= in the hostfile, or --num_gpus"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    accelerator = get_accelerator()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    remedy = f'write "{plan.precision}": {{"enabled": false}} to train in fp32, or run it on a GPU that has it'
    supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if plan.precision in supported and not supported[plan.precision]():
        raise plan.config.source.refusal(f"{plan.precision}.enabled", f"{name} does not support it", remedy)
    return device
