"""The weights that training starts from: a file, a folder, a model hub, or timm's own for a tagged name."""

import os
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict, load_state_dict_from_hf
from torch import Tensor, nn

from recipe.model.batchnorm import BatchNorm

HUB, LOCAL = "hf-hub:", "local-dir:"  # as timm spells them
FILES = ("model.safetensors", "pytorch_model.bin")  # the weights in a folder as hubs lay it out
SHOWN_NAMES = 3


def read_weights(weights: str) -> dict[str, Tensor]:
    """Read tensors by name, without running code.

    Args:
        weights: A ``.safetensors`` or ``.pth`` file, a folder written by ``export`` or the hub's tools,
            ``hf-hub:owner/name``, or a tagged timm name such as "resnet50.a1_in1k".

    Raises:
        ValueError: They cannot be read, or are not weights.
    """
    key = f'recipe.model.weights = "{weights}"'
    try:
        if weights.startswith(HUB):
            return load_state_dict_from_hf(weights.removeprefix(HUB), weights_only=True)
        if timm.is_model_pretrained(weights) and not Path(weights).exists():
            return timm.create_model(weights, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the weights {weights} cannot be fetched: {first}; name a file or folder on this machine for "
            "recipe.model.weights"
        ) from None
    path = Path(weights.removeprefix(LOCAL))
    if os.path.isdir(path):
        found = [path / name for name in FILES if os.path.isfile(path / name)]
        if not found:
            raise ValueError(f"{key}: the folder holds neither {' nor '.join(FILES)}")
        path = found[0]
    if not os.path.isfile(path):
        fault = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{key}: {path} {fault}; name a .safetensors or .pth file, or a folder that holds one")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # the errors of pickle and of what it calls share no class
        problem = error.strerror if isinstance(error, OSError) else "it holds no weights, or more than weights"
        raise ValueError(f"{key}: {path} cannot be read: {problem}; expected a .safetensors or .pth file") from None
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{key}: {path} holds more than weights by name")
    if not all(map(_is_plain, state.values())):
        raise ValueError(f"{key}: {path} holds tensors that are sparse, complex, quantized, nested or without values")
    return state


def _is_plain(value: Tensor) -> bool:
    special = value.is_meta or value.is_complex() or value.is_quantized or value.is_nested
    return value.layout is torch.strided and not special


def load_weights(model: nn.Module, weights: str) -> None:
    """Load ``weights`` into ``model``, in place; a head of a different size keeps its own.

    Raises:
        ValueError: See ``read_weights``; or names or sizes outside the head do not match the model's.
    """
    state, own, head = read_weights(weights), model.state_dict(), head_names(model)
    new_head = any(name not in state or state[name].shape != own[name].shape for name in head)
    wanted = own.keys() - head if new_head else own.keys()
    state = {name: value for name, value in state.items() if not (new_head and name in head)}
    problems = {
        # Other programs save averaged weights without it.
        "it lacks": {name for name in wanted - state.keys() if not name.endswith("num_batches_tracked")},
        "the model has no": state.keys() - wanted,
        "of a different size are": {name for name in wanted & state.keys() if state[name].shape != own[name].shape},
        "of whole numbers are": {
            name
            for name in wanted & state.keys()
            if own[name].is_floating_point() and not state[name].is_floating_point()
        },
    }
    wrong = [f"{words} {_some(names)}" for words, names in problems.items() if names]
    if wrong:
        raise ValueError(
            f'recipe.model.weights = "{weights}": these weights belong to a different model: {"; ".join(wrong)}; '
            "check recipe.model.name"
        )
    model.load_state_dict(state, strict=False)


def head_names(model: nn.Module) -> set[str]:
    """The names of the classifier's parameters and buffers in the model's state dict."""
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = [head for head in (classifier if isinstance(classifier, tuple) else (classifier,)) if head is not None]
    prefixes = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return {name for name in model.state_dict() if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the head trainable, in place; batch norm elsewhere stays in evaluation mode."""
    head = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.frozen = True
            module.eval()


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN_NAMES])
    return f"{shown} and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else shown
