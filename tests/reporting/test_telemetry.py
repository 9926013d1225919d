"""What a run writes while it trains."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipe.engine.loop import Step, Validation
from recipe.plan.noise_scale import NoiseScale
from recipe.reporting.telemetry import METRICS, OutputError, Telemetry, Writer, drop_later_events
from tests.ranks import run_ranks


def step(number: int, loss: float, *, skipped: bool = False, loss_scale: float = 1.0) -> Step:
    scale = torch.tensor(loss_scale, dtype=torch.float64)
    return Step(number, 0.1 * (number + 1), torch.tensor(loss), scale, torch.tensor(skipped), 0.0, ())


def telemetry(output: Path, steps_per_print: int = 2, events: list | None = None) -> Telemetry:
    result = Telemetry(
        output,
        first_step=0,
        validated_steps=0,
        epochs=2,
        steps_per_epoch=3,
        micro_batch=16,
        global_batch=64,
        steps_per_print=steps_per_print,
        noise_scale=NoiseScale(),
        monitor=(events if events is not None else []).extend,
    )
    result.start_clock()
    return result


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / METRICS).read_text().splitlines()]


def _two_ranks_report(rank: int, world_size: int, folder: str) -> None:
    reporter = telemetry(Path(folder))
    for number in range(6):
        reporter.step(step(number, loss=1.0 + number + rank))
    reporter.close()


def test_the_loss_of_a_step_is_the_mean_over_ranks(tmp_path: Path) -> None:
    run_ranks(2, _two_ranks_report, str(tmp_path))
    written = lines(tmp_path)
    assert [line["loss"] for line in written] == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert [line["step"] for line in written] == [0, 1, 2, 3, 4, 5]
    assert [line["epoch"] for line in written] == [0, 0, 0, 1, 1, 1]
    assert [line["samples"] for line in written] == [64, 128, 192, 256, 320, 384]
    assert [line["lr"] for line in written] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert set(written[0]) == {
        *("event", "step", "epoch", "samples", "lr", "loss", "images_per_second"),
        *("data_wait", "loss_scale", "skipped"),
    }


def _reports(rank: int, world_size: int, folder: str) -> dict:
    found: dict = {}
    output = Path(folder)
    events: list = []
    reporter = telemetry(output, events=events)
    reporter.step(step(0, 1.0))
    found["before the second step"] = (output / METRICS).read_text()
    reporter.step(step(1, 2.0))
    found["after the second step"] = len(lines(output))
    reporter.step(step(2, 3.0))  # the last of its epoch
    found["after the epoch"] = len(lines(output))
    reporter.validation(Validation(50.0, 90.0, math.nan, 10, ()), 2)
    reporter.close()
    found["lines"] = lines(output)
    found["monitored"] = [(name, samples) for name, _, samples in events]
    return found


def test_reports_come_every_steps_per_print_and_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _reports, str(tmp_path))
    assert found["before the second step"] == ""
    assert found["after the second step"] == 2
    assert found["after the epoch"] == 3
    assert found["lines"][-1] == {
        **{"event": "validation", "step": 2, "epoch": 0},
        **{"top1": 50.0, "top5": 90.0, "loss": None, "count": 10},
    }
    assert found["monitored"] == [
        *[("Train/Samples/train_loss", samples) for samples in (64, 128, 192)],
        *[(f"Validation/Samples/{name}", 192) for name in ("top1", "top5", "loss")],
    ]


def _diverges(rank: int, world_size: int, folder: str) -> dict[str, str]:
    outcomes = {}
    for name, bad in {
        "fp32": step(1, math.nan),
        "overflow": step(1, math.inf, skipped=True, loss_scale=2.0**16),
        "at scale 1": step(1, math.nan, skipped=True, loss_scale=1.0),
    }.items():
        reporter = telemetry(Path(folder))
        reporter.step(step(0, 1.0))
        try:
            reporter.step(bad)
            outcomes[name] = "goes on"
        except FloatingPointError as error:
            outcomes[name] = str(error)
        reporter.close()
    return outcomes


def test_a_loss_that_is_not_finite_stops_the_run_unless_it_is_an_overflow(tmp_path: Path) -> None:
    (outcomes,) = run_ranks(1, _diverges, str(tmp_path))
    assert outcomes["overflow"] == "goes on"
    for name in ("fp32", "at scale 1"):
        assert outcomes[name] == "the loss of step 1 is nan: training has diverged at rate 0.2"


def test_metrics_that_do_not_reach_the_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    writer = Writer(tmp_path, first_step=0, validated_steps=0, total_steps=4)
    with pytest.raises(OutputError, match=r"metrics.jsonl: No space left on device; the checkpoints are whole"):
        writer.sync()
    writer.close()


def test_a_resumed_run_drops_the_events_that_it_makes_again(tmp_path: Path) -> None:
    metrics = tmp_path / METRICS
    kept = [{"event": event, "step": step} for step in (0, 1) for event in ("step", "noise_scale")]
    kept.append({"event": "validation", "step": 1})
    later = [{"event": "step", "step": 2}, {"event": "noise_scale", "step": 2}]
    torn = b'{"event": "step", "step": 1e999}\n[]\n' + b"[" * 100_000 + b'\n{"event": "step", "st\xff'
    metrics.write_bytes("".join(json.dumps(event) + "\n" for event in kept + later).encode() + torn)
    assert drop_later_events(metrics, first_step=2, validated_steps=2) == 0
    assert lines(tmp_path) == kept
    # Saved after the last step of an epoch, and killed when the validation had been written but not saved.
    drop_later_events(metrics, first_step=2, validated_steps=0)
    assert lines(tmp_path) == kept[:4]


def test_lines_that_were_removed_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = f"{tmp_path / METRICS} lacks %d of the 4 steps before this one"
    for steps, number in (([0, 3, 3, 7], 2), (range(4), 0)):
        (tmp_path / METRICS).write_text("".join(f'{{"event": "step", "step": {step}}}\n' for step in steps))
        Writer(tmp_path, first_step=4, validated_steps=0, total_steps=9).close()
        assert (lost % number in capsys.readouterr().out) == bool(number)
    (tmp_path / METRICS).unlink()
    Writer(tmp_path, first_step=4, validated_steps=0, total_steps=9).close()
    assert lost % 4 in (tmp_path / "train.log").read_text()


def _measures(rank: int, world_size: int, folder: str) -> list:
    monitored: list = []
    reporter = telemetry(Path(folder), steps_per_print=3, events=monitored)
    # |G|² + tr(Σ) / B with |G|² = 3, tr(Σ) = 640 and micro-batches of 16, whose norms differ from rank to rank, and 64
    norms = torch.tensor([3 + 640 / 16 + (1 if rank else -1), 3 + 640 / 64], dtype=torch.float64)
    reporter.step(replace(step(0, 1.0), gradient_norms=norms))
    reporter.step(step(1, 1.0))
    reporter.step(replace(step(2, 1.0), gradient_norms=norms * math.inf))
    reporter.close()
    return monitored


def test_the_noise_scale_stands_behind_its_step(tmp_path: Path) -> None:
    monitored, _ = run_ranks(2, _measures, str(tmp_path))
    written = lines(tmp_path)
    assert [(line["event"], line["step"]) for line in written] == [
        *[("step", 0), ("noise_scale", 0), ("step", 1), ("step", 2)]
    ]
    values = {"gradient_variance": 640, "gradient_norm_squared": 3, "noise_scale": 640 / 3}
    assert written[1] == {"event": "noise_scale", "step": 0, "epoch": 0} | {
        name: pytest.approx(value, rel=1e-12) for name, value in values.items()
    }
    assert [(name, at) for name, _, at in monitored if name != "Train/Samples/train_loss"] == [
        (f"Train/Samples/{name}", 64) for name in values
    ]
