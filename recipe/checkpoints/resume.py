"""Decides where a run starts: at step 0, or from checkpoints of the same run in its output folder."""

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from recipe.checkpoints.manifest import CHECKPOINTS, MANIFEST, PLAN, Checkpoint, Data, find, unreadable
from recipe.config import ConfigError, parse_json, read_text, trains_no_batchnorm
from recipe.plan import Plan, plan_json

# A resumed run may change these keys: they say where and how it runs, not what it trains.
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
# Not even --accept-changes accepts these. The first three define what a step is: with other values, the same step
# number is a different position in the data. With the others, the checkpoint's tensors do not fit, or (zero_init_last)
# have replaced the initial weights that the key is about.
NEVER_TO_CHANGE = (
    "train_batch_size",
    "recipe.schedule.batch_size",
    "recipe.data.train_images",
    "recipe.model.name",
    "recipe.model.num_classes",
    "recipe.model.freeze",
    "recipe.model.zero_init_last",
    "optimizer.type",
    "fp16.enabled",
    "fp16.loss_scale",
    "bf16.enabled",
    "zero_optimization.stage",
)

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True)
class Start:
    """The checkpoints a run can resume from, newest first (none: it starts at step 0), and the plan of the newest.

    ``messages`` are printed before training.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    earlier_plan: dict[str, Any] | None = None
    messages: tuple[str, ...] = ()
    must_resume: bool = False

    def is_complete(self, plan: Plan) -> bool:
        """Whether all steps of ``plan`` are done."""
        return bool(self.checkpoints) and self.checkpoints[0].step >= plan.total_steps

    def micro_batch_on(self, world_size: int) -> int | None:
        """The micro-batch of the newest checkpoint; None if it was trained on another number of ranks."""
        size = (self.earlier_plan or {}).get("train_micro_batch_size_per_gpu")
        same_ranks = bool(self.checkpoints) and self.checkpoints[0].world_size == world_size
        return size if same_ranks and isinstance(size, int) else None


def check_data(start: Start, data: Data, output: Path, accept_changes: bool) -> None:
    """Refuse data whose classes or image names differ from those of the newest checkpoint, unless accepted."""
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


def unused_data(plan: Plan, start: Start) -> str:
    """A remark, as part of a sentence, if a complete run was trained on another folder than the one named now."""
    before, now = leaves(start.earlier_plan or {}).get("recipe.data.path"), plan.config.recipe.data.path
    if before is None or now is None or os.path.realpath(before) == os.path.realpath(now):
        return ""
    return f" (on {before}; {now} was not used)"


def choose_start(plan: Plan, output: Path, resume: Resume, accept_changes: bool, has_summary: bool = False) -> Start:
    """Choose the checkpoints in ``output`` to resume from; ``has_summary``: it contains a ``summary.json``.

    Raises:
        ValueError: the checkpoints belong to a different run, or to another number of ranks under ZeRO; there are some
            despite ``--resume never``, or none despite ``--resume must``.
    """
    folder = output / CHECKPOINTS
    messages = [f"checkpoint {path} is skipped: its {MANIFEST} cannot be read" for path in unreadable(folder)]
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

    usable = [(checkpoint, differences) for checkpoint, differences, problem in compared if problem is None]
    _, differences, problem = compared[0]
    never = _never_to_change(differences)
    if problem is not None and (never or not accept_changes or not usable):
        raise ValueError(
            f"{output} belongs to a different run: {', '.join(differences)}"
            f"{f'; a run cannot resume with another {never[0]}' if never else ''}; name another --output"
            f"{'' if never or accept_changes else ', or add --accept-changes'}"
        )
    messages += [
        f"checkpoint {checkpoint.path} is skipped: {problem}" for checkpoint, _, problem in compared if problem
    ]
    newest, changes = usable[0]
    if changes:
        messages.append(f"resumes with changes: {', '.join(changes)}")
    stage = plan.config.zero_optimization.stage if plan.config.zero_optimization is not None else 0
    if stage and newest.world_size != plan.world_size:
        raise ValueError(
            f"{newest.path} was written by {newest.world_size} ranks, and ZeRO stage {stage} can only load it on as "
            f"many; start {newest.world_size} ranks instead of {plan.world_size}, or name another --output"
        )
    if newest.step > plan.total_steps:
        raise ValueError(
            f"{newest.path} has {newest.step:,} steps done, more than the {plan.total_steps:,} of this config; raise "
            "recipe.schedule.epochs, or name another --output"
        )
    try:
        earlier_plan = _plan_of(newest)
    except ConfigError:
        earlier_plan = None  # the checkpoint is damaged, and an older one will be loaded
    return Start(tuple(checkpoint for checkpoint, _ in usable), earlier_plan, tuple(messages), resume == "must")


def training_sha256(plan: dict[str, Any]) -> str:
    """A digest of what is trained; if two differ, ``differing_keys`` says whether that matters."""
    trained = sorted((key, value) for key, value in stated(plan).items() if not _is_free_to_change(key))
    return hashlib.sha256(json.dumps(trained).encode()).hexdigest()


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``key was a, is b`` for each key that changes what is trained between two plans."""
    old, new = stated(before), stated(now)
    return [
        f"{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in {**old, **new}
        if not is_same_training(key, old.get(key), new.get(key))
    ]


