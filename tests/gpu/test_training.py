"""The checks of tests/engine/ on CUDA, and a real run of ResNet-50."""

import math
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipe.model import BatchNorm
from recipe.plan.scaling import RateSchedule
from recipe.reporting.telemetry import Telemetry
from tests.engine import test_noise_scale as noise_scale, test_start as on_cpu
from tests.launch import events, losses, train_ok
from tests.ranks import run_ranks
from tests.reporting.test_telemetry import telemetry

pytestmark = pytest.mark.gpu


def on_gpu(rank: int, world_size: int, store: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` as ``run_ranks`` does, but with NCCL, as in training."""
    torch.cuda.set_device(rank)
    dist.destroy_process_group()
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world_size)
    return function(rank, world_size, *args)


@pytest.fixture(autouse=True)
def _deepspeed_takes_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # it can be "cpu" because of other tests


def test_half_precisions_change_rounding_not_the_method(tmp_path: Path) -> None:
    """Invariant 7, with the bounds that hold on the CPU; the reference is fp32 on the CPU."""
    (found,) = run_ranks(1, on_gpu, str(tmp_path / "store"), on_cpu._trained_in_three_precisions)
    on_cpu.assert_as_in_fp32(found)


def _waits(rank: int, world_size: int, folder: str) -> dict[str, tuple[int, int]]:
    """For each precision, how often CUDA waits in four optimizer steps, and how many steps are reported."""
    from recipe.data import Batch
    from recipe.engine.loop import train_epoch

    found = {}
    for name, sections in on_cpu.PRECISIONS.items():
        model = on_cpu.small_model().insert(1, BatchNorm(8, statistics=4))
        engine = on_cpu.new_engine(world_size, 16, 2, model=model, **sections)
        weight = next(engine.module.parameters())
        images, labels = on_cpu.samples(0, 8)
        batch = Batch(images.to(weight), labels.to(weight.device), torch.ones(8, device=weight.device), ())
        output = Path(folder, name)
        output.mkdir()
        reporter = telemetry(output, train_images=64 * 10)

        def train(batches: list[Batch], engine: Any = engine, reporter: Telemetry = reporter) -> None:
            for step in train_epoch(engine, batches):
                reporter.step(step)

        train([batch] * 6)  # some libraries wait in their first call
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train([batch] * 8)
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        found[name] = waits, len(events(output, "step"))
    return found


def test_the_loop_never_waits_for_the_device(tmp_path: Path) -> None:
    """Reports do not wait either: the last of these seven steps writes those before it."""
    (found,) = run_ranks(1, on_gpu, str(tmp_path / "store"), _waits, str(tmp_path))
    assert found == dict.fromkeys(on_cpu.PRECISIONS, (0, 6))


def test_an_overflow_skips_only_its_update(tmp_path: Path) -> None:
    (result,) = run_ranks(1, on_gpu, str(tmp_path / "store"), on_cpu._trained_with_an_overflow, 2)
    skipped = [(step, skipped, unchanged) for step, skipped, unchanged, _, _ in result["seen"]]
    assert skipped == [(step, step == 2, step == 2) for step in range(5)]
    rates_and_scales = [(lr, scale) for *_, lr, scale in result["seen"]]
    assert rates_and_scales == [
        (pytest.approx(0.1 + 0.05 * step), 2.0**16 if step < 2 else 2.0**15) for step in range(5)
    ]
    assert result["skipped_steps"] == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradient_norms_equal_those_of_the_cpu(world_size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    expected, cases = noise_scale.norms_by_plain_pytorch(), noise_scale.CASES[world_size]
    store = str(tmp_path / "store")
    for results in run_ranks(world_size, on_gpu, store, noise_scale._norms_of_a_step, cases):
        for found, (_, _, tolerance) in zip(results, cases, strict=True):
            # Convolutions in fp32 can use TF32, which rounds like fp16.
            assert found == pytest.approx(expected, rel=max(tolerance, 8 * 2**-11))


def _memory_formats(rank: int, world_size: int, precision: str) -> dict[str, tuple[str, bool, bool]]:
    """For each convolution and batch norm in a training step, its dtype and whether its output and the gradient of its
    output are channels_last."""
    from recipe.data import SyntheticImages, TrainLoader
    from recipe.engine.loop import train_epoch
    from recipe.engine.start import join_process_group, start_engine
    from recipe.model.batchnorm import BatchNorm
    from recipe.model.build import build_model, parameter_groups

    join_process_group(torch.device("cuda"), timedelta(seconds=60))
    model = build_model("resnet50", 10, seed=0, statistics="global")
    engine = start_engine(
        model,
        parameter_groups(model, 1e-4),
        {
            "train_batch_size": 8,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "nesterov": True}},
        }
        | ({} if precision == "fp32" else {precision: {"enabled": True}}),
        RateSchedule(0.01, 0.01, "none", 0, "linear", (), 0.1),
    )
    seen: dict[str, list[Any]] = {}

    def look(name: str) -> Callable[..., None]:
        def forward_hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            def gradient_hook(gradient: Tensor) -> None:
                seen[name].append(gradient.is_contiguous(memory_format=torch.channels_last))

            seen[name] = [str(output.dtype), output.is_contiguous(memory_format=torch.channels_last)]
            output.register_hook(gradient_hook)

        return forward_hook

    for name, module in engine.module.named_modules():
        if isinstance(module, (nn.Conv2d, BatchNorm)):
            module.register_forward_hook(look(name))
    # 2 × 2 pixels at the end: with one, every format would be both
    images = SyntheticImages(8, classes=10, image_size=64, seed=0, device=torch.device("cuda"))
    loader = TrainLoader(
        images,
        global_batch=8,
        micro_batch=8,
        rank=rank,
        world_size=world_size,
        seed=0,
        workers=0,
        device="cuda",
        dtype=next(engine.module.parameters()).dtype,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    (step,) = train_epoch(engine, loader.epoch(0))
    assert math.isfinite(step.loss.item())
    return {name: tuple(found) for name, found in seen.items()}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "torch.float32"), ("fp16", "torch.float16"), ("bf16", "torch.bfloat16")]
)
def test_channels_last_is_kept_from_the_first_layer_to_the_last(precision: str, dtype: str, tmp_path: Path) -> None:
    (formats,) = run_ranks(1, on_gpu, str(tmp_path / "store"), _memory_formats, precision)
    assert len(formats) == 53 + 53  # ResNet-50's convolutions and batch norms
    assert formats == dict.fromkeys(formats, (dtype, True, True))


def _train_resnet50(config: str, output: Path, *overrides: str) -> None:
    """Run train.py for twenty steps of two micro-batches of 64; synthetic images are the same in every step."""
    launcher = Path(sys.executable).with_name("deepspeed")
    train_ok(
        *("--deepspeed_config", f"ds_configs/{config}.json", "--output", str(output)),
        "--set=train_batch_size=128",
        "--set=train_micro_batch_size_per_gpu=64",
        "--set=tensorboard.enabled=false",
        "--set=recipe.data.source=synthetic",
        "--set=recipe.data.path=null",
        "--set=recipe.data.train_images=2570",
        "--set=recipe.data.validation_images=100",
        "--set=recipe.schedule.epochs=1",
        *overrides,
        launcher=launcher.exists(),
    )


def test_the_same_run_gives_the_same_bits(tmp_path: Path) -> None:
    for name in ("once", "again"):
        _train_resnet50("resnet50_b8192", tmp_path / name)
    assert losses(tmp_path / "once") == losses(tmp_path / "again")


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("resnet50_b8192", ()),
        ("resnet50_b8192_bf16", ()),
        ("resnet50_b8192", ("--set=recipe.compile=true", "--set=recipe.cudnn_benchmark=true")),
        ("resnet50_b8192_n32", ("--set=recipe.compile=true",)),
    ],
)
def test_resnet50_trains_and_validates(config: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "run"
    _train_resnet50(config, output, *overrides)
    steps, (validation,) = events(output, "step"), events(output, "validation")
    assert [step["step"] for step in steps] == list(range(20))
    # 0.1 · 128 / 256, and no warmup up to a batch of 256
    assert {step["lr"] for step in steps} == {0.05}
    assert all(loss is not None and math.isfinite(loss) for loss in losses(output))
    assert losses(output)[0] == pytest.approx(math.log(1000), rel=0.1)
    assert losses(output)[-1] < 0.5 * losses(output)[0]
    assert sum(step["skipped"] for step in steps) <= 2  # the initial loss scale of fp16 can be too large
    assert validation["count"] == 100
    assert math.isfinite(validation["loss"])
