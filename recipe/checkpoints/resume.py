"""Where a run starts: at step 0, or from the checkpoints in its output folder, if they are of the same training."""

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from recipe.checkpoints.manifest import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, Data, find, unreadable
from recipe.config import trains_no_batchnorm
from recipe.plan import Plan, plan_json

# A resumed run may differ in these keys: they say where and how it runs, not what is trained.
FREE_TO_CHANGE = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "flops_profiler",
    "comms_logger",
    "recipe.compile",
    "recipe.cudnn_benchmark",
    "recipe.model.gradient_checkpointing",
    "recipe.max_micro_batch_size",
    "recipe.data.path",
    "recipe.data.workers",
    "recipe.data.on_device",
    "recipe.data.on_bad_image",
    "recipe.checkpoint",
    "recipe.noise_scale",
    "recipe.distributed",
)
# Steps are counted in these: with another value the same number of steps is another place in the data.
NEVER_TO_CHANGE = ("train_batch_size", "recipe.schedule.batch_size", "recipe.data.train_images")

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True)
class Start:
    """The checkpoints that a run may resume from, the newest first (none: it starts over), and the newest one's plan.

    ``messages`` are to be printed before training.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    earlier_plan: dict[str, Any] | None = None
    messages: tuple[str, ...] = ()
    must_resume: bool = False

    def micro_batch_on(self, world_size: int) -> int | None:
        """The micro-batch of the newest checkpoint, if it was trained on as many ranks."""
        size = (self.earlier_plan or {}).get("train_micro_batch_size_per_gpu")
        same_ranks = bool(self.checkpoints) and self.checkpoints[0].world_size == world_size
        return size if same_ranks and isinstance(size, int) else None


def check_data(start: Start, data: Data, output: Path, accept_changes: bool) -> None:
    """Refuse images of other classes, or of other names, than those that the newest checkpoint was trained on.

    Raises:
        ValueError: they are others, and ``accept_changes`` does not insist.
    """
    before = start.checkpoints[0].data if start.checkpoints else None
    if before is None or before == data or accept_changes:
        return
    pairs = zip_longest(before.classes, data.classes, fillvalue="missing")
    changed = [f"class {number} was {was}, is {now}" for number, (was, now) in enumerate(pairs) if was != now]
    what = ", ".join(changed[:3]) or "their classes or names have changed"
    raise ValueError(
        f"{output} was trained on other images: {what}; check recipe.data.path, name another --output, or insist with "
        "--accept-changes"
    )


def is_complete(plan: Plan, start: Start) -> bool:
    """Whether nothing is left to train."""
    return bool(start.checkpoints) and start.checkpoints[0].step >= plan.total_steps


def unused_data(plan: Plan, start: Start) -> str:
    """What to say of a folder of images that a complete run was not trained on, as a part of a sentence."""
    before, now = leaves(start.earlier_plan or {}).get("recipe.data.path"), plan.config.recipe.data.path
    if before is None or now is None or os.path.realpath(before) == os.path.realpath(now):
        return ""
    return f" (on {before}; {now} was not looked at)"


def choose_start(plan: Plan, output: Path, resume: Resume, accept_changes: bool, has_summary: bool = False) -> Start:
    """Decide by what is in the folder ``output``; ``has_summary`` says whether it holds a ``summary.json``.

    Raises:
        ValueError: checkpoints of another training, of other ranks under ZeRO, where there should be none, or none
            where there should be some.
    """
    folder = output / CHECKPOINTS
    messages = [f"checkpoint {path} is left aside: its {MANIFEST} cannot be read" for path in unreadable(folder)]
    now = json.loads(plan_json(plan))
    compared = [(checkpoint, *_compare(checkpoint, now, accept_changes)) for checkpoint in find(folder)]
    if not compared:
        if resume == "must":
            raise ValueError(f"--resume must: {folder} holds no checkpoint; check --output")
        if has_summary:
            raise ValueError(f"{output} holds a complete run without its checkpoints; name another --output")
        return Start(messages=tuple(messages))
    if resume == "never":
        raise ValueError(f"--resume never: {output} holds checkpoints; name another --output, or remove it")

    usable = [(checkpoint, differences) for checkpoint, differences, why_not in compared if why_not is None]
    _, differences, why_not = compared[0]
    counted = _counted_otherwise(differences)
    if why_not is not None and (counted or not accept_changes or not usable):
        raise ValueError(
            f"{output} holds another training: {', '.join(differences)}"
            f"{'; its steps are counted in it, so that it cannot be resumed' if counted else ''}; name another "
            f"--output for this one{'' if counted or accept_changes else ', or insist with --accept-changes'}"
        )
    messages += [
        f"checkpoint {checkpoint.path} is left aside: {why_not}" for checkpoint, _, why_not in compared if why_not
    ]
    newest, changes = usable[0]
    if changes:
        messages.append(f"resumes with changes: {', '.join(changes)}")
    stage = plan.config.zero_optimization.stage if plan.config.zero_optimization is not None else 0
    if stage and newest.world_size != plan.world_size:
        raise ValueError(
            f"{newest.path} was written by {newest.world_size} ranks, and ZeRO stage {stage} loads it on as many only; "
            f"start {newest.world_size} ranks instead of {plan.world_size}, or name another --output"
        )
    if newest.step > plan.total_steps:
        raise ValueError(
            f"{newest.path} has {newest.step:,} steps done, more than the {plan.total_steps:,} of this config; raise "
            "recipe.schedule.epochs, or name another --output"
        )
    try:
        earlier_plan = _plan_of(newest)
    except ValueError:
        earlier_plan = None  # it is damaged, and an older one is taken
    return Start(tuple(checkpoint for checkpoint, _ in usable), earlier_plan, tuple(messages), resume == "must")


def training_sha256(plan: dict[str, Any]) -> str:
    """A digest of the keys that say what is trained: where it is the same, so is the training; else plans tell."""
    trained = sorted((key, value) for key, value in stated(plan).items() if not _is_free_to_change(key))
    return hashlib.sha256(json.dumps(trained).encode()).hexdigest()


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``key was a, is b`` for each key of two plans that says another training."""
    old, new = stated(before), stated(now)
    return [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in {**old, **new}
        if not is_same_training(key, old.get(key), new.get(key))
    ]


