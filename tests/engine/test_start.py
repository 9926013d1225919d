"""The engine on real ranks against plain PyTorch on the joined batch."""

from collections.abc import Callable, Sequence
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

from recipe.plan.scaling import RateSchedule, Timeline
from tests.ranks import run_ranks

CONSTANT_RATE = RateSchedule(0.1, 0.1, "none", 0, "linear", (), 0.1)
WEIGHT_DECAY = 0.1  # so large that a decay too many or too few cannot hide in rounding


def small_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Smooth, so that an update depends smoothly on rounding; a ReLU would switch at a pixel now and then.
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))


def samples(step: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(batch, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (batch,), generator=generator)


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": [model[0].weight, model[3].weight], "weight_decay": WEIGHT_DECAY},
        {"params": [model[0].bias, model[3].bias], "weight_decay": 0.0},
    ]


def plain_training(
    steps: int, batch: int | Sequence[int], schedule: RateSchedule = CONSTANT_RATE
) -> list[dict[str, Tensor]]:
    """Weights before the first step and after each, by plain PyTorch on whole batches, which may have a size each."""
    model = small_model()
    optimizer = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9, nesterov=True)
    weights = [weights_of(model)]
    for step in range(steps):
        images, labels = samples(step, batch if isinstance(batch, int) else batch[step])
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
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
    **sections: Any,
) -> Any:
    """A real engine; fp16 runs on the CPU if DeepSpeed is told that it may."""
    from deepspeed.accelerator import get_accelerator

    from recipe.engine.start import join_process_group, start_engine

    get_accelerator().is_fp16_supported = lambda: True
    join_process_group(torch.device("cpu"), timedelta(seconds=60))
    model = small_model()
    config = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": batch // accumulation // world_size,
        "gradient_clipping": 0.0,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "SGD",
            "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": WEIGHT_DECAY},
        },
    }
    return start_engine(model, groups(model), config | sections, schedule, ema_decay)


def train_step(engine: Any, rank: int, world_size: int, step: int, batch: int, gradient_norms: Any = None) -> Any:
    """One optimizer step through the recipe's own loop."""
    from recipe.data import Batch
    from recipe.engine.loop import train_epoch

    images, labels = samples(step, batch)
    weight = next(engine.module.parameters())
    images, labels = images.to(weight), labels.to(weight.device)
    micro = engine.train_micro_batch_size_per_gpu()
    order = [(a * world_size + rank) * micro for a in range(engine.gradient_accumulation_steps())]
    batches = [Batch(images[i : i + micro], labels[i : i + micro], torch.ones(micro), ()) for i in order]
    (result,) = train_epoch(engine, batches, gradient_norms)
    return result


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
    """What each step added to the weights, all in one vector."""
    flat = [torch.cat([value.flatten() for value in weights.values()]) for weights in history]
    return [after - before for before, after in pairwise(flat)]


def relative_error(update: Tensor, reference: Tensor) -> float:
    return float((update - reference).norm() / reference.norm())


def _trained(rank: int, world_size: int, steps: int, batch: int, accumulation: int, sections: dict) -> list[dict]:
    engine = new_engine(world_size, batch, accumulation, **sections)
    history = [master_weights(engine)]
    for step in range(steps):
        train_step(engine, rank, world_size, step, batch)
        history.append(master_weights(engine))
    return history


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_updates_equal_plain_pytorch_on_the_whole_batch(world_size: int, stage: int) -> None:
    if stage and world_size != 2:
        pytest.skip("ZeRO is DeepSpeed's own; two ranks show that it works with the recipe")
    sections = {"zero_optimization": {"stage": stage}} if stage else {}
    reference = updates(plain_training(3, 16))
    for history in run_ranks(world_size, _trained, 3, 16, 4, sections):
        for update, expected in zip(updates(history), reference, strict=True):
            assert relative_error(update, expected) < 2e-6


PRECISIONS = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}},  # grows at the third update
    "bf16": {"bf16": {"enabled": True, "check_grad_overflow": False}},
}

