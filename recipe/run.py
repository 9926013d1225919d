"""A run from top to bottom: its parts are created and checked, it trains, and it is summarised."""

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from recipe import checkpoints, data, reporting
from recipe.checkpoints import CHECKPOINTS, PLAN, CheckpointError, Data, History, Lock, Resume, Start, manifest
from recipe.config import ConfigError
from recipe.data import BadImageError, Samples, WorkerError
from recipe.distributed import Interrupted, Meeting, Requests, Watch, versions
from recipe.engine import (
    LocalSteps,
    MicroBatchError,
    NoImageError,
    choose_device,
    choose_kernels,
    deepspeed_config,
    device_name,
    evaluate,
    explained_memory,
    join_process_group,
    listen_to_gradients,
    read_overflows,
    seed_generators,
    set_global_batch,
    set_log_level,
    settle_micro_batch,
    slow_precision,
    start_engine,
    train_epoch,
    training_loss,
)
from recipe.model import average_running_statistics, build_model, check_image_sizes, join_neighbours, parameter_groups
from recipe.plan import Plan, format_plan, plan_json
from recipe.reporting import SUMMARY, OutputError, Telemetry

# Their messages are enough for a user, without a traceback.
KNOWN_FAILURES = (BadImageError, CheckpointError, FloatingPointError, MicroBatchError, OutputError, WorkerError)


@dataclass(frozen=True)
class Run:
    """The checked parts of a run, before the ranks' rendezvous; only rank 0 holds the output folder's lock."""

    plan: Plan
    output: Path
    device: torch.device
    model: nn.Module
    samples: tuple[Samples, Samples]
    data: Data
    start: Start
    lock: Lock | None

    def facts(self) -> dict[str, str]:
        """The facts that must be equal on all ranks; see ``recipe.distributed.own_facts``."""
        plan, found = self.plan, self.start.checkpoints
        return {
            "config": plan.config.source.text,
            "device": self.device.type,
            "checkpoint": found[0].path.name if found else "none",
            "data": f"{plan.train_images:,} + {plan.validation_images:,} images, digest {self.data.digest[:8]}",
        }


def prepare(plan: Plan, output: Path, resume: Resume, accept_changes: bool = False) -> Run:
    """Create the parts of a run, lock its folder, and choose the checkpoints to resume from.

    Raises:
        ValueError: the device does not support the precision, the data cannot be read, the model does not fit the data,
            or the output folder belongs to a different run, is in use, or cannot be created.
    """
    recipe, section = plan.config.recipe, plan.config.recipe.data.model_dump()
    try:
        device = choose_device(plan.precision)
        view: dict[str, Any] = {"classes": recipe.model.num_classes, "seed": recipe.seed}
        samples = data.open_samples(section, **view, device=device, workers=plan.workers)
        # Both are empty for synthetic images.
        described = Data(classes=samples[0].class_names, digest=" ".join(part.digest for part in samples).strip())
        model = build_model(seed=recipe.seed, statistics=recipe.batchnorm.statistics, **recipe.model.model_dump())
        check_image_sizes(model, plan.image_sizes, plan.validation_image_size, plan.batchnorm_images)
    except ConfigError:
        raise
    except ValueError as error:
        # Device, data and model know the key and the value, but not the file.
        raise ValueError(f"{plan.config.source.file}: {error}") from error
    # Before looking for checkpoints: until it ends, another run may add and remove some.
    lock = checkpoints.lock(output, subfolder=CHECKPOINTS) if (os.environ.get("RANK") or "0") == "0" else None
    try:
        start = checkpoints.choose_start(plan, output, resume, accept_changes, has_summary=(output / SUMMARY).exists())
        checkpoints.check_data(start, described, output, accept_changes)
    except ValueError:
        checkpoints.unlock(lock)
        raise
    model = model.double() if plan.precision == "fp64" else model
    return Run(plan, output, device, model, samples, described, start, lock)


