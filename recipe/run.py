"""A run from its checked parts to its summary."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from recipe import checkpoint
from recipe.batchnorm import average_running_statistics, join_neighbours
from recipe.checkpoint import CheckpointError
from recipe.data import BadImageError, SyntheticLoader, TrainLoader, ValidationLoader
from recipe.engine import join_process_group, set_loudness, start_engine
from recipe.loop import evaluate, train_epoch
from recipe.model import parameter_groups
from recipe.plan import Plan
from recipe.plan_text import plan_json
from recipe.preflight import CHECKPOINTS, PLAN, SUMMARY, Run
from recipe.summary import History, summarise
from recipe.telemetry import Telemetry

PROCESS_GROUP_TIMEOUT = timedelta(minutes=10)
KNOWN_FAILURES = (BadImageError, CheckpointError, FloatingPointError)  # their messages say all that a person needs


def train(run: Run, verbose: bool) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, to the end; return the content of ``summary.json``.

    Raises:
        FloatingPointError: the loss is not finite.
        BadImageError: an image cannot be read.
    """
    plan, output, started = run.plan, run.output, time.monotonic()
    set_loudness(verbose or asks_for_details(plan))
    join_process_group(run.device, PROCESS_GROUP_TIMEOUT)
    torch.manual_seed(plan.config.recipe.seed + dist.get_rank())  # for dropout; the data has numbers of its own
    if dist.get_rank() == 0:
        (output / SUMMARY).unlink(missing_ok=True)  # it is written last: while it is there, the run is complete
        replace_text(output / PLAN, plan_json(plan))
    join_neighbours(run.model, plan.micro_batch)
    engine = start_engine(
        run.model,
        parameter_groups(run.model, plan.weight_decay),
        deepspeed_config(plan, output),
        plan.schedule,
    )
    history, messages = resume(engine, run)
    telemetry = Telemetry(
        output,
        first_step=engine.global_steps,
        epochs=plan.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        global_batch=plan.global_batch,
        steps_per_print=plan.config.steps_per_print,
        monitor=engine.monitor.write_events,
    )
    if run.device.type == "cpu" and plan.precision == "fp16":
        messages.append("fp16 on a CPU takes many times as long as fp32; --set fp16.enabled=false trains in fp32")
    for message in messages:
        telemetry.say(message)
    train_loader, validation_loader = open_loaders(run, next(engine.module.parameters()).dtype)

    while engine.global_steps < plan.total_steps:
        epoch, first_step = divmod(engine.global_steps, plan.steps_per_epoch)
        telemetry.start_clock()
        for step in train_epoch(engine, train_loader.epoch(epoch, first_step)):
            telemetry.step(step)
            history.bad_images |= set(step.bad_images)
            if saves_within_epoch(plan, engine.global_steps):
                telemetry.report()
                save(engine, run, history, time.monotonic() - started, top1=None)
                telemetry.start_clock()
        average_running_statistics(engine.module)
        result = evaluate(engine, validation_loader.batches(), run.device)
        history.validations.append(telemetry.validation(result, engine.global_steps - 1))
        history.bad_images |= set(result.bad_images)
        save(engine, run, history, time.monotonic() - started, top1=result.top1)

    history.seconds += time.monotonic() - started
    train_loader.close()
    validation_loader.close()
    telemetry.close()
    best = checkpoint.best(checkpoint.find(output / CHECKPOINTS))
    summary = summarise(
        plan,
        history,
        device=device_name(run.device),
        skipped_steps=engine.skipped_steps,
        images_per_second=telemetry.images_per_second(),
        best_checkpoint=None if best is None else best.path,
    )
    if dist.get_rank() == 0:
        replace_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if plan.config.comms_logger.enabled:
        deepspeed.comm.log_summary()
    dist.barrier()
    dist.destroy_process_group()
    return summary


