"""The summary of a run, for programs (``summary.json``) and for people."""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config import ConfigError, parse_config, printable
from recipe.plan import LABEL_WIDTH, Plan, columns, counted, fields, in_words, make_plan, wrap
from recipe.reporting.files import SUMMARY

if TYPE_CHECKING:
    from recipe.checkpoints import History  # needs torch, which a refused config need not wait for

LAST_EPOCHS = 5  # the paper reports the median error of the last five (§5.1)


def summarise(
    plan: Plan,
    history: "History",
    *,
    device: str,
    hosts: int,
    skipped_steps: int,
    images_per_second: float | None,
    best_checkpoint: Path | None,
    classes: Sequence[str],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``summary.json``. ``classes`` are the class names in order.

    Accuracies and errors are in per cent, of the averaged weights since the run has kept an average.
    """
    measured, averaged = plan.config.recipe.noise_scale, plan.config.recipe.ema.decay is not None

    def accuracy(validation: dict[str, Any], name: str) -> float:
        value: float = validation.get(f"ema_{name}", validation[name]) if averaged else validation[name]
        return value

    *_, last = validations = history.validations
    best = max(reversed(validations), key=lambda validation: accuracy(validation, "top1"))  # the latest among equals
    errors = [100 - accuracy(validation, "top1") for validation in validations[-LAST_EPOCHS:]]
    return {
        "config": plan.config.source.file,
        "model": plan.config.recipe.model.name,
        "data": plan.config.recipe.data.source,
        "precision": plan.precision,
        "world_size": plan.world_size,
        "hosts": hosts,
        "global_batch": plan.global_batch,
        "final_global_batch": plan.config.batches[-1],
        "epochs": plan.epochs,
        "steps": plan.total_steps,
        "train_images": plan.train_images,
        "skipped_steps": skipped_steps,
        "weights": "averaged" if averaged else "trained",
        "final_top1": accuracy(last, "top1"),
        "final_top5": accuracy(last, "top5"),
        "best_top1": accuracy(best, "top1"),
        "best_epoch": best["epoch"],
        "best_checkpoint": None if best_checkpoint is None else str(best_checkpoint),
        "median_error_last_epochs": statistics.median(errors),
        "noise_scale": history.noise_scale.summary(measured.every_steps) if measured.enabled else None,
        "images_per_second": images_per_second,
        "wall_seconds": round(history.seconds, 1),
        "bad_images": sorted(history.bad_images),
        "decoded_by_pil": history.decoded_by_pil,
        "device": device,
        "versions": dict(versions),
        "classes": list(classes),
    }


def read_summary(output: Path) -> dict[str, Any] | None:
    """The ``summary.json`` of a complete run; None if it is missing or unusable."""
    try:
        summary: dict[str, Any] = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
        format_summary(summary, output)
        summary["versions"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
    return summary


def format_summary(summary: dict[str, Any], output: Path, plan: Plan | None = None, *, width: int | None = None) -> str:
    """The summary as text of at most ``width`` columns (default: the terminal's).

    If ``plan`` is given, the last line suggests the next batch size to try.
    """
    width, folder = width or columns(), printable(str(output))
    summary = {key: printable(value) if isinstance(value, str) else value for key, value in summary.items()}
    ranks = counted(summary["world_size"], "rank") + (f" of {summary['hosts']} hosts" if summary["hosts"] > 1 else "")
    speed = "" if summary["images_per_second"] is None else f"{summary['images_per_second']:,.0f} images/s, "
    skipped = f", {summary['skipped_steps']} skipped by overflow" if summary["skipped_steps"] else ""
    last = min(LAST_EPOCHS, summary["epochs"])
    batches = dict.fromkeys((summary["global_batch"], summary["final_global_batch"]))
    rows = [
        (
            "trained",
            f"{summary['model']} on {summary['data']}: {counted(summary['epochs'], 'epoch')} at global batch "
            f"{' to '.join(f'{batch:,}' for batch in batches)}, {summary['precision']}, {ranks} on {summary['device']}",
        ),
        (
            "top-1",
            f"{summary['final_top1']:.2f} % at the end, {summary['best_top1']:.2f} % at best "
            f"(epoch {summary['best_epoch'] + 1}); median error of the last {counted(last, 'epoch')} "
            f"{summary['median_error_last_epochs']:.2f} %"
            + (", all of the averaged weights" if summary["weights"] == "averaged" else ""),
        ),
        ("speed", f"{speed}{summary['steps']:,} steps{skipped}, {_duration(summary['wall_seconds'])} in all"),
    ]
    if summary["noise_scale"] is not None:
        found, batch = summary["noise_scale"], summary["final_global_batch"]
        rows.append(("noise scale", "\n".join(in_words(found, batch, summary["train_images"], summary["steps"]))))
    rows.append(("files", f"{folder}: plan.json, metrics.jsonl, train.log, summary.json"))
    if summary["best_checkpoint"] is not None:
        rows.append(("best weights", summary["best_checkpoint"]))
    if summary["bad_images"]:
        rows.append(("bad images", f"{len(summary['bad_images'])} could not be read, listed in summary.json"))
    if summary["decoded_by_pil"]:
        times = counted(summary["decoded_by_pil"], "time")
        slow = f"{times} by the slower decoder: not JPEGs, or JPEGs that the faster one does not support"
        rows.append(("decoded", slow))
    ranks_option = "" if summary["world_size"] == 1 else f"--num_gpus {summary['world_size']} "
    if summary["hosts"] > 1:
        ranks_option = "--hostfile … "
    launcher = "deepspeed"
    if shutil.which(launcher) is None:
        launcher = os.path.relpath(Path(sys.executable).parent / launcher)
    command = (
        f"{launcher} -q {ranks_option}recipe/train.py --deepspeed_config {folder}/plan.json --output {folder}-again"
    )
    rows.append(("again", " \\\n".join(wrap(command, width - LABEL_WIDTH - 4))))
    next_plan = None if plan is None else _next_plan(plan)
    if plan is not None and next_plan is not None:
        steps = next_plan.schedule.warmup_steps
        warmup = f"warmup of {counted(steps, 'step')}" if steps else "no warmup"
        size = "twice" if next_plan.global_batch > plan.global_batch else "half"
        change = f"--set train_batch_size={next_plan.global_batch} with another --output"
        follows = f"peak rate {next_plan.schedule.peak_rate:.6g}, {warmup}"
        rows.append(("to try", f"{size} the batch: {change} ({follows})"))
    return fields(rows, width)


def _next_plan(plan: Plan) -> Plan | None:
    """The plan at twice the batch, or at half if twice leaves a single step per epoch; None if neither works.

    Values that the file sets explicitly were meant for its own batch size, so the next plan derives them anew.
    """
    rules = plan.config.recipe.schedule
    if rules.batch_size is not None:
        return None
    for batch in (2 * plan.global_batch, plan.global_batch // 2):
        if not 0 < batch <= plan.train_images // 2:
            continue
        raw = plan.config.source.raw
        raw |= {"train_batch_size": batch, "train_micro_batch_size_per_gpu": "auto"}
        raw["gradient_accumulation_steps"] = raw["scheduler"]["params"]["warmup_num_steps"] = "auto"
        if rules.scaling_rule != "none":
            raw["optimizer"]["params"]["lr"] = "auto"
            raw["scheduler"]["params"] |= {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}
        if rules.weight_decay_rule != "constant" or rules.reference_weight_decay is not None:
            raw["optimizer"]["params"]["weight_decay"] = "auto"
        with suppress(ConfigError):
            return make_plan(parse_config(raw, plan.config.source.file), plan.world_size)
    return None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + (f"{minutes} min " if hours or minutes else "") + f"{rest} s"
