"""The engine on real ranks, compared with plain PyTorch on the joined batch."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.engine.optimizers import make_optimizer
from recipe.model.batchnorm import BatchNorm
from recipe.plan.scaling import RateSchedule, Timeline
from tests.ranks import run_ranks

CONSTANT_RATE = RateSchedule(0.1, 0.1, "none", 0, "linear", (), 0.1)
WEIGHT_DECAY = 0.1  # large enough that an extra or missing decay exceeds the rounding


def small_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # No ReLU: updates must depend smoothly on rounding.
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))


def samples(step: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(batch, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (batch,), generator=generator)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [value for name, value in named if not name.endswith("bias")], "weight_decay": WEIGHT_DECAY},
        {"params": [value for name, value in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": WEIGHT_DECAY}}


def plain_training(batches: Sequence[int], optimizer_section: dict[str, Any] = SGD) -> list[dict[str, Tensor]]:
    """Weights before the first step and after each, from plain PyTorch on whole batches of these sizes."""
    model = small_model()
    optimizer = make_optimizer(groups(model), optimizer_section)
    weights = [weights_of(model)]
    for step, batch in enumerate(batches):
        images, labels = samples(step, batch)
        for group in optimizer.param_groups:
            group["lr"] = CONSTANT_RATE.rate(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        weights.append(weights_of(model))
    return weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().float().cpu().clone() for name, parameter in model.named_parameters()}


def new_engine(
    world_size: int,
    batch: int,
    accumulation: int,
    schedule: RateSchedule = CONSTANT_RATE,
    ema_decay: float | None = None,
    model: nn.Module | None = None,
    **sections: Any,
) -> Any:
    """A real engine; fp16 also runs on a CPU, once DeepSpeed is told that it is supported."""
    from deepspeed.accelerator import get_accelerator

    from recipe.engine.start import join_process_group, start_engine

    get_accelerator().is_fp16_supported = lambda: True
    join_process_group(torch.device("cpu"), timedelta(seconds=60))
    model = small_model() if model is None else model
    config = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": batch // accumulation // world_size,
        "gradient_clipping": 0.0,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "optimizer": SGD,
    }
    return start_engine(model, groups(model), config | sections, schedule, ema_decay)


def train_step(
    engine: Any, rank: int, world_size: int, step: int, batch: int, gradient_norms: Any = None, factor: float = 1.0
) -> Any:
    """One optimizer step with the recipe's own loop, on images multiplied by ``factor``."""
    from recipe.data import Batch
    from recipe.engine.loop import train_epoch

    images, labels = samples(step, batch)
    weight = next(engine.module.parameters())
    images, labels = (factor * images).to(weight), labels.to(weight.device)
    micro = engine.train_micro_batch_size_per_gpu()
    order = [(a * world_size + rank) * micro for a in range(engine.gradient_accumulation_steps())]
    batches = [Batch(images[i : i + micro], labels[i : i + micro], torch.ones(micro), ()) for i in order]
    (result,) = train_epoch(engine, batches, gradient_norms)
    return result


def train_steps(engine: Any, rank: int, world_size: int, batches: Sequence[int]) -> list[dict[str, Tensor]]:
    """The master weights before the first step and after each, with a step for each of ``batches``."""
    from recipe.engine.start import set_global_batch

    history = [master_weights(engine)]
    for step, batch in enumerate(batches):
        if batch != engine.train_batch_size():
            set_global_batch(engine, batch)
        train_step(engine, rank, world_size, step, batch)
        history.append(master_weights(engine))
    return history


