"""Output folders of runs, written by hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def plan(**values: Any) -> dict[str, Any]:
    """A short plan: 10 epochs of 4 steps of 8 images, on one rank."""
    batch = values.pop("train_batch_size", 8)
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "recipe": {
            "batchnorm": {"statistics": 4},
            "data": {
                "train_images": 35,
                "validation_images": 9,
                "workers": 0,
                "source": "synthetic",
                "image_size": 32,
            },
            "model": {"name": "test_resnet", "num_classes": 10},
            "schedule": {"epochs": 10},
            "seed": 0,
        },
    } | values


def step(number: int, loss: float | None, steps_per_epoch: int = 4, **values: Any) -> dict[str, Any]:
    """A step event of ``metrics.jsonl``."""
    return {
        "event": "step",
        "step": number,
        "epoch": number // steps_per_epoch,
        "samples": 8 * (number + 1),
        "lr": 0.1,
        "loss": loss,
        "images_per_second": 100.0,
        "data_wait": 0.05,
        "loss_scale": 1.0,
        "skipped": False,
    } | values


def validation(number: int, top1: float, loss: float | None = 1.0) -> dict[str, Any]:
    """The validation event after step ``number``."""
    return {"event": "validation", "step": number, "epoch": 0, "top1": top1, "top5": 99.0, "loss": loss, "count": 9}


def write_run(
    folder: Path,
    events: Iterable[dict[str, Any]] = (),
    of_plan: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    unfinished_line: str = "",
) -> Path:
    """Write the folder; ``summary`` overrides values of summary.json (None: there is no such file)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(of_plan or plan()))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events) + unfinished_line)
    if summary is not None:
        usual = {
            "model": "test_resnet",
            "data": "digits",
            "precision": "fp32",
            "world_size": 1,
            "hosts": 1,
            "global_batch": 8,
            "final_global_batch": 8,
            "epochs": 10,
            "steps": 40,
            "train_images": 35,
            "skipped_steps": 0,
            "weights": "trained",
            "final_top1": 50.0,
            "best_top1": 50.0,
            "best_epoch": 9,
            "best_checkpoint": None,
            "median_error_last_epochs": 50.0,
            "noise_scale": None,
            "images_per_second": 100.0,
            "wall_seconds": 1.0,
            "bad_images": [],
            "decoded_by_pil": 0,
            "device": "CPU",
            "versions": {"python": "3.11.7", "torch": "2.14.1"},
        }
        (folder / "summary.json").write_text(json.dumps(usual | summary))
    return folder
