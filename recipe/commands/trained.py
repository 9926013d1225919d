"""A trained model, ready for use: from a run's folder, or from what ``export`` made of one."""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.checkpoints import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, best_first, damage, find, unreadable
from recipe.commands.run_files import TIMM_CONFIG, WEIGHTS, run_meant
from recipe.config import FOLDERS, Config, read_config
from recipe.data import evaluation_short_side, open_validation
from recipe.distributed import say
from recipe.model import DTYPES, build_model, cast_parameters
from recipe.reporting import read_summary

SAVED = "mp_rank_00_model_states.pt"  # DeepSpeed's name of what rank 0 writes


@dataclass(frozen=True)
class Trained:
    """Weights, and how images were prepared for them in training and validation.

    Attributes:
        name: What messages call it, a path.
        step: The steps after which a run had these weights; 0 for an export.
        classes: The names of the outputs in their order; None where neither the run nor its data names them.
        crop: A value of ``recipe.data.crop``.
        mean, std: Of the pixels of each colour channel, from 0 to 1.
        precision: "fp32", "bf16", "fp16" or "fp64".
        micro_batch: Images per forward pass in the run's own validation.
        state: The tensors by name, in the run's own dtypes.
        config: That of the run; None for an export.
    """

    name: str
    step: int
    architecture: str
    num_classes: int
    classes: tuple[str, ...] | None
    image_size: int
    crop: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    micro_batch: int
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
        cast_parameters(model, DTYPES[self.precision])
        if self.precision == "fp64":
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
    chosen = _choose_checkpoint(path, checkpoint)
    config = read_config(chosen.path / PLAN)
    recipe, micro_batch = config.recipe, config.train_micro_batch_size_per_gpu
    image_size, mean, std = recipe.data.image_size, recipe.data.mean, recipe.data.std
    assert isinstance(micro_batch, int), "a plan leaves no auto"
    assert image_size != "auto", "a plan leaves no auto"
    assert mean != "auto", "a plan leaves no auto"
    assert std != "auto", "a plan leaves no auto"
    return Trained(
        name=str(chosen.path),
        step=chosen.step,
        architecture=recipe.model.architecture,
        num_classes=recipe.model.num_classes,
        classes=_class_names(path, config),
        image_size=image_size,
        crop=recipe.data.crop,
        mean=mean,
        std=std,
        precision=config.precision,
        micro_batch=micro_batch,
        state=_read_weights(chosen),
        config=config,
    )


def _choose_checkpoint(run: Path, which: str) -> Checkpoint:
    """The first choice among the whole checkpoints of ``run``; each that is left aside is reported.

    "best" is the one of the highest validated top-1 accuracy, or the newest where none was validated.

    Raises:
        ValueError: There is none, or it is in shards.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    folder = run / CHECKPOINTS
    messages = [f"checkpoint {path} is left aside: its {MANIFEST} cannot be read" for path in unreadable(folder)]
    for checkpoint in _in_order(find(folder), which):
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
    if os.environ.get("RANK", "0") == "0":
        for message in messages:
            say(message)
    return checkpoint


def _in_order(newest_first: Sequence[Checkpoint], which: str) -> list[Checkpoint]:
    """Those that may be taken for ``which``, the first choice first."""
    if which == "last":
        return list(newest_first)
    if which == "best":
        return [*best_first(newest_first), *(checkpoint for checkpoint in newest_first if checkpoint.top1 is None)]
    return [checkpoint for checkpoint in newest_first if checkpoint.path.name == which]


def _class_names(run: Path, config: Config) -> tuple[str, ...] | None:
    """The names of the model's outputs: from the run's summary, or else from its data where that is still there."""
    summary, data = read_summary(run) or {}, config.recipe.data
    names = summary.get("classes")
    if not names and data.source in FOLDERS and data.path is not None:
        with suppress(OSError, ValueError):
            names = open_validation(
                Path(data.path),
                image_size=1,
                crop="none",
                on_bad_image="skip",
                validation_share=data.validation_share,
            ).class_names
    return tuple(names) if names and len(names) == config.recipe.model.num_classes else None


def _read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
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


def timm_crop(image_size: int, crop: Any) -> tuple[str, float]:
    """timm's ``crop_mode`` and ``crop_pct`` for the run's own validation.

    timm resizes the short side to floor(size / crop_pct).
    """
    if crop != "random_resized":
        return "squash", 1.0
    short_side = evaluation_short_side(image_size, crop)
    shares = (image_size / short_side, image_size / (short_side + 0.5))
    return "center", next(share for share in shares if math.floor(image_size / share) == short_side)


def _read_export(folder: Path, weights: Path) -> Trained:
    file = folder / TIMM_CONFIG
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        prepared, of_run = described["pretrained_cfg"], described["recipe"]
        size, names = int(prepared["input_size"][-1]), described.get("label_names")
        crop = "none" if prepared["crop_mode"] == "squash" else "random_resized"
        if (prepared["crop_mode"], prepared["crop_pct"]) != timm_crop(size, crop):
            raise ValueError(f"crop_mode {prepared['crop_mode']!r} with crop_pct {prepared['crop_pct']}")
        return Trained(
            name=str(weights),
            step=0,
            architecture=described["architecture"],
            num_classes=described["num_classes"],
            classes=None if names is None else tuple(names),
            image_size=size,
            crop=crop,
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
            # The weights are in fp32; of fp64 they are only rounded.
            precision="fp32" if of_run["precision"] == "fp64" else of_run["precision"],
            micro_batch=int(of_run["micro_batch"]),
            state=load_file(weights),
        )
    except OSError as error:
        raise ValueError(f"{error.filename or weights}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what python -m recipe export writes: {error!r}") from None
