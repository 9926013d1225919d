"""timm's classifiers with the paper's initialisation, and the parameters that its weight decay concerns."""

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn
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
    """Build timm's architecture ``name`` on the CPU, weights drawn from ``seed`` or given, batch norms converted.

    A ResNet gets the paper's initialisation (Goyal et al. 2017, §5.1), any other architecture keeps timm's.
    No random generator outside changes.

    Args:
        name: one of ``timm.list_models()``; a tag, as in "resnet50.a1_in1k", asks for timm's weights of this name.
        num_classes: length of the output, which is (N, num_classes).
        seed: of the weights; the same seed gives the same weights in every process.
        statistics: of the batch norms, see :class:`recipe.batchnorm.BatchNorm`.
        zero_init_last: whether the last batch norm of each residual block begins with γ = 0, else with γ = 1.
        weights: what to start from instead of random weights, see ``recipe.model.weights.read_weights``; a head for
            another number of classes is drawn from ``seed``.
        freeze: "backbone" trains the head alone.
        gradient_checkpointing: whether the backward pass computes activations again in place of keeping them.

    Raises:
        ValueError: no such architecture in timm, one that is no classifier of ``num_classes`` classes, or γ = 1
            for one that is no ResNet; or the weights cannot be had, or are not this model's; or timm cannot checkpoint
            its gradients.
    """
    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models() or (tag and not timm.is_model_pretrained(name)):
        raise ValueError(_unknown_name(name))
    if num_classes < 1:
        raise ValueError(f"recipe.model.num_classes = {num_classes}: a classifier needs at least 1")
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds the CUDA generators too.
        torch.default_generator.manual_seed(seed)
        model = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
        if getattr(model, "num_classes", None) != num_classes:
            raise ValueError(f'recipe.model.name = "{name}": timm makes no classifier of it')
        if isinstance(model, ResNet):
            _initialise_as_in_the_paper(model, zero_init_last)
        elif not zero_init_last:
            raise ValueError(
                f"recipe.model.zero_init_last = false: {name} is no ResNet and keeps timm's initialisation; remove it"
            )
    if weights is not None or tag:
        load_weights(model, name if weights is None else weights)
    if gradient_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise ValueError(
                f"recipe.model.gradient_checkpointing = true: timm's {name} does not support it; write false"
            ) from None
    model = convert_batchnorm(model, statistics)
    if freeze == "backbone":
        freeze_backbone(model)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not, for an optimizer of torch.

    The weights of convolutions and linear layers decay. The paper exempts γ and β of batch norm (§5.1); every
    bias and free parameter (position embeddings, layer scales) is exempt here too.

    Returns:
        Two groups, the decayed one first, each parameter once and in the order of ``model.parameters()``.
    """
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in kernels], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in kernels], "weight_decay": 0.0},
    ]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters ``dtype``, in place, as DeepSpeed does: the buffers stay as they are, in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Number of trainable elements that decay, and of those that do not."""
    decayed, undecayed = (
        sum(parameter.numel() for parameter in group["params"]) for group in parameter_groups(model, 0.0)
    )
    return decayed, undecayed


def _initialise_as_in_the_paper(model: ResNet, zero_init_last: bool) -> None:
    """Goyal et al. (2017), §5.1: He normal convolutions, classifier N(0, 0.01²), γ = 0 at each block's end.

    Without ``zero_init_last`` γ = 1 there too, which Table 2b compares with.

    He normal with the fan-out, std = √(2 / (k² · channels out)): it keeps the gradients' variance through the
    layers (He et al. 2015, §2.2), and it is what fb.resnet.torch, the paper's baseline, draws.
    """
    if not zero_init_last:
        # timm has made the zeros when it built the model, and leaves them where it is told to make none.
        for block in (module for module in model.modules() if hasattr(module, "zero_init_last")):
            last = block.bn3 if hasattr(block, "bn3") else block.bn2
            assert isinstance(last, nn.Module)
            assert isinstance(last.weight, nn.Parameter)
            nn.init.ones_(last.weight)
    model.init_weights(zero_init_last=zero_init_last)  # the convolutions; torch makes the other γ = 1, and β = 0
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
    remedy = f'did you mean "{close[0]}"?' if close else "timm.list_models() in Python lists those that it has"
    return f'recipe.model.name = "{name}": {reason}; {remedy}'


def check_image_sizes(model: nn.Module, training: Iterable[tuple[int, int]], validation: int, samples: int) -> None:
    """Refuse images that the model does not take, as a vision transformer takes those of one size only.

    And those of which so few samples leave batch norm a single value to average over, which in validation it does not.
    ``training`` holds an epoch and the size from that on.
    """
    sizes = {size for _, size in training}
    for size in sorted(sizes):
        check_image_size(model, f"recipe.data.image_size = {size}", size, samples)
    if validation not in sizes:
        check_image_size(model, f"recipe.data.validation_image_size = {validation}", validation)


@torch.no_grad()
def check_image_size(model: nn.Module, key: str, image_size: int, samples: int | None = None) -> None:
    """Refuse images of the size that ``key`` asks for, see ``check_image_sizes``; leave the model in training mode."""
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
        raise ValueError(f"{key}: the model takes no such images: {error}") from None
    for hook in hooks:
        hook.remove()
    if samples is not None and values and min(values) * samples < 2:
        raise ValueError(
            f"{key}: batch norm over {samples} image averages over a single value; take a larger micro-batch, or a "
            "larger image"
        )
    model.train()