def master_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights that the optimizer keeps."""
    from deepspeed.utils import safe_get_full_fp32_param

    names = [name for name, _ in engine.module.named_parameters()]
    if hasattr(engine.optimizer, "fp32_groups"):
        (conv, linear), (conv_bias, linear_bias) = engine.optimizer.fp32_groups
        return {
            name: value.detach().cpu().clone()
            for name, value in zip(names, (conv, conv_bias, linear, linear_bias), strict=True)
        }
    if engine.zero_optimization_stage() == 0:
        return weights_of(engine.module)
    return {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in engine.module.named_parameters()}


def updates(history: list[dict[str, Tensor]]) -> list[Tensor]:
    """The change of all weights in each step, as one vector."""
    flat = [torch.cat([value.flatten() for value in weights.values()]) for weights in history]
    return [after - before for before, after in pairwise(flat)]


def relative_error(update: Tensor, reference: Tensor) -> float:
    return float((update - reference).norm() / reference.norm())


PRECISIONS = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}},  # grows at the third update
    "bf16": {"bf16": {"enabled": True, "check_grad_overflow": False}},
}

# Two accumulation steps, then four and one: the six micro-batches of the first three steps are not a multiple of four.
CHANGING = (16, 16, 16, 32, 32, 8)


def _trained(rank: int, world_size: int, sections: dict[str, Any]) -> list[dict[str, Tensor]]:
    return train_steps(new_engine(world_size, CHANGING[0], 2, **sections), rank, world_size, CHANGING)


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(1, "fp32"), (2, "fp32"), (4, "fp32"), (2, "fp16"), (2, "bf16"), (2, "ZeRO 1"), (2, "ZeRO 2"), (2, "ZeRO 3")],
)
def test_updates_equal_plain_pytorch_on_whole_batches_of_changing_size(world_size: int, name: str) -> None:
    sections = PRECISIONS[name] if name in PRECISIONS else {"zero_optimization": {"stage": int(name[-1])}}
    tolerance = {"fp16": 16 * 2**-11, "bf16": 16 * 2**-8}.get(name, 2e-6)
    reference = updates(plain_training(CHANGING))
    for history in run_ranks(world_size, _trained, sections):
        for update, expected in zip(updates(history), reference, strict=True):
            assert relative_error(update, expected) < tolerance


class Waits(TorchDispatchMode):
    """Counts how often the host waits to read a value from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _trained_in_three_precisions(rank: int, world_size: int) -> dict[str, tuple[list[dict], int]]:
    """The weights after each of six steps, and how often the host waited for the device."""
    found = {}
    for name, sections in PRECISIONS.items():
        engine, waits = new_engine(world_size, 16, 2, **sections), Waits()
        with waits:
            history = train_steps(engine, rank, world_size, [16] * 6)
            normalised = small_model().insert(1, BatchNorm(8, statistics=4))
            train_step(new_engine(world_size, 16, 2, model=normalised, **sections), rank, world_size, 0, 16)
        found[name] = history, waits.count
    return found


def test_half_precisions_change_rounding_not_the_method() -> None:
    """Invariant 7: the first update equals fp32's within the precision's rounding; later steps stay close.

    Weights, activations and gradients are each rounded to a relative 2^-11 (fp16) or 2^-8 (bf16) and pass through two
    layers; 4 roundings bound the whole first update. The host never waits for the device.
    """
    (found,) = run_ranks(1, _trained_in_three_precisions)
    assert_as_in_fp32(found)
    assert {name: waits for name, (_, waits) in found.items()} == dict.fromkeys(PRECISIONS, 0)


def assert_as_in_fp32(found: dict[str, tuple[list[dict], int]]) -> None:
    reference = updates(plain_training([16] * 6))
    for precision, rounding in (("fp16", 2**-11), ("bf16", 2**-8)):
        measured = updates(found[precision][0])
        assert relative_error(measured[0], reference[0]) < 4 * rounding
        for update, expected in zip(measured, reference, strict=True):
            assert relative_error(update, expected) < 16 * rounding


def _trained_with_an_overflow(rank: int, world_size: int, overflow_at: int) -> dict[str, Any]:
    from recipe.engine.precision import read_overflows

    schedule = RateSchedule(0.1, 0.4, "gradual", 6, "linear", (), 0.1)
    engine = new_engine(world_size, 16, 2, schedule, fp16={"enabled": True, "hysteresis": 1})
    seen = []
    for step in range(5):
        momentum = [state["momentum_buffer"].clone() for state in engine.optimizer.state.values()]
        weights = master_weights(engine)
        result = train_step(engine, rank, world_size, step, 16, factor=1e4 if step == overflow_at else 1)
        unchanged = all(torch.equal(weights[k], v) for k, v in master_weights(engine).items()) and all(
            torch.equal(before, state["momentum_buffer"])
            for before, state in zip(momentum, engine.optimizer.state.values(), strict=True)
        )
        read_overflows(engine)
        seen.append((result.step, bool(result.skipped), unchanged, result.lr, engine.optimizer.loss_scale))
    return {"seen": seen, "skipped_steps": engine.skipped_steps}


