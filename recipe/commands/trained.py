"""A trained model, ready for use: from a run's folder, or from what ``export`` made of one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.checkpoints import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, best_first, damage, find, unreadable
from recipe.commands.run_files import TIMM_CONFIG, WEIGHTS, plan_of, read_plan, run_meant
from recipe.config import parse_config, parse_json, read_text
from recipe.data import ImageDataset, ValidationLoader
from recipe.distributed import say
from recipe.model import DTYPES, build_model, cast_parameters
from recipe.plan import Plan

SAVED = "mp_rank_00_model_states.pt"  # DeepSpeed's name of what rank 0 writes


@dataclass(frozen=True)
class Trained:
    """Weights, and the plan by which they were trained.

    Attributes:
        name: What messages call it, a path.
        step: The steps after which a run had these weights; 0 for an export.
        top1: What the run then measured in per cent; None if it did not, and for an export.
        classes: The names of the outputs in their order; None where the run does not name them.
        state: The tensors by name, in the run's own dtypes; those of an export are in fp32.
    """

    name: str
    step: int
    top1: float | None
    plan: Plan
    classes: tuple[str, ...] | None
    state: dict[str, Tensor]

    @property
    def num_classes(self) -> int:
        """The number of outputs."""
        return self.plan.config.recipe.model.num_classes

    def build(self, device: torch.device) -> nn.Module:
        """The model in evaluation mode, its parameters in the dtype in which they were trained.

        Raises:
            ValueError: timm has no such architecture, or the weights are not its.
        """
        model = build_model(self.plan.config.recipe.model.architecture, self.num_classes, seed=0, statistics="local")
        self.load_into(model)
        cast_parameters(model, DTYPES[self.plan.precision])
        if self.plan.precision == "fp64":
            model = model.double()
        return model.to(device).eval()

    def load_into(self, model: nn.Module) -> None:
        """Give ``model`` the weights.

        Raises:
            ValueError: they are those of another architecture.
        """
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            architecture = self.plan.config.recipe.model.architecture
            raise ValueError(f"{self.name}: the weights are not those of {architecture}: {error}") from None


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
        return _read_export(folder / TIMM_CONFIG, path if path != folder else folder / WEIGHTS)
    if path != folder:
        raise ValueError(
            f"{path} has no {TIMM_CONFIG} beside it, which says what model it is; "
            "name a folder that python -m recipe export has written, or a run"
        )
    chosen = _choose_checkpoint(path, checkpoint)
    plan = read_plan(chosen.path / PLAN)
    return Trained(str(chosen.path), chosen.step, chosen.top1, plan, _class_names(chosen, plan), _read_weights(chosen))


def validation_loader(
    trained: Trained,
    model: nn.Module,
    dataset: ImageDataset,
    *,
    micro_batch: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> ValidationLoader:
    """The loader that prepares images for ``model`` as the run's own validation did."""
    parameter = next(model.parameters())
    return ValidationLoader(
        dataset,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=workers,
        device=parameter.device,
        dtype=parameter.dtype,
        mean=trained.plan.mean,
        std=trained.plan.std,
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
        others = ", ".join(checkpoint.path.name for checkpoint in find(folder))
        remedy = f"it holds {others}" if others and not messages else run_meant(run)
        raise ValueError("; ".join([*messages, f"{folder} holds no {wanted}; {remedy}"]))
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


def _class_names(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...] | None:
    """The names of the model's outputs, where the data that it was trained on names them."""
    names = () if checkpoint.data is None else tuple(checkpoint.data.classes)
    return names if len(names) == plan.config.recipe.model.num_classes else None


def _read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's tensors by name, in the dtypes in which they were saved; their moving average, where the run has one.

    Raises:
        ValueError: The file is not what DeepSpeed saves.
    """
    file = checkpoint.path / SAVED
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        averaged = saved["average"]["tensors"] if "average" in saved else {}
        return {name: averaged.get(name, own).to(own.dtype) for name, own in saved["module"].items()}
    except (RuntimeError, UnpicklingError, LookupError, TypeError, ValueError, AttributeError, EOFError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not what DeepSpeed saves: {what}") from None


def _read_export(file: Path, weights: Path) -> Trained:
    described = parse_json(read_text(file, "*.json"), str(file))
    if not isinstance(described.get("recipe"), dict):
        raise ValueError(f"{file} is not what python -m recipe export writes: it has no recipe")
    plan, names = plan_of(parse_config(described["recipe"], str(file))), described.get("label_names")
    classes = plan.config.recipe.model.num_classes
    are_names = isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names)
    if names is not None and not are_names:
        raise ValueError(f"{file}: label_names are not the names of {classes:,} classes; export the run again")
    try:
        return Trained(str(weights), 0, None, plan, None if names is None else tuple(names), load_file(weights))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} cannot be read: {error}") from None
