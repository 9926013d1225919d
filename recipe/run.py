"""A run from its checked parts to its summary."""

import hashlib
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from recipe.checkpoints import (
    CHECKPOINTS,
    PLAN,
    CheckpointError,
    checkpoint,
    leaves,
    manifest,
    statistics_change,
    training_sha256,
)
from recipe.data import BadImageError, SyntheticLoader, TrainLoader, ValidationLoader, WorkerError, derive_seed
from recipe.distributed import Facts, Interrupted, Meeting, Requests, Watch
from recipe.engine import (
    CPU_MICRO_BATCH,
    GradientNorms,
    NoImageError,
    choose_kernels,
    compile_training,
    cross_entropy,
    evaluate,
    join_process_group,
    largest_on_cpu,
    largest_on_gpu,
    read_overflows,
    set_loudness,
    start_engine,
    train_epoch,
)
from recipe.model import (
    average_running_statistics,
    gather_running_averages,
    join_neighbours,
    parameter_groups,
    restore_running_averages,
)
from recipe.plan import NoiseScale, Plan, fitting_micro_batches, format_plan, plan_json, with_micro_batch
from recipe.preflight import Run
from recipe.reporting import (
    LOG,
    METRICS,
    SUMMARY,
    History,
    OutputError,
    Telemetry,
    cannot_write,
    code_sha256,
    read_summary,
    steps_done,
    summarise,
    versions,
)


class MicroBatchError(RuntimeError):
    """A micro-batch does not fit the GPU."""


# Their messages say all that a person needs.
KNOWN_FAILURES = (BadImageError, CheckpointError, FloatingPointError, MicroBatchError, OutputError, WorkerError)


