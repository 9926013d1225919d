"""What a run writes during training."""

import csv
import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from recipe.config.schema import parse_config
from recipe.engine.loop import Step, Validation
from recipe.plan.noise_scale import NoiseScale
from recipe.plan.plan import make_plan
from recipe.reporting.telemetry import METRICS, OutputError, Telemetry, Writer, drop_later_events
from tests.engine.test_start import new_engine, samples
from tests.ranks import run_ranks


def step(number: int, loss: float, *, skipped: bool = False, loss_scale: float = 1.0) -> Step:
    scale = torch.tensor(loss_scale, dtype=torch.float64)
    return Step(number, 0.1 * (number + 1), torch.tensor(loss), scale, torch.tensor(skipped), 0.0, ())


def telemetry(
    output: Path, events: list | None = None, is_fp16: bool = False, world_size: int = 1, train_images: int = 192
) -> Telemetry:
    raw = {
        "train_batch_size": 64,
        "steps_per_print": 2,
        "fp16": {"enabled": is_fp16},
        "recipe": {
            "model": {"name": "test_resnet", "num_classes": 10},
            "max_micro_batch_size": 16,
            "data": {"source": "synthetic", "image_size": 32, "train_images": train_images, "validation_images": 10},
            "schedule": {"epochs": 2, "warmup_epochs": 0, "decay_epochs": [1]},
        },
    }
    result = Telemetry(
        output,
        make_plan(parse_config(raw, "test.json"), world_size),
        first_step=0,
        validated_steps=0,
        noise_scale=NoiseScale(),
        monitor=(events if events is not None else []).extend,
    )
    result.start_clock()
    return result


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / METRICS).read_text().splitlines()]


def _reports(rank: int, world_size: int, folder: str) -> tuple[list[int], list]:
    """The number of lines after each of three steps, and the events for the monitors."""
    # |G|² + tr(Σ) / B with |G|² = 3, tr(Σ) = 640 and B = 16 for micro-batches, whose norms differ per rank, and 64
    norms = torch.tensor([3 + 640 / 16 + (1 if rank else -1), 3 + 640 / 64], dtype=torch.float64)
    output, events, written = Path(folder), [], []
    reporter = telemetry(output, events=events, world_size=world_size)
    for number, gradient_norms in enumerate((norms, None, norms * math.inf)):  # the third step ends the epoch
        reporter.step(replace(step(number, loss=1.0 + number + rank), gradient_norms=gradient_norms))
        written.append(len(lines(output)) if rank == 0 else 0)
    reporter.validation(Validation(50.0, 90.0, math.nan, 10, ()), 2)
    reporter.validation(Validation(50.0, 90.0, 1.5, 10, (), averaged=(60.0, 95.0, math.inf)), 3)
    reporter.close()
    return written, [(name, samples) for name, _, samples in events]


def test_reports_are_means_over_ranks_every_steps_per_print_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    (written, monitored), _ = run_ranks(2, _reports, str(tmp_path))
    assert written == [0, 3, 4]
    first, noise_scale, *others = lines(tmp_path)
    common = {"images_per_second": mock.ANY, "data_wait": 0.0, "loss_scale": 1.0, "skipped": False}
    assert [first, *others] == [
        *(
            {"event": "step", "step": number, "epoch": 0, "samples": 64 * (number + 1), "loss": 1.5 + number}
            | {"lr": pytest.approx(0.1 * (number + 1))}
            | common
            for number in range(3)
        ),
        {
            **{"event": "validation", "step": 2, "epoch": 0},
            **{"top1": 50.0, "top5": 90.0, "loss": None, "count": 10},
        },
        {
            **{"event": "validation", "step": 3, "epoch": 1},
            **{"top1": 50.0, "top5": 90.0, "loss": 1.5, "count": 10},
            **{"ema_top1": 60.0, "ema_top5": 95.0, "ema_loss": None},
        },
    ]
    values = {"gradient_variance": 640, "gradient_norm_squared": 3, "noise_scale": 640 / 3}
    assert noise_scale == {"event": "noise_scale", "step": 0, "epoch": 0} | {
        name: pytest.approx(value, rel=1e-12) for name, value in values.items()
    }
    per_report = ("images_per_second", "data_wait")
    assert monitored == [
        *[(f"Train/Samples/{name}", 64) for name in ("train_loss", *values)],
        *[(f"Train/Samples/{name}", 128) for name in ("train_loss", *per_report)],
        *[(f"Train/Samples/{name}", 192) for name in ("train_loss", *per_report)],
        *[(f"Validation/Samples/{name}", 192) for name in ("top1", "top5", "loss")],
        *[(f"Validation/Samples/{name}", 256) for name in ("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss")],
    ]


def _asynchronous_reports(rank: int, world_size: int, folder: str) -> list[int]:
    """The number of steps that rank 0 has written after each step."""
    reporter = telemetry(Path(folder), world_size=world_size, train_images=64 * 7)
    written = []
    with mock.patch("recipe.reporting.telemetry._is_asynchronous", return_value=True):
        for number in range(8):
            new = step(number, 1.0 + number + rank, skipped=number == 3)
            norms = torch.tensor([2.0 + rank, 1.0]) if number % 3 == 0 else None
            reporter.step(replace(new, gradient_norms=norms))
            if rank == 0:
                written.append(sum(line["event"] == "step" for line in lines(Path(folder))))
        reporter.sync()  # as before a checkpoint
    reporter.close()
    return written


