"""A trained model, ready for use: from a run's folder, or from what ``export`` made of one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.checkpoints import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, damage, find, unreadable
from recipe.commands.run_files import run_meant
from recipe.config import Config, read_config
from recipe.model import build_model
from recipe.reporting import read_summary

WEIGHTS, TIMM_CONFIG = "model.safetensors", "config.json"
SAVED = "mp_rank_00_model_states.pt"  # DeepSpeed's name of what rank 0 writes
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Trained:
    """Weights, and how the images were prepared that they were trained and validated on.

    ``name`` is what messages call it; ``classes`` are the names of the outputs in their order, None where nothing tells
    them; ``crop`` is "random_resized" or another value of ``recipe.data.crop``; ``mean`` and ``std`` are those of the
    pixels of each colour channel, from 0 to 1; ``state`` holds the tensors by name, in the run's own dtypes;
    ``config`` is the run's, None for an export.
    """

    name: str
    architecture: str
    num_classes: int
    classes: tuple[str, ...] | None
    image_size: int
    crop: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    state: dict[str, Tensor]
    config: Config | None = None

    def build(self, device: torch.device) -> nn.Module:
        """The model in evaluation mode, its parameters in the dtype in which they were trained.

        Raises:
            ValueError: timm has no such architecture, or the weights are not its.
        """
        model = build_model(self.architecture, self.num_classes, seed=0, statistics="local")
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            raise ValueError(f"{self.name}: the weights are not those of {self.architecture}: {error}") from None
        dtype = DTYPES.get("fp32" if self.config is None else self.config.precision, torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # as DeepSpeed has it, which leaves the buffers in fp32
        if dtype == torch.float64:
            model = model.double()
        return model.to(device).eval()


def read_trained(path: Path, checkpoint: str = "best") -> Trained:
    """Read a model from the folder of a run, from an export's folder or from its weights file.

    Args:
        path: What the command line names.
        checkpoint: "best", "last" or the name of one, such as "step-00000150"; of a run only.

    Raises:
        ValueError: It is none of these, or a file is damaged.
    """
    folder = path.parent if path.suffix == ".safetensors" else path
    if (folder / TIMM_CONFIG).is_file() and not (folder / CHECKPOINTS).is_dir():
        return _read_export(folder, path if path != folder else folder / WEIGHTS)
    if path != folder:
        raise ValueError(
            f"{path} has no {TIMM_CONFIG} beside it, which says what model it is; "
            "name a folder that python -m recipe export has written, or a run"
        )
    chosen, _ = choose_checkpoint(path, checkpoint)
    config = read_config(chosen.path / PLAN)
    recipe = config.recipe
    summary = read_summary(path) or {}
    classes = summary.get("classes")
    image_size, mean, std = recipe.data.image_size, recipe.data.mean, recipe.data.std
    assert image_size != "auto", "a plan leaves no auto"
    assert mean != "auto", "a plan leaves no auto"
    assert std != "auto", "a plan leaves no auto"
    return Trained(
        name=str(chosen.path),
        architecture=recipe.model.architecture,
        num_classes=recipe.model.num_classes,
        classes=None if classes is None else tuple(classes),
        image_size=image_size,
        crop=recipe.data.crop,
        mean=mean,
        std=std,
        state=read_weights(chosen),
        config=config,
    )


def choose_checkpoint(run: Path, which: str = "best") -> tuple[Checkpoint, list[str]]:
    """A whole checkpoint of ``run``, and a message for each that was left aside.

    "best" is the one of the highest validated top-1 accuracy, or the newest where none was validated.

    Raises:
        ValueError: There is none, or it is in shards.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    folder = run / CHECKPOINTS
    messages = [f"checkpoint {path} is left aside: its {MANIFEST} cannot be read" for path in unreadable(folder)]
    candidates = list(_in_order(find(folder), which))
    for checkpoint in candidates:
        problem = damage(checkpoint)
        if problem is None:
            break
        messages.append(f"checkpoint {checkpoint.path} is left aside: {problem}")
    else:
        wanted = "whole checkpoint" if which in ("best", "last") else f"whole checkpoint {which}"
        raise ValueError("; ".join([*messages, f"{folder} holds no {wanted}; {run_meant(run)}"]))
    if SAVED not in checkpoint.files:
        raise ValueError(
            f"{checkpoint.path} is in shards, as ZeRO stage 3 writes it; join them with "
            "DeepSpeed's zero_to_fp32, or train at a lower stage"
        )
    return checkpoint, messages


def _in_order(found: Sequence[Checkpoint], which: str) -> Iterator[Checkpoint]:
    """Those that may be taken for ``which``, the first choice first; ``found`` has the newest first."""
    if which == "last":
        yield from found
    elif which == "best":
        validated = [checkpoint for checkpoint in found if checkpoint.top1 is not None]
        yield from sorted(validated, key=lambda one: (one.top1, -one.step), reverse=True)
        yield from (checkpoint for checkpoint in found if checkpoint.top1 is None)
    else:
        yield from (checkpoint for checkpoint in found if checkpoint.path.name == which)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors by name, in the dtypes in which they were saved.

    Raises:
        ValueError: The file is not what DeepSpeed saves.
    """
    file = checkpoint.path / SAVED
    try:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)["module"]
        return {name: value.contiguous() for name, value in state.items()}
    except (RuntimeError, UnpicklingError, LookupError, TypeError, AttributeError, EOFError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not what DeepSpeed saves: {what}") from None


def _read_export(folder: Path, weights: Path) -> Trained:
    file = folder / TIMM_CONFIG
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        prepared = described["pretrained_cfg"]
        names = described.get("label_names") or prepared.get("label_names")
        return Trained(
            name=str(weights),
            architecture=described["architecture"],
            num_classes=described["num_classes"],
            classes=None if names is None else tuple(names),
            image_size=int(prepared["input_size"][-1]),
            crop="none" if prepared.get("crop_mode") == "squash" else "random_resized",
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
            state=load_file(weights),
        )
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what python -m recipe export writes: {error!r}") from None