def stated(plan: dict[str, Any]) -> dict[str, Any]:
    """The values of a plan by dotted key, without disabled sections, which are the same as absent ones."""
    return leaves({key: value for key, value in plan.items() if not _is_off(value)})


def _is_off(section: Any) -> bool:
    return isinstance(section, dict) and (section.get("enabled") is False or section.get("stage") == 0)


def is_same_training(key: str, before: Any, now: Any) -> bool:
    """Whether changing a plan's dotted key from ``before`` to ``now`` leaves unchanged what is trained."""
    if key == "recipe.data.source" and {before, now} == {"imagefolder", "pack"}:
        return True  # the same images in the same order, unless the pack has another short side
    return before == now or _is_free_to_change(key)


def _is_free_to_change(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{free}." for free in FREE_TO_CHANGE))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a plan by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def batchnorm_images(plan: dict[str, Any]) -> int | None:
    """The images per batch norm statistic; None if the plan does not say, or trains no batch norm."""
    keys = leaves(plan)
    if trains_no_batchnorm(str(keys.get("recipe.model.name")), str(keys.get("recipe.model.freeze"))):
        return None
    statistics, accumulation = keys.get("recipe.batchnorm.statistics"), keys.get("gradient_accumulation_steps")
    if statistics == "global":  # the micro-batches of all ranks
        return int(keys["train_batch_size"]) // accumulation if isinstance(accumulation, int) and accumulation else None
    found = keys.get("train_micro_batch_size_per_gpu") if statistics == "local" else statistics
    return found if isinstance(found, int) else None


def statistics_change(plan: Plan, start: Start) -> list[str]:
    """A warning if another number of ranks or micro-batch changes the images per batch norm statistic."""
    statistics = plan.config.recipe.batchnorm.statistics
    before, now = batchnorm_images(start.earlier_plan or {}), plan.batchnorm_images
    if isinstance(statistics, int) or before is None or before == now:
        return []
    return [
        f'batch norm\'s statistics ("{statistics}") now come from {now} images, before from {before}. This changes '
        "the training; a number of images for recipe.batchnorm.statistics avoids it"
    ]


def _compare(checkpoint: Checkpoint, now: dict[str, Any], accept_changes: bool) -> tuple[list[str], str | None]:
    """How the configuration of ``checkpoint`` differs, and why it cannot be resumed from (None if it can)."""
    if checkpoint.training_sha256 == training_sha256(now):
        return [], None
    try:
        before = _plan_of(checkpoint)
    except ConfigError as error:
        problem = f"{checkpoint.path / PLAN} cannot be read ({error.problem})"
        return [f"the differences are unknown, because {problem}"], problem
    differences = differing_keys(before, now)
    if differences and not accept_changes:
        return differences, "its config differs, and --accept-changes was not given"
    never = _never_to_change(differences)
    return differences, f"it has another {', '.join(never)}" if never else None


def _never_to_change(differences: list[str]) -> list[str]:
    keys = (text.partition(" ")[0] for text in differences)
    return [key for key in keys if key in NEVER_TO_CHANGE]


def _plan_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The plan that a checkpoint was trained with, or ``ConfigError``."""
    path = checkpoint.path / PLAN
    return parse_json(read_text(path, "*"), str(path))