# Two accumulation steps, then four and one: after three steps six micro-batches are counted, and 6 is no multiple of 4.
CHANGING = (16, 16, 16, 32, 32, 8)


def _trained_on_batches_that_change(rank: int, world_size: int, sections: dict) -> list[dict]:
    from recipe.engine.start import set_global_batch

    engine = new_engine(world_size, CHANGING[0], 2, **sections)
    history = [master_weights(engine)]
    for step, batch in enumerate(CHANGING):
        if batch != engine.train_batch_size():
            assert set_global_batch(engine, batch) == batch // 8
        train_step(engine, rank, world_size, step, batch)
        history.append(master_weights(engine))
    return history


@pytest.mark.parametrize(("world_size", "name"), [(1, "fp32"), (2, "fp32"), (2, "fp16"), (2, "bf16"), (2, "ZeRO")])
def test_updates_of_batches_that_change_equal_plain_pytorch(world_size: int, name: str) -> None:
    sections = {"zero_optimization": {"stage": 2}} if name == "ZeRO" else PRECISIONS[name]
    tolerance = {"fp16": 16 * 2**-11, "bf16": 16 * 2**-8}.get(name, 2e-6)
    reference = updates(plain_training(len(CHANGING), CHANGING))
    for history in run_ranks(world_size, _trained_on_batches_that_change, sections):
        for update, expected in zip(updates(history), reference, strict=True):
            assert relative_error(update, expected) < tolerance


class Waits(TorchDispatchMode):
    """Counts how often a value is asked from the device, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _trained_in_three_precisions(rank: int, world_size: int) -> dict[str, tuple[list[dict], int]]:
    """The weights after each of six steps, and how often the host waited for the device in them."""
    found = {}
    for name, sections in PRECISIONS.items():
        engine = new_engine(world_size, 16, 2, **sections)
        history, waits = [master_weights(engine)], Waits()
        for step in range(6):
            with waits:
                train_step(engine, rank, world_size, step, 16)
            history.append(master_weights(engine))
        found[name] = history, waits.count
    return found


def test_half_precisions_change_rounding_not_the_method() -> None:
    """Invariant 7: the first update equals fp32's within the precision's rounding; later steps stay close.

    Weights, activations and gradients are each rounded to a relative 2^-11 (fp16) or 2^-8 (bf16) and pass through two
    layers; 4 roundings bound the whole first update. No precision waits for the device.
    """
    (found,) = run_ranks(1, _trained_in_three_precisions)
    assert_as_in_fp32(found)
    assert {name: waits for name, (_, waits) in found.items()} == dict.fromkeys(PRECISIONS, 0)


def assert_as_in_fp32(found: dict[str, tuple[list[dict], int]]) -> None:
    reference = updates(plain_training(6, 16))
    for precision, rounding in (("fp16", 2**-11), ("bf16", 2**-8)):
        measured = updates(found[precision][0])
        assert relative_error(measured[0], reference[0]) < 4 * rounding
        for update, expected in zip(measured, reference, strict=True):
            assert relative_error(update, expected) < 16 * rounding


def _trained_where_deepspeed_scales_the_loss(rank: int, world_size: int) -> list[dict]:
    """As upstream PR 8393 mends it: ``engine.backward`` multiplies the loss by the loss scale."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original: Callable[..., Any] = DeepSpeedEngine.backward
    DeepSpeedEngine.backward = lambda self, loss, **keywords: original(
        self, loss.float() * self.optimizer.loss_scale, **keywords
    )
    return _trained(rank, world_size, 3, 16, 2, {"fp16": {"enabled": True}})


def test_fp16_stays_right_when_deepspeed_mends_its_loss_scale() -> None:
    reference = updates(plain_training(3, 16))
    (history,) = run_ranks(1, _trained_where_deepspeed_scales_the_loss)
    for update, expected in zip(updates(history), reference, strict=True):
        assert relative_error(update, expected) < 16 * 2**-11


