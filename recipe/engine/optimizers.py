"""The optimizers of a config: torch's SGD, and timm's LARS and LAMB; never DeepSpeed's versions."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import Lamb, Lars
from torch.optim import Optimizer


def make_optimizer(groups: list[dict[str, Any]], config: Mapping[str, Any]) -> Optimizer:
    """The optimizer for the section ``optimizer`` of a resolved config, with the weight decay of the ``groups``.

    LARS (You et al. 2017, arXiv 1708.03888) and LAMB (You et al. 2019, arXiv 1904.00962) scale the rate of each layer's
    decayed weights by the ratio of their norm to that of their update. They do not scale the rate of weights without
    decay, the biases and those of batch norm: there LARS is SGD and LAMB is Adam.
    """
    params = dict(config["params"])
    match config["type"]:
        case "LARS":
            return Lars(groups, trust_coeff=params.pop("trust_coefficient"), **params)
        case "LAMB":
            return Lamb(groups, max_grad_norm=None, **params)  # the engine clips if the config says so
        case _:
            # One kernel for all parameters; torch's default on a CPU makes several passes over each.
            return torch.optim.SGD(groups, fused=True, **params)