def test_reports_from_a_gpu_are_written_one_step_later_and_complete(tmp_path: Path) -> None:
    written, _ = run_ranks(2, _asynchronous_reports, str(tmp_path))
    assert written == [0, 0, 2, 2, 4, 4, 7, 7]  # at the end of the epoch, at once
    steps = [line for line in lines(tmp_path) if line["event"] == "step"]
    assert [(line["step"], line["loss"], line["skipped"]) for line in steps] == [
        (number, 1.5 + number, number == 3) for number in range(8)
    ]
    scales = [line for line in lines(tmp_path) if line["event"] == "noise_scale"]
    # Squared norms of 2.5 at 16 images and 1 at 64: tr(Σ) = 1.5 · 16 · 64 / 48, |G|² = (64 - 16 · 2.5) / 48.
    assert [(line["step"], line["gradient_variance"], line["noise_scale"]) for line in scales] == [
        (number, pytest.approx(32), pytest.approx(64)) for number in (0, 6)
    ]


def _monitors_fp16(rank: int, world_size: int, folder: str) -> None:
    from recipe.data import Batch
    from recipe.engine.loop import train_epoch

    sections = {
        "fp16": {"enabled": True, "hysteresis": 1},
        "zero_optimization": {"stage": 1},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "csv"},
    }
    engine = new_engine(world_size, 16, 1, **sections)
    reporter = telemetry(Path(folder), is_fp16=True)
    reporter.monitor = engine.monitor.write_events
    for number in range(3):
        images, labels = samples(number, 16)
        images = (images * 1e4 if number == 1 else images).half()  # the second update overflows
        for trained in train_epoch(engine, [Batch(images, labels, torch.ones(16), ())]):
            reporter.step(trained)
    reporter.close()


def test_monitors_get_the_loss_scale_of_each_step_once(tmp_path: Path) -> None:
    run_ranks(1, _monitors_fp16, str(tmp_path))
    written = {}
    for file in (tmp_path / "csv").iterdir():
        with file.open() as text:
            written[file.stem.removeprefix("Train_Samples_")] = [row for row in csv.reader(text) if row[0] != "step"]
    assert [(int(at), float(scale)) for at, scale in written["loss_scale"]] == [
        *[(64, 2.0**16), (128, 2.0**16), (192, 2.0**15)]
    ]
    assert [int(at) for at, _ in written["images_per_second"]] == [128, 192]  # two steps, and the end of the epoch
    assert all(0 <= float(share) <= 1 for _, share in written["data_wait"])


def _skips(rank: int, world_size: int, folder: str) -> None:
    reporter = telemetry(Path(folder), train_images=64 * 200)
    for number in range(102):
        reporter.step(step(number, 1.0, skipped=number != 2))
    reporter.step(step(102, 1.0, skipped=True))
    with pytest.raises(FloatingPointError, match=r"100 updates in a row, up to step 102, were skipped because of"):
        reporter.sync()
    reporter.close()


def test_a_run_that_only_skips_updates_ends(tmp_path: Path) -> None:
    run_ranks(1, _skips, str(tmp_path))


def _diverges(rank: int, world_size: int, folder: str) -> dict[str, str]:
    outcomes = {}
    for name, bad in {
        "fp32": step(1, math.nan),
        "overflow": step(1, math.inf, skipped=True, loss_scale=2.0),
        "at scale 1": step(1, math.nan, skipped=True, loss_scale=1.0),
    }.items():
        reporter = telemetry(Path(folder))
        reporter.step(step(0, 1.0))
        try:
            reporter.step(bad)
        except FloatingPointError as error:
            outcomes[name] = str(error)
        reporter.close()
    return outcomes


def test_a_loss_that_is_not_finite_stops_the_run_unless_it_is_an_overflow(tmp_path: Path) -> None:
    (outcomes,) = run_ranks(1, _diverges, str(tmp_path))
    assert outcomes == dict.fromkeys(
        ("fp32", "at scale 1"), "the loss of step 1 is nan: training has diverged at rate 0.2"
    )


def test_a_failure_to_write_metrics_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    writer = Writer(tmp_path, first_step=0, validated_steps=0, total_steps=4)
    with pytest.raises(OutputError, match=r"metrics.jsonl: No space left on device; the checkpoints are intact"):
        writer.sync()
    writer.close()


def test_a_resumed_run_drops_the_events_that_it_repeats(tmp_path: Path) -> None:
    metrics = tmp_path / METRICS
    kept = [{"event": event, "step": step} for step in (0, 1) for event in ("step", "noise_scale")]
    kept.append({"event": "validation", "step": 1})
    later = [{"event": "step", "step": 2}, {"event": "noise_scale", "step": 2}]
    torn = b'{"event": "step", "step": 1e999}\n[]\n' + b"[" * 100_000 + b'\n{"event": "step", "st\xff'
    metrics.write_bytes("".join(json.dumps(event) + "\n" for event in kept + later).encode() + torn)
    assert drop_later_events(metrics, first_step=2, validated_steps=2) == 2
    assert lines(tmp_path) == kept
    # Saved after the last step of an epoch, then killed between writing the validation and saving it.
    drop_later_events(metrics, first_step=2, validated_steps=0)
    assert lines(tmp_path) == kept[:4]