def train(run: Run, meeting: Meeting, watch: Watch, verbose: bool) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, to the end; return the content of ``summary.json``.

    ``watch`` gets to know the steps, waits for the data with the loop, and is closed when training is over.

    Raises:
        FloatingPointError: the loss is not finite.
        BadImageError: an image cannot be read.
        CheckpointError: a checkpoint cannot be written, or none of those that are there can be loaded.
        MicroBatchError: a micro-batch does not fit the GPU.
        OutputError: a file of the run cannot be written.
        WorkerError: the processes that read images died, or lack what they need.
        Interrupted: a signal asked for the end, and the run is saved.
    """
    output, started = run.output, time.monotonic()
    set_loudness(verbose or asks_for_details(run.plan))
    recipe = run.plan.config.recipe
    try:
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # a host may have a disk of its own
    except OSError as error:
        raise cannot_write(output / CHECKPOINTS, error) from error
    choose_kernels(tf32=recipe.precision is None, cudnn_benchmark=recipe.cudnn_benchmark)
    timeout = timedelta(seconds=recipe.distributed.timeout_seconds)
    join_process_group(run.device, timeout, meeting.group_store)
    run = settle_micro_batch(run)
    plan = run.plan
    join_neighbours(run.model, plan.micro_batch, timeout)
    engine = start_engine(
        run.model,
        parameter_groups(run.model, plan.weight_decay),
        deepspeed_config(plan, output),
        plan.schedule,
    )
    loss_function = compile_training(engine.module, cross_entropy) if recipe.compile else cross_entropy
    history, messages = resume(engine, run)
    if dist.get_rank() == 0:
        remove_summary(output)
        replace_text(output / PLAN, plan_json(plan))
    telemetry = Telemetry(
        output,
        plan,
        first_step=engine.global_steps,
        validated_steps=history.validated_steps,
        noise_scale=history.noise_scale,
        monitor=engine.monitor.write_events,
    )
    if run.device.type == "cpu" and plan.precision == "fp16":
        messages.append("fp16 on a CPU takes many times as long as fp32; --set fp16.enabled=false trains in fp32")
    for message in messages:
        telemetry.say(message)
    train_loader, validation_loader = open_loaders(run, next(engine.module.parameters()).dtype)
    gradient_norms = listen_to_gradients(engine, plan)

    every_minutes = recipe.checkpoint.every_minutes
    save_every = None if every_minutes is None else timedelta(minutes=every_minutes)
    with Requests(save_every, timeout, watch.launchers) as requests:

        def save_now(top1: float | None = None) -> None:
            telemetry.report()
            telemetry.sync()
            save(engine, run, history, time.monotonic() - started, top1)
            requests.saved()
            telemetry.start_clock()

        def expect_step() -> None:
            seed_layers(plan, engine.global_steps)
            watch.step = engine.global_steps
            if engine.global_steps % plan.steps_per_epoch == plan.steps_per_epoch - 1:
                validation_loader.begin()  # its first images are read while the epoch's last step runs

        try:
            while True:
                epoch, first_step = divmod(engine.global_steps, plan.steps_per_epoch)
                if first_step == 0 and engine.global_steps > history.validated_steps:
                    average_running_statistics(engine.module)
                    if engine.global_steps < plan.total_steps:
                        train_loader.begin_epoch(epoch)
                    batches = requests.watched(watch.awaited(validation_loader.batches()))
                    try:
                        result = evaluate(engine, batches, run.device)
                    except NoImageError as error:
                        save_now()
                        raise BadImageError(f"{error}; what was trained is saved: the same command goes on") from None
                    history.validations.append(telemetry.validation(result, engine.global_steps - 1))
                    history.bad_images |= set(result.bad_images)
                    history.decoded_by_pil += result.decoded_by_pil
                    save_now(result.top1)
                if engine.global_steps == plan.total_steps:
                    break
                telemetry.start_clock()
                expect_step()
                batches = watch.awaited(train_loader.epoch(epoch, first_step))
                for step in train_epoch(engine, batches, gradient_norms, loss_function):
                    telemetry.step(step)
                    history.bad_images |= set(step.bad_images)
                    history.decoded_by_pil += step.decoded_by_pil
                    signum, save_due = requests.agree()
                    if signum:
                        raise Interrupted(signum)
                    if saves_within_epoch(plan, engine.global_steps, save_due):
                        save_now()
                    expect_step()
        except Interrupted as end:
            save_now()
            done = f"{engine.global_steps:,} of {plan.total_steps:,} steps"
            telemetry.say(f"ended by {end}, saved after {done}; the same command goes on")
            leave_process_group(watch)
            raise
        except torch.OutOfMemoryError as error:
            raise MicroBatchError(
                f"micro-batches of {plan.micro_batch} images do not fit {device_name(run.device)}: {error}; lower "
                'recipe.max_micro_batch_size, or write "auto"'
            ) from error
        finally:
            train_loader.close()
            validation_loader.close()
            telemetry.close()

    read_overflows(engine)
    history.seconds += time.monotonic() - started
    best = manifest.best(manifest.find(output / CHECKPOINTS))
    summary = summarise(
        plan,
        history,
        device=device_name(run.device),
        hosts=len(set(meeting.hosts)),
        skipped_steps=engine.skipped_steps,
        images_per_second=telemetry.images_per_second(),
        best_checkpoint=None if best is None else best.path,
        classes=() if run.datasets is None else run.datasets[0].class_names,
    )
    if dist.get_rank() == 0:
        replace_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if plan.config.comms_logger.enabled:
        deepspeed.comm.log_summary()
    leave_process_group(watch)
    return summary


def own_facts(run: Run | None, refusal: Exception | None) -> Facts:
    """What this rank brings to the rendezvous: a run that was checked, or why it refuses."""
    return Facts(
        host=socket.gethostname(),
        config_sha256="" if run is None else hashlib.sha256(run.plan.config.source.text.encode()).hexdigest(),
        code_sha256=code_sha256(),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        device="" if run is None else run.device.type,
        checkpoint=run.start.checkpoints[0].path.name if run is not None and run.start.checkpoints else "none",
        data="" if run is None else f"{run.plan.train_images:,} + {run.plan.validation_images:,} images",
        refusal=None if refusal is None else str(refusal),
    )


def leave_process_group(watch: Watch) -> None:
    """End together: a rank that leaves early makes gloo abort the others."""
    dist.barrier()  # until the last has come here, a failure is one to be told
    watch.close()
    dist.barrier()
    dist.destroy_process_group()


def settle_micro_batch(run: Run) -> Run:
    """Where the plan assumes a micro-batch, replace it by the largest that fits every rank's device.

    On as many ranks as before, a run that goes on keeps the one that it had, and with it every bit.
    """
    plan, recipe, start = run.plan, run.plan.config.recipe, run.start
    if not plan.assumes_micro_batch:
        return run
    candidates = fitting_micro_batches(plan.global_batch, plan.world_size, plan.config.statistics)
    if recipe.noise_scale.enabled:  # it compares two sizes of batch
        candidates = [size for size in candidates if size < plan.global_batch]
    earlier = (start.earlier_plan or {}).get("train_micro_batch_size_per_gpu")
    if start.checkpoints and start.checkpoints[0].world_size == plan.world_size and earlier in candidates:
        size, why = earlier, "as before"
    elif run.device.type == "cpu":
        size, why = largest_on_cpu(candidates), f"on a CPU the largest up to {CPU_MICRO_BATCH}"
    else:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}.get(
            plan.precision, torch.float32
        )
        size = largest_on_gpu(candidates, run.model, plan.image_size, dtype, run.device)
        why = f"the largest that fits {device_name(run.device)}"
    plan = with_micro_batch(plan, size)
    if dist.get_rank() == 0:
        print(f'{format_plan(plan)}\nmax_micro_batch_size "auto": {size} images, {why}', flush=True)
    return replace(run, plan=plan)


def summary_of_complete_run(run: Run) -> dict[str, Any] | None:
    """What an earlier launch wrote when it came to the end of this run; None if there is something left to do."""
    if not run.start.checkpoints or run.start.checkpoints[0].step < run.plan.total_steps:
        return None
    return read_summary(run.output)


def unused_data(run: Run) -> str:
    """What to say of a folder of images that a complete run was not trained on, as a part of a sentence."""
    before = dict(leaves(run.start.earlier_plan or {})).get("recipe.data.path")
    now = run.plan.config.recipe.data.path
    if before is None or now is None or os.path.realpath(before) == os.path.realpath(now):
        return ""
    return f" (on {before}; {now} was not looked at)"


def resume(engine: DeepSpeedEngine, run: Run) -> tuple[History, list[str]]:
    """Load the newest checkpoint that is whole, if there are any; return its history and what there is to say.

    Raises:
        CheckpointError: those that are whole cannot be loaded, or none is and the run must resume.
    """
    if not run.start.checkpoints:
        return begin(run), [*run.start.messages, *set_former_run_aside(run.output)]
    loaded, state, messages = checkpoint.load_newest(engine, run.start.checkpoints)
    messages = [*run.start.messages, *messages]
    if loaded is None:
        if run.start.must_resume:
            raise CheckpointError(f"--resume must: no checkpoint is whole: {'; '.join(messages)}")
        checkpoint.set_aside(run.start.checkpoints)
        messages.append("no whole checkpoint is left: training begins anew")
        return begin(run), [*messages, *set_former_run_aside(run.output)]
    restore_running_averages(engine.module, state["running_averages"])
    # Checkpoints of earlier versions do not know the noise scale.
    noise_scale = NoiseScale(**state.get("noise_scale", {}))
    decoded_by_pil = state.get("decoded_by_pil", 0) if dist.get_rank() == 0 else 0
    history = History(state["validations"], set(state["bad_images"]), state["seconds"], noise_scale, decoded_by_pil)
    messages += statistics_change(run.plan, run.start)
    return history, [*messages, f"resumed from {loaded.path}, {engine.global_steps:,} steps done"]


def set_former_run_aside(output: Path) -> list[str]:
    """Give what an earlier run wrote, and left no checkpoint of, a folder of its own; return what there is to say.

    Raises:
        OutputError: it cannot be moved.
    """
    metrics = output / METRICS
    if dist.get_rank() != 0 or not metrics.exists() or not metrics.stat().st_size:
        return []
    steps = steps_done(output)
    aside = next(folder for number in count(1) if not (folder := output / f"former-{number}").exists())
    try:
        aside.mkdir()
        for name in (METRICS, LOG, PLAN, SUMMARY):
            with suppress(FileNotFoundError):
                os.rename(output / name, aside / name)
    except OSError as error:
        raise cannot_write(aside, error) from error
    return [f"training begins at epoch 1: no checkpoint is left of {steps:,} steps, whose files are in {aside}"]


def begin(run: Run) -> History:
    """The history of a run that begins; what every rank holds, all of it, was decoded for the run once."""
    held = sum(part.decoded_by_pil for part in run.datasets or ())
    return History(decoded_by_pil=held if dist.get_rank() == 0 else 0)


def save(engine: DeepSpeedEngine, run: Run, history: History, seconds: float, top1: float | None) -> None:
    """Write a checkpoint, then remove those that the config does not keep. The engine is left as it was."""
    if run.plan.config.recipe.data.on_bad_image == "skip":
        history.bad_images = union_over_ranks(history.bad_images)
    decoded_by_pil = torch.tensor(history.decoded_by_pil, device=run.device)
    dist.all_reduce(decoded_by_pil)
    history.decoded_by_pil = int(decoded_by_pil) if dist.get_rank() == 0 else 0
    # DeepSpeed writes rank 0's running averages. Their mean is what can be used, each rank's own what goes on.
    own = gather_running_averages(engine.module)
    average_running_statistics(engine.module)
    folder, settings, plan = run.output / CHECKPOINTS, run.plan.config.recipe.checkpoint, plan_json(run.plan)
    checkpoint.save(
        engine,
        folder,
        top1=top1,
        client_state=history.state(seconds) | {"running_averages": own},
        plan=plan,
        training_sha256=training_sha256(json.loads(plan)),
    )
    restore_running_averages(engine.module, own)
    if dist.get_rank() == 0:
        manifest.prune(folder, settings.keep_last, settings.keep_best)


def listen_to_gradients(engine: DeepSpeedEngine, plan: Plan) -> GradientNorms | None:
    """What the noise scale is estimated from, if the config asks for it."""
    settings = plan.config.recipe.noise_scale
    if not settings.enabled:
        return None
    return GradientNorms(engine.module.parameters(), lambda: engine.global_steps % settings.every_steps == 0)


def saves_within_epoch(plan: Plan, steps_done: int, due: bool) -> bool:
    """Whether the clock or ``every_steps`` asks for a checkpoint here; at the end of an epoch there is one anyway."""
    every = plan.config.recipe.checkpoint.every_steps
    return (due or (every is not None and steps_done % every == 0)) and steps_done % plan.steps_per_epoch != 0


def seed_layers(plan: Plan, step: int) -> None:
    """Seed what the model draws itself, as dropout, for one step: a resumed run draws the same. The data does not."""
    torch.manual_seed(derive_seed("layers", plan.config.recipe.seed, step, dist.get_rank()))


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
            image_size=plan.image_size,
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


def remove_summary(output: Path) -> None:
    """It is written last: while it is there, the run is complete.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        (output / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(output / SUMMARY, error) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either.

    Raises:
        OutputError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error