def stated(plan: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys of a plan with their values, without what is disabled or as without the key."""
    on = {key: value for key, value in plan.items() if not (isinstance(value, dict) and value.get("enabled") is False)}
    return leaves(on)


def is_same_training(key: str, before: Any, now: Any) -> bool:
    """Whether two values of a dotted key of a plan differ at most in where or how a run runs."""
    if key == "recipe.data.source" and {before, now} == {"imagefolder", "pack"}:
        return True  # the same images in the same order, unless a pack has another short side
    return before == now or _is_free_to_change(key)


def _is_free_to_change(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{free}." for free in FREE_TO_CHANGE))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a plan by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def batchnorm_images(plan: dict[str, Any]) -> int | None:
    """The images per batch norm statistic; None if the plan does not say, or no batch norm is trained."""
    keys = leaves(plan)
    if trains_no_batchnorm(str(keys.get("recipe.model.name")), str(keys.get("recipe.model.freeze"))):
        return None
    statistics, accumulation = keys.get("recipe.batchnorm.statistics"), keys.get("gradient_accumulation_steps")
    if statistics == "global":  # those of a micro-batch of every rank
        return int(keys["train_batch_size"]) // accumulation if isinstance(accumulation, int) and accumulation else None
    found = keys.get("train_micro_batch_size_per_gpu") if statistics == "local" else statistics
    return found if isinstance(found, int) else None


def statistics_change(plan: Plan, start: Start) -> list[str]:
    """A message, if other ranks or another micro-batch change the images that batch norm averages over."""
    statistics = plan.config.recipe.batchnorm.statistics
    before, now = (batchnorm_images(of) for of in (start.earlier_plan or {}, json.loads(plan_json(plan))))
    if isinstance(statistics, int) or before is None or before == now:
        return []
    return [
        f'batch norm\'s statistics ("{statistics}") now come from {now} images, before from {before}: the training '
        "changes; with a number of images for recipe.batchnorm.statistics it would not"
    ]


def _compare(checkpoint: Checkpoint, now: dict[str, Any], accept_changes: bool) -> tuple[list[str], str | None]:
    """How the training of ``checkpoint`` differs, and why no run may resume from it (None if it may)."""
    if checkpoint.training_sha256 == training_sha256(now):
        return [], None
    try:
        before = _plan_of(checkpoint)
    except ValueError as error:
        silent = f"{checkpoint.path / PLAN} does not tell"
        return [f"what, {silent} ({error})"], f"{silent} what it is of ({error})"
    differences = differing_keys(before, now)
    if differences and not accept_changes:
        return differences, "it is of another config, and --accept-changes was not given"
    counted = _counted_otherwise(differences)
    return differences, f"its steps are counted in another {', '.join(counted)}" if counted else None


def _counted_otherwise(differences: list[str]) -> list[str]:
    return [text for text in differences if text.startswith(NEVER_TO_CHANGE)]


def _plan_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plan that a checkpoint was trained by, or ``ValueError``."""
    try:
        plan: dict[str, Any] = json.loads((checkpoint.path / PLAN).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(plan, dict):
        raise ValueError("no JSON object")
    return plan
