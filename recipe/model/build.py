"""timm's classifiers with the paper's initialisation, and their parameter groups for weight decay."""

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from recipe.model.batchnorm import BatchNorm, Statistics, convert_batchnorm
from recipe.model.weights import freeze_backbone, load_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


def build_model(
    name: str,
    num_classes: int,
    seed: int,
    statistics: Statistics,
    zero_init_last: bool = True,
    weights: str | None = None,
    freeze: Literal["none", "backbone"] = "none",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Build timm's architecture ``name`` on the CPU, with random or given weights and converted batch norms.

    A ResNet gets the paper's initialisation (Goyal et al. 2017, §5.1), any other architecture keeps timm's. The global
    random number generators are left unchanged.

    Args:
        name: one of ``timm.list_models()``; a tag, as in "resnet50.a1_in1k", loads timm's weights of that name.
        seed: of the random weights; the same seed gives the same weights in every process.
        statistics: of the batch norms, see :class:`recipe.model.BatchNorm`.
        zero_init_last: whether the last batch norm of each residual block starts with γ = 0, else with γ = 1.
        weights: the initial weights instead of random ones, see ``recipe.model.weights.read_weights``; a head for a
            different number of classes is drawn from ``seed``.
        freeze: "backbone" trains only the head.
        gradient_checkpointing: whether the backward pass recomputes activations instead of keeping them.

    Raises:
        ValueError: timm has no such classifier, or the weights or an option do not fit it.
    """
    architecture, dot, tag = name.partition(".")
    if architecture not in timm.list_models() or (dot and not (tag and timm.is_model_pretrained(name))):
        raise ValueError(_unknown_name(name))
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which also seeds the CUDA generators.
        torch.default_generator.manual_seed(seed)
        model = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
        if getattr(model, "num_classes", None) != num_classes:
            raise ValueError(f'recipe.model.name = "{name}": timm cannot build a classifier from it')
        if isinstance(model, ResNet):
            _initialise_as_in_the_paper(model, zero_init_last)
        elif not zero_init_last:
            raise ValueError(
                f"recipe.model.zero_init_last = false: {name} is not a ResNet and keeps timm's initialisation; "
                "remove it"
            )
    if weights is not None or tag:
        load_weights(model, name if weights is None else weights)
    if gradient_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise ValueError(
                f"recipe.model.gradient_checkpointing = true: timm's {name} does not support it; use false"
            ) from None
    model = convert_batchnorm(model, statistics)
    if freeze == "backbone":
        freeze_backbone(model)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for a torch optimizer: the trainable parameters that decay, then those that do not.

    The weights of convolutions and linear layers decay. The paper exempts γ and β of batch norm (§5.1); biases and free
    parameters (position embeddings, layer scales) are exempt here too. Each group keeps the order of
    ``model.parameters()``.
    """
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in kernels], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in kernels], "weight_decay": 0.0},
    ]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters to ``dtype``, in place, but not the buffers, which stay in fp32, as DeepSpeed does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """The number of trainable elements that decay, and of those that do not."""
    decayed, undecayed = (sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.0))
    return decayed, undecayed


def _initialise_as_in_the_paper(model: ResNet, zero_init_last: bool) -> None:
    """Goyal et al. (2017), §5.1: He normal convolutions, classifier N(0, 0.01²), γ = 0 at the end of each block.

    Without ``zero_init_last``, γ = 1 there too, the alternative of Table 2b. He normal with the fan-out,
    std = √(2 / (k² · channels out)), preserves the variance of the gradients through the layers (He et al. 2015, §2.2),
    and fb.resnet.torch, the paper's baseline, uses it.
    """
    if not zero_init_last:
        # timm zeroed them when it built the model, and ``init_weights`` does not undo that.
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                nn.init.ones_(module.weight)
    model.init_weights(zero_init_last=zero_init_last)  # the convolutions; torch starts the other γ at 1 and β at 0
    classifier = model.get_classifier()
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


def _unknown_name(name: str) -> str:
    plain = re.split("[:/]", name)[-1]
    models = timm.list_pretrained() if "." in plain else timm.list_models()
    close = difflib.get_close_matches(plain, models, n=1)
    reason = (
        "timm has no such model"
        if plain == name
        else "must be the name of a timm architecture; a hub address or a path goes into recipe.model.weights"
    )
    remedy = f'did you mean "{close[0]}"?' if close else "timm.list_models() in Python lists its models"
    return f'recipe.model.name = "{name}": {reason}; {remedy}'


def check_image_sizes(model: nn.Module, training: Iterable[tuple[int, int]], validation: int, samples: int) -> None:
    """Refuse image sizes that the model does not accept, and those that leave batch norm a single value per channel.

    Args:
        training: pairs of an epoch and the image size from that epoch on.
        validation: the image size in validation, which uses running averages and so needs no second value.
        samples: how many samples batch norm averages over.
    """
    sizes = {size for _, size in training}
    for size in sorted(sizes):
        check_image_size(model, f"recipe.data.image_size = {size}", size, samples)
    if validation not in sizes:
        check_image_size(model, f"recipe.data.validation_image_size = {validation}", validation)


@torch.no_grad()
def check_image_size(model: nn.Module, key: str, image_size: int, samples: int | None = None) -> None:
    """``check_image_sizes`` for the single size that ``key`` asks for; leaves the model in training mode."""
    values: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0].numel() // inputs[0].shape[1]))
        for module in model.modules()
        if isinstance(module, BatchNorm)
    ]
    model.eval()
    try:
        weight = next(model.parameters())
        model(torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{key}: the model does not accept images of this size: {error}") from None
    for hook in hooks:
        hook.remove()
    if samples is not None and values and min(values) * samples < 2:
        raise ValueError(
            f"{key}: batch norm over {samples} image averages over a single value; use a larger micro-batch or a "
            "larger image"
        )
    model.train()
