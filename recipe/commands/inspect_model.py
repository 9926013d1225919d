"""Counts the parameters and activations of any timm model for the plan, without allocating memory."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.model import DTYPES, BatchNorm, build_model, cast_parameters, parameter_counts
from recipe.plan import ModelFacts


def inspect_model(
    name: str, num_classes: int, image_size: int, freeze: Literal["none", "backbone"] = "none"
) -> ModelFacts:
    """Build a timm model on the meta device and pass images through it; raises ``ValueError`` if either fails."""
    with torch.device("meta"):
        model = build_model(name, num_classes, seed=0, statistics="local", freeze=freeze)
    decayed, undecayed = parameter_counts(model)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and not module.frozen]
    saved = {}
    for precision, dtype in DTYPES.items():
        cast_parameters(model, dtype)
        try:
            saved[precision] = saved_bytes_per_image(model, image_size, dtype, torch.device("meta"))
        except (RuntimeError, AssertionError) as error:
            cause = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f'recipe.model.name = "{name}": cannot be inspected with images of {image_size} px: {cause}; choose '
                "another model or image size"
            ) from error
    return ModelFacts(
        decayed_parameters=decayed,
        undecayed_parameters=undecayed,
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
        batchnorm_layers=len(norms),
        batchnorm_channels=sum(norm.num_features for norm in norms),
        image_size=image_size,
        saved_bytes=saved,
        frozen_parameters=sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
    )


def saved_bytes_per_image(model: nn.Module, image_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes per image that the forward pass saves for the backward pass, not counting what a whole batch shares."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def saved_bytes(images: int) -> int:
        seen: dict[int, torch.UntypedStorage] = {}  # keeps storages alive, so that no address is reused

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage
            return tensor

        pixels = torch.zeros(images, 3, image_size, image_size, dtype=dtype, device=device)
        labels = torch.zeros(images, dtype=torch.long, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(pixels)
            # The graph, and what it has saved, lives until here.
            F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), labels)
        return sum(storage.nbytes() for storage in seen.values())

    return (saved_bytes(4) - saved_bytes(2)) // 2
