"""The only place that calls ``deepspeed.initialize``, and the workarounds for DeepSpeed's traps."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups, logger
from torch import Tensor, nn
from torch.distributed import HashStore, ProcessGroup, Store, distributed_c10d

from recipe.engine.averaging import WeightAverage
from recipe.engine.optimizers import make_optimizer
from recipe.engine.overlap import OverlappedReduction, fill_in_gradients
from recipe.engine.precision import loss_scale, update_together
from recipe.engine.schedule import PaperLR
from recipe.plan import RateSchedule

SLOW_STORAGE = 10e6  # bytes per second; a rank whose storage is no slower is waited for


def join_process_group(device: torch.device, timeout: timedelta, store: Store | None = None) -> None:
    """Join the process group described by the environment (RANK, WORLD_SIZE, MASTER_ADDR …), by default of one rank.

    Args:
        device: The device of this rank; the backend is NCCL for GPUs, gloo otherwise.
        timeout: The timeout of collectives, including DeepSpeed's own.
        store: The store for the rendezvous, instead of a new one at MASTER_ADDR.
    """
    # DeepSpeed would spend two minutes compiling its shared-memory op at the first start; gloo is good enough.
    __compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        rank, world_size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        dist.init_process_group(
            backend,
            store=HashStore() if store is None and world_size == 1 else store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            # Without it, each barrier on a GPU warns that it uses the current one.
            device_id=device if device.type == "cuda" else None,
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    # DeepSpeed reduces over a clone of the group, whose timeout would be half an hour.
    _set_timeout(timeout, groups._get_data_parallel_group())


@contextmanager
def waiting_for_storage(usual_seconds: float, checkpoint_bytes: int) -> Iterator[None]:
    """Let the ranks wait longer than the usual timeout while one of them writes or reads a checkpoint."""
    _set_timeout(timedelta(seconds=usual_seconds + checkpoint_bytes / SLOW_STORAGE))
    try:
        yield
    finally:
        _set_timeout(timedelta(seconds=usual_seconds))


def _set_timeout(timeout: timedelta, group: ProcessGroup | None = None) -> None:
    (getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout)(timeout, group)  # older torch: the latter


def deepspeed_config(config: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The part of a resolved config for DeepSpeed: all but ``recipe``, with monitors writing below ``output``."""
    passed_on = {key: value for key, value in config.items() if key != "recipe"}
    for monitor in ("tensorboard", "csv_monitor"):
        section = passed_on.get(monitor, {})
        if section.get("enabled") and not section.get("output_path"):
            named = {"output_path": str(output), "job_name": section.get("job_name", monitor)}
            passed_on[monitor] = section | named
    return passed_on


def start_engine(
    model: nn.Module,
    parameter_groups: list[dict[str, Any]],
    deepspeed_config: Mapping[str, Any],
    schedule: RateSchedule,
    ema_decay: float | None = None,
) -> DeepSpeedEngine:
    """DeepSpeed's engine for ``model``, with the optimizer of the config and the rate of ``schedule``.

    With ``ema_decay``, the decay per image, it also keeps a ``WeightAverage``.
    """
    filled = [group for group in parameter_groups if group["params"]]
    dtype = next(model.parameters()).dtype
    if dtype == torch.float64:
        # DeepSpeed reduces only gradients of the accelerator's own types, and in fp32 by default.
        accelerator = get_accelerator()
        dtypes = [*accelerator.supported_dtypes(), dtype]
        accelerator.supported_dtypes = lambda: dtypes
    initial = [[parameter.detach().float().clone() for parameter in group["params"]] for group in filled]
    # fp16, bf16 and ZeRO create the momentum with a real optimizer step on zero gradients, which would decay the
    # weights once and leave λ·w in the momentum. Without weight decay that step changes nothing.
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=[group | {"weight_decay": 0.0} for group in filled],
        optimizer=partial(make_optimizer, config=deepspeed_config["optimizer"]),
        config={key: value for key, value in deepspeed_config.items() if key != "optimizer"},
        lr_scheduler=lambda optimizer: PaperLR(optimizer, schedule),
        dist_init_required=False,
    )
    # The engine would give monitors the last scale that the host has read; telemetry gives them that of each step.
    engine._get_optimizer_loss_scale = lambda: None
    if dtype == torch.float64:
        engine.communication_data_type = dtype
    if engine.zero_optimization_stage() == 0:
        if engine.device.type == "cuda":
            use_channels_last(engine)
        engine.basic_optimizer.register_load_state_dict_post_hook(lay_out_like_weights)
        if engine.dp_world_size == 1:
            # DeepSpeed would copy all gradients to one buffer and back to average them over a single rank, which takes
            # a fifth of a step of resnet18 on a CPU.
            engine.allreduce_gradients = partial(fill_in_gradients, list(engine.module.parameters()))
        elif deepspeed_config.get("zero_optimization", {}).get("overlap_comm") is not False:
            overlap_reduction(engine)
    for optimizer_group, group in zip(engine.basic_optimizer.param_groups, filled, strict=True):
        optimizer_group["weight_decay"] = group["weight_decay"]
        optimizer_group.pop("step", None)  # LAMB would count that initial step
    if hasattr(engine.optimizer, "fp32_groups"):  # fp16 and bf16 at stage 0
        # DeepSpeed copies the master weights from the half-precision ones; this undoes their rounding.
        for masters, values in zip(engine.optimizer.fp32_groups, initial, strict=True):
            for master, value in zip(masters, values, strict=True):
                master.data.copy_(value)
        bf16 = deepspeed_config.get("bf16", {})
        update_together(engine, engine.fp16_enabled() or bf16.get("check_grad_overflow", True))
    if ema_decay is not None:
        engine.weight_average = WeightAverage(engine, ema_decay)
    return engine