def test_an_overflow_skips_only_its_update() -> None:
    (result,) = run_ranks(1, _trained_with_an_overflow, 2)
    scale = 2.0**16
    assert result["seen"] == [
        # step, skipped, weights and momentum unchanged, rate: 0.1 + 0.3 · t / 6, loss scale afterwards
        (0, False, False, pytest.approx(0.10), scale),
        (1, False, False, pytest.approx(0.15), scale),
        (2, True, True, pytest.approx(0.20), scale / 2),
        (3, False, False, pytest.approx(0.25), scale / 2),
        (4, False, False, pytest.approx(0.30), scale / 2),
    ]
    assert result["skipped_steps"] == 1


def test_the_loss_scale_on_the_device_follows_deepspeeds_rule() -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    from recipe.engine.precision import LossScale

    def new_optimizer() -> Any:
        rule = {"init_scale": 4.0, "scale_window": 3, "min_scale": 0.5, "delayed_shift": 1}
        config = LossScaleConfig(torch.float16, True, 1.0, rule)
        return SimpleNamespace(loss_scale_config=config, verbose=False)

    deepspeeds, ours = new_optimizer(), new_optimizer()
    scale = LossScale(ours, torch.device("cpu"))
    # Grows after three updates, falls to its minimum, and starts counting again after each overflow.
    overflows = [*[False] * 9, True, *[False] * 5, True, *[True] * 7, *[False] * 12]
    for overflowed in overflows:
        FP16_UnfusedOptimizer._update_scale(deepspeeds, overflowed)
        scale.update(torch.tensor(overflowed))
        ours.loss_scale_config.cur_iter += 1
        assert float(scale.value) == deepspeeds.loss_scale_config.cur_scale
    assert scale.to_host() == sum(overflows)
    assert ours.loss_scale_config == deepspeeds.loss_scale_config


SCHEDULES = {
    "gradual": RateSchedule(0.1, 0.5, "gradual", 4, "linear", (6, 8), 0.1),
    "constant": RateSchedule(0.1, 0.5, "constant", 3, "linear", (5,), 0.5),
    "none": RateSchedule(0.5, 0.5, "none", 0, "linear", (1, 7), 0.1),
    "one step": RateSchedule(0.1, 0.5, "gradual", 1, "linear", (), 0.1),
    "log": RateSchedule(0.1, 0.5, "gradual", 4, "log", (6,), 0.1),
    "linear": RateSchedule(0.1, 0.5, "gradual", 4, "linear", decay="linear", timeline=Timeline.of([(0, 8)], 72, 1)),
}


def _rates_of_updates(rank: int, world_size: int, folder: str) -> dict[str, list[float]]:
    """The optimizer's rate in each of nine updates; the run is resumed after five."""
    from recipe.checkpoints import checkpoint
    from recipe.checkpoints.manifest import find

    found = {}
    for name, schedule in SCHEDULES.items():
        rates: list[float] = []
        for first, last in ((0, 5), (5, 9)):
            engine = new_engine(world_size, 8, 2, schedule)
            if first:
                checkpoint.load_newest(engine, find(Path(folder, name)))
            engine.basic_optimizer.register_step_pre_hook(
                lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])  # noqa: B023
            )
            for step in range(first, last):
                train_step(engine, rank, world_size, step, 8)
            if not first:
                Path(folder, name).mkdir()
                state: dict[str, Any] = {"top1": None, "client_state": {}, "plan": "{}", "training_sha256": ""}
                checkpoint.save(engine, Path(folder, name), **state)
        found[name] = rates
    return found