def _trained_with_an_overflow(rank: int, world_size: int, overflow_at: int) -> dict[str, Any]:
    from recipe.data import Batch
    from recipe.engine.loop import train_epoch
    from recipe.engine.precision import read_overflows

    schedule = RateSchedule(0.1, 0.4, "gradual", 6, "linear", (), 0.1)
    engine = new_engine(world_size, 16, 2, schedule, fp16={"enabled": True, "hysteresis": 1})
    seen = []
    for step in range(5):
        images, labels = samples(step, 16)
        if step == overflow_at:
            images = images * 1e4
        images, labels = images.to(engine.device, torch.half), labels.to(engine.device)
        micro = [Batch(images[i : i + 8], labels[i : i + 8], torch.ones(8), ()) for i in (0, 8)]
        momentum = [state["momentum_buffer"].clone() for state in engine.optimizer.state.values()]
        weights = master_weights(engine)
        (result,) = train_epoch(engine, micro)
        unchanged = all(torch.equal(weights[k], v) for k, v in master_weights(engine).items()) and all(
            torch.equal(before, state["momentum_buffer"])
            for before, state in zip(momentum, engine.optimizer.state.values(), strict=True)
        )
        read_overflows(engine)
        seen.append((result.step, bool(result.skipped), unchanged, result.lr, engine.optimizer.loss_scale))
    return {"seen": seen, "skipped_steps": engine.skipped_steps, "history": master_weights(engine)}


def test_an_overflow_skips_its_update_and_loses_nothing_else() -> None:
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


def test_the_loss_scale_on_the_device_follows_deepspeeds_own_rule() -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    from recipe.engine.precision import LossScale

    def new_optimizer() -> Any:
        rule = {"init_scale": 4.0, "scale_window": 3, "min_scale": 0.5, "delayed_shift": 1}
        config = LossScaleConfig(torch.float16, True, 1.0, rule)
        return SimpleNamespace(loss_scale_config=config, verbose=False)

    deepspeeds, ours = new_optimizer(), new_optimizer()
    scale = LossScale(ours, torch.device("cpu"))
    # Grows after three updates, falls to its minimum, and counts anew from the last overflow.
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
    """The rates that stand in the optimizer when it updates, over nine steps; after five the run is resumed."""
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


def test_every_update_uses_the_rate_of_the_closed_form_also_after_a_resume(tmp_path: Path) -> None:
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


def _trained_in_both_memory_formats(rank: int, world_size: int, folder: str) -> dict[str, list[list[dict]]]:
    """Weights before and after four steps: contiguous, channels_last, and resumed from the other's checkpoint."""
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


def test_the_memory_format_changes_nothing_nor_does_a_resume_in_the_other(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _trained_in_both_memory_formats, str(tmp_path))
    for precision, rounding in (("fp32", 1e-6), ("fp16", 2**-11), ("bf16", 2**-8)):
        reference, *others = [updates(history) for history in found[precision]]
        for other in others:
            for update, expected in zip(other, reference, strict=True):
                assert relative_error(update, expected) < 16 * rounding


def _with_an_unused_weight(rank: int, world_size: int) -> Tensor:
    from recipe.data import Batch
    from recipe.engine.loop import train_epoch
    from recipe.engine.start import join_process_group, start_engine

    join_process_group(torch.device("cpu"), timedelta(seconds=60))
    model = small_model()
    model.unused = nn.Parameter(torch.ones(3))
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // world_size,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
        "gradient_clipping": 0.0,
    }
    engine = start_engine(
        model, [*groups(model), {"params": [model.unused], "weight_decay": 0.1}], config, CONSTANT_RATE
    )
    images, labels = samples(0, 8)
    own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    list(train_epoch(engine, [Batch(images[own], labels[own], torch.ones(8 // world_size), ())]))
    return engine.module.unused.detach().clone()


def test_a_weight_that_the_model_does_not_use_decays_on_any_number_of_ranks() -> None:
    # v = λw = 0.1, and Nesterov's step is η (λw + 0.9 v).
    for world_size in (1, 2):
        for weight in run_ranks(world_size, _with_an_unused_weight):
            torch.testing.assert_close(weight, torch.full((3,), 1 - 0.1 * (0.1 + 0.9 * 0.1)))
