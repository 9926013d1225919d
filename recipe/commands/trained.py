"""A trained model, read from a run's folder or from an export."""

import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.checkpoints import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, best_first, damage, find, unreadable
from recipe.commands.run_files import TIMM_CONFIG, WEIGHTS, plan_of, suggest_runs
from recipe.config import parse_config, parse_json, read_config, read_text
from recipe.data import ImageDataset, ValidationLoader
from recipe.distributed import say
from recipe.model import DTYPES, build_model, cast_parameters
from recipe.plan import Plan

SAVED = "mp_rank_00_model_states.pt"  # DeepSpeed's name for the file that rank 0 writes


@dataclass(frozen=True)
class Trained:
    """Weights and the plan they were trained with.

    Attributes:
        name: The path that identifies the model in messages.
        step: How many steps the weights were trained for; 0 for an export.
        top1: Their validation accuracy in per cent; None if they were not validated, and for an export.
        classes: The class names in the order of the outputs; None if the data does not name them.
        state: The tensors by name, in the run's own dtypes, or in fp32 from an export.
    """

    name: str
    step: int
    top1: float | None
    plan: Plan
    classes: tuple[str, ...] | None
    state: dict[str, Tensor]

    @property
    def num_classes(self) -> int:
        """The number of outputs of the model."""
        return self.plan.config.recipe.model.num_classes

    def build(self, device: torch.device) -> nn.Module:
        """The model in evaluation mode, with parameters in the precision of training."""
        model = build_model(self.plan.config.recipe.model.architecture, self.num_classes, seed=0, statistics="local")
        model = model.double() if self.plan.precision == "fp64" else model  # before, or loading would round
        self.load_into(model)
        cast_parameters(model, DTYPES[self.plan.precision])
        return model.to(device).eval()

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into ``model``; raises ``ValueError`` if they do not fit it."""
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            architecture = self.plan.config.recipe.model.architecture
            raise ValueError(f"{self.name}: the weights do not fit {architecture}: {error}") from None


def read_trained(path: Path, checkpoint: str = "best") -> Trained:
    """Read a model from a run's folder, an export's folder or an export's weights file.

    ``checkpoint`` is "best", "last" or a name such as "step-00000150"; an export ignores it.

    Raises:
        ValueError: ``path`` is none of these, or a file is damaged.
    """
    folder = path.parent if path.suffix == ".safetensors" else path
    if (folder / TIMM_CONFIG).is_file() and not (folder / CHECKPOINTS).is_dir():
        return _read_export(folder / TIMM_CONFIG, path if path != folder else folder / WEIGHTS)
    if path != folder:
        raise ValueError(
            f"{path} has no {TIMM_CONFIG} next to it, which describes the model; "
            "name a folder that python -m recipe export has written, or a run"
        )
    chosen = _choose_checkpoint(path, checkpoint)
    plan = plan_of(read_config(chosen.path / PLAN))
    names = () if chosen.data is None else tuple(chosen.data.classes)
    classes = names if len(names) == plan.config.recipe.model.num_classes else None
    return Trained(str(chosen.path), chosen.step, chosen.top1, plan, classes, _read_weights(chosen.path / SAVED))


def validation_loader(trained: Trained, model: nn.Module, dataset: ImageDataset, **options: Any) -> ValidationLoader:
    """A loader that preprocesses images for ``model`` like the run's own validation.

    ``options`` are the remaining ones of ``ValidationLoader``.
    """
    parameter, plan = next(model.parameters()), trained.plan
    view: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype, "mean": plan.mean, "std": plan.std}
    return ValidationLoader(dataset, **view, **options)


def _choose_checkpoint(run: Path, which: str) -> Checkpoint:
    """The first intact checkpoint of ``run`` in order of preference; rank 0 reports each that is skipped.

    "best" prefers the highest validated top-1 accuracy, then the newest that was not validated.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}")
    folder = run / CHECKPOINTS
    found = find(folder)  # newest first
    candidates = {
        "best": [*best_first(found), *(checkpoint for checkpoint in found if checkpoint.top1 is None)],
        "last": found,
    }.get(which, [checkpoint for checkpoint in found if checkpoint.path.name == which])
    messages = [f"checkpoint {path} is skipped: its {MANIFEST} cannot be read" for path in unreadable(folder)]
    for checkpoint in candidates:
        problem = damage(checkpoint)
        if problem is None:
            break
        messages.append(f"checkpoint {checkpoint.path} is skipped: {problem}")
    else:
        wanted = "intact checkpoint" if which in ("best", "last") else f"intact checkpoint {which}"
        others = ", ".join(checkpoint.path.name for checkpoint in found)
        remedy = f"it has {others}" if others and not messages else suggest_runs(run)
        raise ValueError("; ".join([*messages, f"{folder} has no {wanted}; {remedy}"]))
    if SAVED not in checkpoint.files:
        raise ValueError(
            f"{checkpoint.path} is sharded, as ZeRO stage 3 writes it; join the shards with "
            "DeepSpeed's zero_to_fp32, or train at a lower stage"
        )
    if os.environ.get("RANK", "0") == "0":
        for message in messages:
            say(message)
    return checkpoint


def _read_weights(file: Path) -> dict[str, Tensor]:
    """The model's tensors by name, in the dtypes they were saved in; averaged weights replace those trained."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        averaged = saved["average"]["tensors"] if "average" in saved else {}
        return {name: averaged.get(name, own).to(own.dtype) for name, own in saved["module"].items()}
    except (RuntimeError, UnpicklingError, LookupError, TypeError, ValueError, AttributeError, EOFError) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not a DeepSpeed checkpoint: {cause}") from None


def _read_export(file: Path, weights: Path) -> Trained:
    described = parse_json(read_text(file, "*.json"), str(file))
    if not isinstance(described.get("recipe"), dict):
        raise ValueError(f"{file} was not written by python -m recipe export: it has no recipe")
    plan, names = plan_of(parse_config(described["recipe"], str(file))), described.get("label_names")
    classes = plan.config.recipe.model.num_classes
    if names is not None:
        if not (isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{file}: label_names are not the names of {classes:,} classes; export the run again")
        names = tuple(names)
    try:
        return Trained(str(weights), 0, None, plan, names, load_file(weights))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{weights} cannot be read: {error}") from None
