"""Which kernels compute the model: TF32's where fp32 is asked for, cuDNN's choice among its own, compiled ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def choose_kernels(*, tf32: bool, cudnn_benchmark: bool) -> None:
    """Set it for this process; nothing changes on a CPU.

    Args:
        tf32: Whether factors of products in fp32 may be rounded to TF32's 10 bits. Of torch's two ways to say so the
            older one: where the newer one is used, torch's own ``get_float32_matmul_precision`` raises.
        cudnn_benchmark: Whether cuDNN tries its algorithms out for every shape and takes the fastest: in another
            process perhaps another one, which rounds otherwise. Else it takes, by rule, one that always gives the same
            bits (https://docs.pytorch.org/docs/stable/notes/randomness.html).
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.deterministic = not cudnn_benchmark


def compile_training(model: nn.Module, loss_function: Loss) -> Loss:
    """Compile the forward pass of ``model`` in place, and with it the backward pass; return the loss compiled.

    Neither the model's class nor the names of its parameters change, and what DeepSpeed does before and after the
    forward pass stays outside, where it cuts no graph in two. Batches of each image size
    have one shape and kernels of their own, the same in a resumed run.
    """
    model.forward = torch.compile(model.forward, dynamic=False)
    return torch.compile(loss_function, dynamic=False)
