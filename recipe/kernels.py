"""Which kernels of a GPU compute the model: TF32's where fp32 is asked for, and cuDNN's choice among its algorithms."""

import torch


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