def train(run: Run, meeting: Meeting, watch: Watch, verbose: bool) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one; return the content of ``summary.json``.

    ``watch`` gets the current step, monitors the wait for data, and is closed when training is over.

    Raises:
        one of ``KNOWN_FAILURES``: its message says what to do.
        Interrupted: a signal ended the run, which is saved.
    """
    started, output, config, recipe = time.monotonic(), run.output, run.plan.config, run.plan.config.recipe
    # DeepSpeed reports these through its own log.
    set_log_level(bool(verbose or config.wall_clock_breakdown or config.memory_breakdown or config.dump_state))
    reporting.make_folder(output / CHECKPOINTS)  # on every host, in case the folder is not shared

    # The engine
    choose_kernels(tf32=recipe.precision is None, cudnn_benchmark=recipe.cudnn_benchmark)
    timeout = timedelta(seconds=recipe.distributed.timeout_seconds)
    join_process_group(run.device, timeout, meeting.group_store)
    plan, why = settle_micro_batch(run.plan, run.model, run.device, run.start.micro_batch_on(run.plan.world_size))
    if why and dist.get_rank() == 0:
        print(f'{format_plan(plan)}\nmax_micro_batch_size "auto": {plan.micro_batch} images, {why}', flush=True)
    join_neighbours(run.model, plan.micro_batch, timeout)
    groups = parameter_groups(run.model, plan.weight_decay)
    passed_on = deepspeed_config(plan.config.model_dump(mode="json", exclude_none=True), output)
    engine = start_engine(run.model, groups, passed_on, plan.schedule, recipe.ema.decay)
    if recipe.local_sgd.steps is not None:
        engine.local_steps = LocalSteps(engine, plan.is_local, plan.equal_after)
    loss_function = training_loss(engine.module, **recipe.loss.model_dump(), compiled=recipe.compile)

    # The starting point and the output
    history, messages = checkpoints.load_run(engine, plan, run.start)
    if history is None:
        history = History(decoded_by_pil=0 if dist.get_rank() else sum(part.decoded_by_pil for part in run.samples))
        messages += reporting.set_former_run_aside(output) if dist.get_rank() == 0 else []
    if dist.get_rank() == 0:
        reporting.remove_summary(output)
        reporting.replace_text(output / PLAN, plan_json(plan))
    telemetry = Telemetry(
        output,
        plan,
        first_step=engine.global_steps,
        validated_steps=history.validated_steps,
        noise_scale=history.noise_scale,
        monitor=engine.monitor.write_events,
    )
    for message in messages + slow_precision(run.device, plan.precision):
        telemetry.say(message)
    loading: dict[str, Any] = {
        "micro_batch": plan.micro_batch,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "workers": plan.workers,
        "device": run.device,
        "dtype": next(engine.module.parameters()).dtype,
        "mean": plan.mean,
        "std": plan.std,
    }
    training, validation = run.samples
    train_loader = data.TrainLoader(training, global_batch=plan.config.batch_changes, seed=recipe.seed, **loading)
    validation_loader = data.ValidationLoader(validation, **loading)
    mixing = data.open_mixing(recipe.data.model_dump(), recipe.model.num_classes, recipe.seed)
    gradient_norms = listen_to_gradients(engine, recipe.noise_scale.every_steps) if recipe.noise_scale.enabled else None

    memory = explained_memory(plan.micro_batch, run.device)
    with memory, Requests(recipe.checkpoint.save_every, timeout, watch.launchers) as requests:

        def save_now(top1: float | None = None) -> None:
            telemetry.sync()
            seconds = time.monotonic() - started
            checkpoints.save_run(engine, output / CHECKPOINTS, plan, run.data, history, seconds, top1)
            requests.saved()
            telemetry.start_clock()

        def expect_step() -> None:
            # Dropout and the like draw from torch's generator; seeded per step, they draw the same after a resume.
            seed_generators(run.device, data.derive_seed("layers", recipe.seed, engine.global_steps, dist.get_rank()))
            watch.step = engine.global_steps
            if plan.timeline.place(engine.global_steps + 1)[1] == 0:
                validation_loader.begin()  # reads its first images during the epoch's last step

        try:
            while True:
                epoch, first_step = plan.timeline.place(engine.global_steps)
                if first_step == 0 and engine.global_steps > history.validated_steps:
                    average_running_statistics(engine.module)
                    if engine.global_steps < plan.total_steps:
                        train_loader.begin_epoch(epoch)
                    batches = requests.watched(watch.awaited(validation_loader.batches()))
                    try:
                        result = evaluate(engine, batches, run.device)
                    except NoImageError as error:
                        save_now()
                        raise BadImageError(f"{error}; progress is saved: the same command resumes") from None
                    history.add(result)
                    history.validations.append(telemetry.validation(result, engine.global_steps - 1))
                    save_now(result.top1_to_keep)
                if engine.global_steps == plan.total_steps:
                    break
                telemetry.start_clock()
                expect_step()
                accumulation = set_global_batch(engine, plan.timeline.phase(engine.global_steps).global_batch)
                batches = mixing.mix(train_loader.epoch(epoch, first_step), engine.global_steps, accumulation)
                for step in train_epoch(engine, watch.awaited(batches), gradient_norms, loss_function):
                    telemetry.step(step)
                    history.add(step)
                    signum, save_due = requests.agree()
                    if signum and plan.equal_after(engine.global_steps):
                        raise Interrupted(signum)
                    if plan.saves_after(engine.global_steps, save_due):
                        save_now()
                    expect_step()
        except Interrupted as end:
            save_now()
            done = f"{engine.global_steps:,} of {plan.total_steps:,} steps"
            telemetry.say(f"ended by {end}, saved after {done}; the same command resumes")
            watch.leave_process_group()
            raise
        finally:
            train_loader.close()
            validation_loader.close()
            telemetry.close()

    # The summary
    read_overflows(engine)
    history.seconds += time.monotonic() - started
    summary = reporting.summarise(
        plan,
        history,
        device=device_name(run.device),
        hosts=len(set(meeting.hosts)),
        skipped_steps=engine.skipped_steps,
        images_per_second=telemetry.images_per_second(),
        best_checkpoint=manifest.best_path(output / CHECKPOINTS),
        classes=run.data.classes,
        versions=versions(),
    )
    if dist.get_rank() == 0:
        reporting.replace_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if config.comms_logger.enabled:
        deepspeed.comm.log_summary()
    watch.leave_process_group()
    return summary