def test_every_update_uses_the_closed_form_rate_even_after_a_resume(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _rates_of_updates, str(tmp_path))
    expected = {
        "gradual": [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.05, 0.05, 0.005],
        "constant": [0.1, 0.1, 0.1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25],
        "none": [0.5, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.005, 0.005],
        "one step": [0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        "log": [0.1, 0.3, 0.41699250014423124, 0.5, 0.5, 0.5, 0.05, 0.05, 0.05],
        "linear": [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1],
    }
    assert found == {name: pytest.approx(rates, rel=1e-12) for name, rates in expected.items()}


def _settings_after_a_resume(rank: int, world_size: int, folder: str) -> dict[str, list[Any]]:
    """Momentum, Nesterov, clipping and the window of the loss scale in a run that resumed with others than before."""
    from recipe.checkpoints import checkpoint
    from recipe.checkpoints.manifest import find

    found: dict[str, list[Any]] = {}
    for name, sections in {
        "fp32": {},
        "fp16": PRECISIONS["fp16"],
        "ZeRO 1": {"zero_optimization": {"stage": 1}},
    }.items():
        path = Path(folder, name)
        path.mkdir()
        engine = new_engine(world_size, 8, 2, **sections)
        train_step(engine, rank, world_size, 0, 8)
        checkpoint.save(engine, path, top1=None, client_state={}, plan="{}", training_sha256="")
        plain = SGD | {"params": {"lr": 0.1, "momentum": 0.5, "nesterov": False, "weight_decay": WEIGHT_DECAY}}
        changed = {"optimizer": plain, "gradient_clipping": 0.75}
        if "fp16" in sections:
            changed["fp16"] = sections["fp16"] | {"loss_scale_window": 7}
        engine = new_engine(world_size, 8, 2, **sections | changed)
        checkpoint.load_newest(engine, find(path))
        assert engine.global_steps == 1
        (group, *_), optimizer = engine.basic_optimizer.param_groups, engine.optimizer
        window = optimizer.loss_scale_config.scale_window if "fp16" in sections else None
        found[name] = [group["momentum"], group["nesterov"], getattr(optimizer, "clip_grad", None), window]
        train_step(engine, rank, world_size, 1, 8)
    return found


def test_a_resumed_run_has_the_settings_of_its_config(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _settings_after_a_resume, str(tmp_path))
    assert found == {
        "fp32": [0.5, False, None, None],
        "fp16": [0.5, False, 0.75, 7],
        "ZeRO 1": [0.5, False, 0.75, None],
    }


def _trained_in_both_memory_formats(rank: int, world_size: int, folder: str) -> dict[str, list[list[dict]]]:
    """Weights in four steps: contiguous, channels_last, and resumed from a checkpoint in the other format."""
    from recipe.checkpoints import checkpoint
    from recipe.checkpoints.manifest import find
    from recipe.engine.start import use_channels_last

    def train(precision: str, turned: Sequence[bool]) -> list[dict]:
        history = []
        for launch, channels_last in enumerate(turned):
            engine = new_engine(world_size, 8, 2, **PRECISIONS[precision])
            if channels_last:
                use_channels_last(engine)
            path = Path(folder, f"{precision} {turned}")
            if launch:
                checkpoint.load_newest(engine, find(path))
            for step in range(4 // len(turned)):
                history += [master_weights(engine)] if not step and not launch else []
                train_step(engine, rank, world_size, engine.global_steps, 8)
                history.append(master_weights(engine))
            kernel = engine.module[0].weight
            (momentum,) = [s["momentum_buffer"] for w, s in engine.optimizer.state.items() if w.dim() == 4]
            assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
            assert momentum.stride() == kernel.stride()
            path.mkdir(exist_ok=True)
            checkpoint.save(engine, path, top1=None, client_state={}, plan="{}", training_sha256="")
        return history

    orders = [(False,), (True,), (False, True), (True, False)]
    return {precision: [train(precision, turned) for turned in orders] for precision in PRECISIONS}


def test_the_memory_format_does_not_matter_even_if_a_resume_changes_it(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _trained_in_both_memory_formats, str(tmp_path))
    for precision, rounding in (("fp32", 1e-6), ("fp16", 2**-11), ("bf16", 2**-8)):
        reference, *others = [updates(history) for history in found[precision]]
        for other in others:
            for update, expected in zip(other, reference, strict=True):
                assert relative_error(update, expected) < 16 * rounding


def _with_an_unused_weight(rank: int, world_size: int) -> Tensor:
    model = small_model()
    model.unused = nn.Parameter(torch.ones(3))
    engine = new_engine(world_size, 8, 1, model=model)
    train_step(engine, rank, world_size, 0, 8)
    return engine.module.unused.detach().clone()


def test_an_unused_weight_decays_on_any_number_of_ranks() -> None:
    # v = λw = 0.1, and Nesterov's step is η (λw + 0.9 v).
    for world_size in (1, 2):
        for weight in run_ranks(world_size, _with_an_unused_weight):
            torch.testing.assert_close(weight, torch.full((3,), 1 - 0.1 * (0.1 + 0.9 * 0.1)))