def set_global_batch(engine: DeepSpeedEngine, batch: int) -> int:
    """Set the global batch of the next updates by changing the accumulation steps, and return their number.

    Call it only between two updates. DeepSpeed's count of micro-batches has to start again, or the first update after
    the change would happen in the middle of an accumulation.
    """
    engine.set_train_batch_size(batch)
    engine.micro_steps = 0
    accumulation: int = engine.gradient_accumulation_steps()
    return accumulation


def use_channels_last(engine: DeepSpeedEngine) -> None:
    """Store kernels, their master copies and momentum in the memory format that cuDNN's convolutions read.

    The data loader's images have it; other kernels would be transposed in each forward and backward pass. This has to
    follow ``deepspeed.initialize``, whose broadcast accepts only contiguous parameters, and is impossible at ZeRO
    stages 1 to 3, where parameters are slices of a flat tensor.
    """
    engine.module.to(memory_format=torch.channels_last)
    for group in engine.basic_optimizer.param_groups:
        for weight in group["params"]:
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    lay_out_like_weights(engine.basic_optimizer)


def lay_out_like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Convert momentum to the memory format of its weights: a checkpoint can come from a machine with a different one.

    The fused kernel assumes that they match, and on a CPU does not check it.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight).copy_(value)


def overlap_reduction(engine: DeepSpeedEngine) -> None:
    """Start gradient all-reduce during the backward pass instead of after it, with DeepSpeed's sums and factors."""
    ranks = engine.dp_world_size
    predivide = engine.gradient_predivide_factor()
    before, after = (1 / predivide, predivide / ranks) if engine.postscale_gradients() else (1 / ranks, 1.0)
    reduction = OverlappedReduction(
        (parameter for parameter in engine.module.parameters() if parameter.requires_grad),
        groups._get_data_parallel_group(),
        due=lambda: engine.enable_backward_allreduce and engine.is_gradient_accumulation_boundary(),
        dtype=engine.communication_data_type,
        before=before,
        after=after,
    )
    engine.allreduce_gradients = reduction.finish  # the engine calls it at the end of a backward pass


def backward(engine: DeepSpeedEngine, loss: Tensor) -> None:
    """Backpropagate the mean loss of a micro-batch (a scalar, fp32), scaled as ``engine.step`` will unscale it.

    At ZeRO stage 0 DeepSpeed's fp16 optimizer divides the gradients by the loss scale, but the loss is never multiplied
    by it (upstream PR 8393), so that updates are 65,536 times too small. The hook sets the gradient at the loss to the
    right value, loss scale / accumulation, and changes nothing once DeepSpeed multiplies.
    """
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        scale = loss_scale(engine) / engine.gradient_accumulation_steps()
        loss.register_hook(lambda gradient: scale.to(gradient.dtype))
    engine.backward(loss)


def set_log_level(verbose: bool) -> None:
    """Let DeepSpeed log everything, or only warnings."""
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    for handler in logger.handlers:
        handler.setLevel(logger.level)