def summary_of_complete_run(run: Run) -> dict[str, Any] | None:
    """What an earlier launch wrote when it came to the end of this run; None if there is something left to do."""
    newest = checkpoint.find(run.output / CHECKPOINTS)[:1] if run.resumes else []
    if not newest or newest[0].step < run.plan.total_steps:
        return None
    try:
        summary: dict[str, Any] = json.loads((run.output / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary


def resume(engine: DeepSpeedEngine, run: Run) -> tuple[History, list[str]]:
    """Load the newest whole checkpoint, if the run goes on from one; return its history and what there is to say."""
    if not run.resumes:
        return History(), []
    newest, messages = checkpoint.newest_whole(run.output / CHECKPOINTS)
    if newest is None:
        return History(), [*messages, "no whole checkpoint is left: training begins anew"]
    state = checkpoint.load(engine, newest.path)
    history = History(state["validations"], set(state["bad_images"]), state["seconds"])
    return history, [*messages, f"resumed from {newest.path}, {engine.global_steps:,} steps done"]


def save(engine: DeepSpeedEngine, run: Run, history: History, seconds: float, top1: float | None) -> None:
    """Write a checkpoint, then remove those that the config does not keep."""
    if run.plan.config.recipe.data.on_bad_image == "skip":
        history.bad_images = union_over_ranks(history.bad_images)
    average_running_statistics(engine.module)
    folder, settings = run.output / CHECKPOINTS, run.plan.config.recipe.checkpoint
    checkpoint.save(engine, folder, top1, history.state(seconds))
    if dist.get_rank() == 0:
        checkpoint.prune(folder, settings.keep_last, settings.keep_best)


def saves_within_epoch(plan: Plan, steps_done: int) -> bool:
    """Whether ``every_steps`` asks for a checkpoint here; at the end of an epoch there is one anyway."""
    every = plan.config.recipe.checkpoint.every_steps
    return every is not None and steps_done % every == 0 and steps_done % plan.steps_per_epoch != 0


def open_loaders(
    run: Run, dtype: torch.dtype
) -> tuple[TrainLoader | SyntheticLoader, ValidationLoader | SyntheticLoader]:
    """This rank's loaders of training and validation data, giving images in ``dtype``."""
    plan, recipe = run.plan, run.plan.config.recipe
    common: dict[str, Any] = {
        "micro_batch": plan.micro_batch,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "device": run.device,
        "dtype": dtype,
        "mean": plan.mean,
        "std": plan.std,
    }
    train_only: dict[str, Any] = {"global_batch": plan.global_batch, "seed": recipe.seed}
    if run.datasets is None:
        loader = SyntheticLoader(
            train_images=plan.train_images,
            validation_images=plan.validation_images,
            classes=recipe.model.num_classes,
            image_size=recipe.data.image_size,
            **train_only,
            **common,
        )
        return loader, loader
    training, validation = run.datasets
    common["workers"] = plan.workers
    return TrainLoader(training, **train_only, **common), ValidationLoader(validation, **common)


def deepspeed_config(plan: Plan, output: Path) -> dict[str, Any]:
    """What DeepSpeed gets to see: the resolved config without ``recipe``, monitors writing below ``output``."""
    config = plan.config.model_dump(mode="json", exclude_none=True)
    del config["recipe"]
    for monitor in ("tensorboard", "csv_monitor"):
        section = config.get(monitor, {})
        if section.get("enabled") and not section.get("output_path"):
            section |= {"output_path": str(output), "job_name": section.get("job_name", monitor)}
    return config


def asks_for_details(plan: Plan) -> bool:
    """Whether the config turns on something that DeepSpeed tells through its own log."""
    config = plan.config
    return bool(config.wall_clock_breakdown or config.memory_breakdown or config.dump_state)


def device_name(device: torch.device) -> str:
    """What the run ran on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} a rank"


def union_over_ranks(names: set[str]) -> set[str]:
    """The names that any rank has."""
    gathered: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, names)
    return set().union(*gathered)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
