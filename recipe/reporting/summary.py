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
    """The content of ``summary.json``. Accuracies and errors are in per cent; ``classes`` are names, from 0 on.

    They are those of the weights that are used later: of the moving average, where the run keeps one.
    """
    measured, averaged = plan.config.recipe.noise_scale, plan.config.recipe.ema.decay is not None
    top1, top5 = ("ema_top1", "ema_top5") if averaged else ("top1", "top5")
    best = max(reversed(history.validations), key=lambda validation: validation[top1])  # the latest among equals
    errors = [100 - validation[top1] for validation in history.validations[-LAST_EPOCHS:]]
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
        "final_top1": history.validations[-1][top1],
        "final_top5": history.validations[-1][top5],
        "best_top1": best[top1],
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
    """``summary.json`` of a complete run in this folder; None if there is none that can be used."""
    try:
        summary: dict[str, Any] = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
        format_summary(summary, output)
        summary["versions"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
    return summary


def format_summary(summary: dict[str, Any], output: Path, plan: Plan | None = None, *, width: int | None = None) -> str:
    """The summary for people, in lines of at most ``width``, by default the terminal's.

    With what to type next, as far as ``plan`` is given.
    """
    width, folder = width or columns(), printable(str(output))
    summary = {key: printable(value) if isinstance(value, str) else value for key, value in summary.items()}
    ranks = counted(summary["world_size"], "rank") + (f" of {summary['hosts']} hosts" if summary["hosts"] > 1 else "")
    speed = "" if summary["images_per_second"] is None else f"{summary['images_per_second']:,.0f} images/s, "
    skipped = f", {summary['skipped_steps']} skipped by overflow" if summary["skipped_steps"] else ""
    last = min(LAST_EPOCHS, summary["epochs"])
    batches = " to ".join(f"{batch:,}" for batch in dict.fromkeys((summary["global_batch"], _final_batch(summary))))
    rows = [
        (
            "trained",
            f"{summary['model']} on {summary['data']}: {counted(summary['epochs'], 'epoch')} at global batch "
            f"{batches}, {summary['precision']}, {ranks} on {summary['device']}",
        ),
        (
            "top-1",
            f"{summary['final_top1']:.2f} % at the end, {summary['best_top1']:.2f} % at best "
            f"(epoch {summary['best_epoch'] + 1}); median error of the last {counted(last, 'epoch')} "
            f"{summary['median_error_last_epochs']:.2f} %"
            + (", all by the averaged weights" if summary.get("weights") == "averaged" else ""),
        ),
        ("speed", f"{speed}{summary['steps']:,} steps{skipped}, {_duration(summary['wall_seconds'])} in all"),
        *_noise_scale(summary),
        ("files", f"{folder}: plan.json, metrics.jsonl, train.log, summary.json"),
    ]
    if summary["best_checkpoint"] is not None:
        rows.append(("best weights", summary["best_checkpoint"]))
    if summary["bad_images"]:
        rows.append(("bad images", f"{len(summary['bad_images'])} could not be read, listed in summary.json"))
    if summary.get("decoded_by_pil"):
        slow = f"{summary['decoded_by_pil']:,} times by the slower decoder: no JPEG, or one that"
        rows.append(("decoded", f"{slow} the faster one does not take"))
    ranks_option = "" if summary["world_size"] == 1 else f"--num_gpus {summary['world_size']} "
    if summary["hosts"] > 1:
        ranks_option = "--hostfile … "
    command = (
        f"{_launcher()} -q {ranks_option}recipe/train.py --deepspeed_config {folder}/plan.json --output {folder}-again"
    )
    rows.append(("again", " \\\n".join(wrap(command, width - LABEL_WIDTH - 4))))
    following = None if plan is None else _following_plan(plan)
    if following is not None:
        rate, warmup = following.schedule.peak_rate, following.schedule.warmup_steps
        rows.append(
            (
                "next",
                f"--set train_batch_size={following.global_batch} with another --output: peak rate {rate:.6g}, "
                + (f"warmup of {counted(warmup, 'step')}" if warmup else "no warmup"),
            )
        )
    return fields(rows, width)


def _following_plan(plan: Plan) -> Plan | None:
    """The plan of twice the batch or, where that leaves a single step per epoch, of half of it; None if neither works.

    What the file has written out against the rules was meant for its own batch, and is "auto" here.
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


def _noise_scale(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines on it, if the run measured it; the summaries of earlier versions do not know it."""
    found = summary.get("noise_scale")
    if not found:
        return []
    lines = in_words(found, _final_batch(summary), summary.get("train_images"), summary["steps"])
    return [("noise scale", "\n".join(lines))]


def _final_batch(summary: dict[str, Any]) -> int:
    """The global batch at the end; the summaries of earlier versions had one throughout."""
    batch: int = summary.get("final_global_batch", summary["global_batch"])
    return batch


def _launcher() -> str:
    """The launcher's name as it can be typed here."""
    return "deepspeed" if shutil.which("deepspeed") else os.path.relpath(Path(sys.executable).parent / "deepspeed")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + (f"{minutes} min " if hours or minutes else "") + f"{rest} s"
