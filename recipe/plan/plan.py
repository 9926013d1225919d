"""Turns a config and a world size into a frozen ``Plan``, with every "auto" resolved. Imports no torch."""

import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from recipe.config import FOLDERS, Config, Contents, parse_config
from recipe.plan.layout import counted
from recipe.plan.scaling import Phase, RateSchedule, Timeline, scaled_rate

DIGITS_CLASSES, DIGITS_IMAGES = 10, {"train": 1442, "validation": 355}

# Pixel statistics of the training images scaled to 0..1, per channel.
PIXEL_MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3054, 0.3054, 0.3054), (0.3237, 0.3237, 0.3237)),
    **dict.fromkeys(FOLDERS, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),  # ImageNet's
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}

Look = Callable[[str, str, float | None], Contents]

PAPER_WEIGHT_DECAY = 1e-4
TIMM_EPS = {"LARS": 1e-8, "LAMB": 1e-6}
ASSUMED_MICRO_BATCH = 256  # the headline's, the largest that a plan assumes if the run is to find the largest that fits
AUTO_SPLIT = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
RATE_TOLERANCE = 1e-6  # a rate written with seven digits matches the rule


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``config`` is the file with every "auto" replaced by a number, and repeats the run."""

    config: Config
    world_size: int
    micro_batch: int
    accumulation: int
    """accumulation steps of the first global batch; see ``accumulation_of``"""

    train_images: int
    validation_images: int
    schedule: RateSchedule
    weight_decay: float
    image_sizes: tuple[tuple[int, int], ...]
    """pairs of an epoch, the first 0, and the size of training images in pixels from that epoch on"""

    validation_image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int
    assumes_workers: bool
    """whether ``workers`` is a guess that the number of cores of the ranks' machines will replace"""

    assumes_micro_batch: bool
    """whether the run will replace ``micro_batch`` by the largest that fits the device"""

    contents: Contents | None = None
    """image counts of the data's folder; None if the folder has not been read"""

    @property
    def global_batch(self) -> int:
        """Images per optimizer step over all ranks; the first such number, if it changes."""
        return self.config.train_batch_size

    @property
    def timeline(self) -> Timeline:
        """The epoch and global batch of each step."""
        return self.schedule.timeline

    def accumulation_of(self, phase: Phase) -> int:
        """Accumulation steps of a phase's global batch."""
        return phase.global_batch // (self.world_size * self.micro_batch)

    @property
    def possible_micro_batches(self) -> list[int]:
        """The micro-batches that batches, ranks, pairs and batch norm's groups allow, the largest first."""
        config = self.config
        even = config.recipe.data.mixes
        sizes = fitting_micro_batches(config.common_batch, self.world_size, config.statistics, even=even)
        if config.recipe.noise_scale.enabled:  # it compares two batch sizes
            sizes = [size for size in sizes if size < min(config.batches)]
        return sizes

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return self.config.recipe.schedule.epochs

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.timeline.total_steps

    @property
    def left_over_images(self) -> int:
        """Images per epoch that fill no global batch and are dropped; the most of all phases."""
        return max(self.train_images % phase.global_batch for phase in self.timeline.phases)

    @property
    def largest_image_size(self) -> int:
        """The largest training images, which decide what fits a GPU: validation keeps no activations."""
        return max(size for _, size in self.image_sizes)

    def saves_after(self, steps_done: int, due: bool = False) -> bool:
        """Whether to save a checkpoint within an epoch because of the clock (``due``) or ``every_steps``.

        If it falls due after a local step, it is saved when the weights are next averaged.
        """
        every, local = self.config.recipe.checkpoint.every_steps, self.config.recipe.local_sgd.steps
        since = local if local is not None and self.is_local(steps_done - 1) else 1
        asked = due or (every is not None and steps_done % every < since)
        return asked and self.equal_after(steps_done) and self.timeline.place(steps_done)[1] != 0

    def is_local(self, step: int) -> bool:
        """Whether each rank takes this step alone; never on a single rank."""
        local = self.config.recipe.local_sgd
        alone = local.steps is not None and self.world_size > 1
        return alone and self.timeline.place(step)[0] >= (local.after_epoch or 0)

    def equal_after(self, steps_done: int) -> bool:
        """Whether all ranks have the same weights after this many steps; local steps count from each epoch's start."""
        every = self.config.recipe.local_sgd.steps
        return every is None or not self.is_local(steps_done - 1) or self.timeline.place(steps_done)[1] % every == 0

    @property
    def batchnorm_images(self) -> int:
        """The number of images over which batch norm computes its statistics."""
        statistics = self.config.statistics
        if isinstance(statistics, int):
            return statistics
        return self.micro_batch * (self.world_size if statistics == "global" else 1)

    @property
    def precision(self) -> str:
        """The precision of the forward and backward pass."""
        return self.config.precision


def make_plan(config: Config, world_size: int, cores_per_rank: int | None = None, look: Look | None = None) -> Plan:
    """Resolve every "auto" and check every written number against its rule.

    ``look`` counts the images of a folder, given ``source``, ``path`` and ``validation_share`` of ``recipe.data``. It
    can take long: if the file gives the numbers, it is called once the batch is known to be valid.

    Raises:
        ConfigError: a contradiction, a batch that the ranks cannot share, a warmup longer than the run, …
        ValueError: ``look`` refuses the folder.
    """
    recipe, data = config.recipe, config.recipe.data
    contents = _contents(config, look) if data.needs_counting else None
    train_images, validation_images = _data_set_sizes(config, contents)
    largest, assumes_micro_batch = recipe.max_micro_batch_size, False
    if largest == "auto":
        assumes_micro_batch = config.train_micro_batch_size_per_gpu == config.gradient_accumulation_steps == "auto"
        no_limit = max(config.train_batch_size, train_images)
        largest = ASSUMED_MICRO_BATCH if assumes_micro_batch else no_limit
    micro_batch, accumulation = batch_triangle(config, world_size, largest, train_images)
    _check_statistics(config, world_size, micro_batch)
    if contents is None:
        contents = _contents(config, look)
        _data_set_sizes(config, contents)
    if max(config.batches) > train_images:
        raise config.source.refusal(
            "train_batch_size" if config.train_batch_size > train_images else "recipe.schedule.batch_size",
            f"the training set has {train_images:,} images",
            f"use at most {train_images // world_size * world_size or train_images}",
        )
    timeline = Timeline.of(config.batch_changes, train_images, recipe.schedule.epochs)
    schedule = _rate_schedule(config, timeline)
    weight_decay = _weight_decay(config)
    image_sizes, mean, std = _preprocessing(config)
    validation_image_size = data.validation_image_size or image_sizes[-1][1]
    spare_cores = (cores_per_rank or os.cpu_count() or 1) - 1
    automatic = max(1, min(16, spare_cores)) if data.source in FOLDERS else 0  # other data is in memory
    workers = automatic if data.workers == "auto" else data.workers

    resolved = config.model_dump(mode="json", exclude_none=True)
    resolved |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    resolved["optimizer"]["params"] |= {"lr": schedule.peak_rate, "weight_decay": weight_decay}
    if resolved["optimizer"]["params"].get("eps") == "auto":
        resolved["optimizer"]["params"]["eps"] = TIMM_EPS[config.optimizer.type]
    resolved["scheduler"]["params"] |= {
        "warmup_min_lr": schedule.start_rate,
        "warmup_max_lr": schedule.peak_rate,
        # DeepSpeed accepts no 0; without warmup both rates are the peak, and any number of steps means the same.
        "warmup_num_steps": max(1, schedule.warmup_steps),
    }
    if config.zero_optimization.stage:
        resolved["zero_allow_untested_optimizer"] = True  # DeepSpeed requires it for SGD under ZeRO
    if recipe.max_micro_batch_size == "auto":
        resolved["recipe"]["max_micro_batch_size"] = micro_batch
    resolved["recipe"]["data"] |= {
        "train_images": train_images,
        "validation_images": validation_images,
        "mean": list(mean),
        "std": list(std),
        "workers": workers,
    }
    if data.image_size == "auto":
        resolved["recipe"]["data"]["image_size"] = image_sizes[0][1]
    elif not isinstance(data.image_size, int):
        resolved["recipe"]["data"]["validation_image_size"] = validation_image_size
    return Plan(
        config=parse_config(resolved, config.source.file),
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        train_images=train_images,
        validation_images=validation_images,
        schedule=schedule,
        weight_decay=weight_decay,
        image_sizes=image_sizes,
        validation_image_size=validation_image_size,
        mean=mean,
        std=std,
        workers=workers,
        assumes_workers=data.workers == "auto" and data.source in FOLDERS and cores_per_rank is None,
        assumes_micro_batch=assumes_micro_batch,
        contents=contents,
    )


def with_micro_batch(plan: Plan, micro_batch: int) -> Plan:
    """The plan with the micro-batch that the run found, and the accumulation steps that follow from it."""
    raw = plan.config.source.raw
    raw |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": "auto"}
    raw["recipe"]["max_micro_batch_size"] = micro_batch
    settled = make_plan(parse_config(raw, plan.config.source.file), plan.world_size)
    return replace(settled, contents=plan.contents)


def _check_statistics(config: Config, world_size: int, micro_batch: int) -> None:
    """Refuse a noise scale, local SGD or weight average that micro-batch or batch norm's statistics rule out."""
    recipe, statistics, refusal = config.recipe, config.statistics, config.source.refusal
    if recipe.noise_scale.enabled and micro_batch in config.batches:
        raise refusal(
            "recipe.noise_scale.enabled",
            f"one rank takes the whole batch of {micro_batch} as one micro-batch, which leaves no second batch size to "
            "compare",
            'use a train_micro_batch_size_per_gpu below that and gradient_accumulation_steps "auto", start more '
            "ranks, or use false",
        )
    spans_ranks = statistics > micro_batch if isinstance(statistics, int) else statistics == "global" and world_size > 1
    if spans_ranks:
        spanning = "batch norm's statistics come from several ranks, so that"
        within = f'for recipe.batchnorm.statistics "local" or a number of images up to the micro-batch, {micro_batch}'
        # A rank's gradient then has large parts that cancel in the sum over all ranks: measured on the digits, two
        # ranks gave a variance of 1,749 where one gave 138.
        if recipe.noise_scale.enabled:
            problem = f"{spanning} a rank's gradient is not that of its own images"
            raise refusal("recipe.noise_scale.enabled", problem, f"use false, or {within}")
        if recipe.local_sgd.steps is not None:
            raise refusal("recipe.local_sgd.steps", f"{spanning} they could not step alone", f"use null, or {within}")
    if recipe.ema.decay is not None and statistics == "local" and world_size > 1:
        raise refusal(
            "recipe.ema.decay",
            'with "local" statistics each rank has its own running averages, none of which fits the average weights',
            'use null, or for recipe.batchnorm.statistics "global" or a number of images',
        )


def batch_triangle(config: Config, world_size: int, largest: int, train_images: int) -> tuple[int, int]:
    """Micro-batch and accumulation steps with ranks × accumulation × micro-batch = global batch.

    An "auto" micro-batch is the largest up to ``largest`` that divides a rank's share of every batch of the schedule;
    the accumulation steps are those of the first batch.

    Raises:
        ConfigError: there are no such numbers; it names the nearest global batches that have some.
    """
    batch = config.train_batch_size
    micro, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    ranks, factors = counted(world_size, "rank"), {"ranks": world_size}
    if isinstance(accumulation, int):
        factors["accumulation steps"] = accumulation
    if isinstance(micro, int):
        factors["images in a micro-batch"] = micro
    product, limit = math.prod(factors.values()), max(batch, train_images)
    if isinstance(accumulation, int):
        limit = product * largest if micro == "auto" else product
    if batch % product or batch > limit:
        split = f"over {ranks}"
        if len(factors) > 1 or batch > limit:
            split = f"into {' × '.join(map(str, factors.values()))} ({' × '.join(factors)})"
        if batch > limit and micro == "auto":
            split += f" × at most {largest} images in a micro-batch (recipe.max_micro_batch_size)"
        remedy = f"the nearest that can: {_nearest(config, batch, world_size, largest, min(limit, train_images))}"
        if len(factors) > 1:
            remedy += f'; or use "auto" for {" and ".join(AUTO_SPLIT)}'
        raise config.source.refusal("train_batch_size", f"it cannot be split evenly {split}", remedy)
    share = batch // world_size
    n, mixes = config.statistics, config.recipe.data.mixes
    written = share // accumulation if isinstance(accumulation, int) else micro
    later_config = config.model_copy(update=AUTO_SPLIT | {"train_micro_batch_size_per_gpu": written})
    for later in config.batches[1:]:
        if later % _unit(later_config, world_size):
            raise config.source.refusal(
                "recipe.schedule.batch_size",
                f"{later} cannot be split over {ranks} into the micro-batches of train_batch_size",
                f"the nearest that can: {_nearest(later_config, later, world_size, largest, train_images)}",
            )
    fitting = fitting_micro_batches(config.common_batch, world_size, n, even=mixes)
    odd = share if written == "auto" else written
    if mixes and odd % 2:
        raise config.source.refusal(
            f"recipe.data.{'mixup' if config.recipe.data.mixup.probability else 'cutmix'}.probability",
            f"{odd} images cannot be paired",
            "use 0, or an even number of images for each rank and micro-batch",
        )
    size = _choose(config, fitting, written, largest)
    if size is None:
        key, which = "train_micro_batch_size_per_gpu", f"micro-batches of {written}"
        if written == "auto":
            key, which = "recipe.batchnorm.statistics", f"micro-batches up to {largest} (recipe.max_micro_batch_size)"
        remedy = f"micro-batches that do: {', '.join(map(str, sorted(fitting)))}"
        if not fitting:
            nearest = _nearest(config.model_copy(update=AUTO_SPLIT), batch, world_size, largest, train_images)
            remedy = (
                f'the nearest train_batch_size that can: {nearest}, with "auto" for {" and ".join(AUTO_SPLIT)}; or '
                "choose another number of samples or ranks"
            )
        problem = f"{which} neither contain whole groups of {n} samples nor, on {ranks}, make one up"
        raise config.source.refusal(key, problem, remedy)
    return size, share // size


def _choose(config: Config, fitting: list[int], written: int | str, largest: int) -> int | None:
    """The written micro-batch if it is a fitting one, or the largest fitting one up to ``largest``; None if none is."""
    if isinstance(written, int):
        return written if written in fitting else None
    size = next((size for size in fitting if size <= largest), None)
    if size is None and fitting and config.recipe.max_micro_batch_size == "auto":
        return fitting[-1]
    return size


def _unit(config: Config, world_size: int) -> int:
    """What divides every global batch that has a micro-batch: ranks, accumulation steps, pairs and groups."""
    micro, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    own = micro if isinstance(micro, int) else 2 if config.recipe.data.mixes else 1
    group = config.statistics if isinstance(config.statistics, int) else 1
    return math.lcm(world_size * own, group) * (accumulation if isinstance(accumulation, int) else 1)


def _nearest(config: Config, batch: int, world_size: int, largest: int, most: int) -> str:
    """The global batches up to ``most`` that are nearest to ``batch`` and have a micro-batch, in words."""
    micro, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps

    def is_split(size: int) -> bool:
        written = size // world_size // accumulation if isinstance(accumulation, int) else micro
        fitting = fitting_micro_batches(size, world_size, config.statistics, even=config.recipe.data.mixes)
        return _choose(config, fitting, written, largest) is not None

    unit = _unit(config, world_size)
    below = range(min(batch, most) // unit * unit, 0, -unit)
    above = range(batch // unit * unit + unit, most + 1, unit)
    # Not every multiple has a micro-batch; but if any has, so does one of this many in a row.
    tried = (filter(is_split, multiples[: 2 * world_size]) for multiples in (below, above))
    found = [str(size) for sizes in tried for size in itertools.islice(sizes, 1)]
    return " or ".join(found) or f"none of up to {most:,} images on {counted(world_size, 'rank')}"


def fitting_micro_batches(
    global_batch: int, world_size: int, statistics: str | int, *, even: bool = False
) -> list[int]:
    """All micro-batches that divide a rank's share of the global batch and fit batch norm's groups, the largest first.

    ``even`` restricts them to whole pairs of images. A group of n samples is either part of a micro-batch or spans
    whole micro-batches of neighbouring ranks.
    """
    share = global_batch // world_size
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    sizes = sorted({*small, *(share // size for size in small)}, reverse=True)
    if isinstance(n := statistics, int):
        sizes = [size for size in sizes if size % n == 0 or (n % size == 0 and world_size % (n // size) == 0)]
    return [size for size in sizes if not even or size % 2 == 0]


def _contents(config: Config, look: Look | None) -> Contents | None:
    """What ``look`` finds in the data's folder; None if there is no folder or no ``look``."""
    data = config.recipe.data
    if look is None or data.path is None:
        return None
    try:
        return look(data.source, data.path, data.validation_share)
    except ValueError as error:
        raise ValueError(f"{config.source.file}: recipe.data.path: {error}") from error


def _data_set_sizes(config: Config, contents: Contents | None) -> tuple[int, int]:
    """The numbers of training and validation images, checked against the data if they are known.

    Raises:
        ConfigError: the data has other numbers or classes than the config says, or the numbers are unknown.
    """
    data = config.recipe.data
    written = {
        "recipe.model.num_classes": config.recipe.model.num_classes,
        "recipe.data.train_images": data.train_images,
        "recipe.data.validation_images": data.validation_images,
    }
    known = dict[str, int]()
    if data.source == "digits":
        known = dict(zip(written, (DIGITS_CLASSES, *DIGITS_IMAGES.values()), strict=True))
    elif contents is not None:
        counts = (len(contents.classes), contents.train_images, contents.validation_images)
        known = dict(zip(written, counts, strict=True))
    wrong = {key: actual for key, actual in known.items() if written[key] not in (actual, "auto")}
    if wrong:
        key, actual = next(iter(wrong.items()))
        problem, remedy = f"the data has {actual}", f"set {', '.join(f'{key} to {wrong[key]}' for key in wrong)}"
        if contents is not None:
            if key == "recipe.model.num_classes":
                problem += f" classes (smallest first, with their training images: {contents.name_classes()})"
            if left_out := contents.name_left_out():
                problem += f"; {left_out}"
            # A folder of another level, or with one folder too many, would train, but on junk.
            remedy = f"check the folder (--data); if it is the right one, {remedy}"
        raise config.source.refusal(key, problem, remedy)
    sizes = []
    for key in ("recipe.data.train_images", "recipe.data.validation_images"):
        size = known.get(key, written[key])
        if not isinstance(size, int):
            problem = "it is unknown until the folder is read"
            raise config.source.refusal(key, problem, "set it to the number, or name the folder with --data")
        sizes.append(size)
    return sizes[0], sizes[1]


class _Pretrained(BaseModel):
    """What weights say of the images that they were trained with: ``pretrained_cfg`` in timm's config.json."""

    input_size: tuple[int, int, int] | None = None
    """channels, height and width"""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def _read_pretrained(config: Config) -> _Pretrained:
    """The description next to the weights; an empty one if there is none."""
    weights = config.recipe.model.weights
    if weights is None:
        return _Pretrained()
    path = Path(weights.removeprefix("local-dir:"))
    file = (path if os.path.isdir(path) else path.parent) / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))["pretrained_cfg"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none, or another program's
        return _Pretrained()
    try:
        return _Pretrained.model_validate(described or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, ("pretrained_cfg", *first["loc"])))
        problem = f"{key} in {file} cannot be read: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise config.source.refusal("recipe.model.weights", problem, "correct or remove it") from None


def _preprocessing(config: Config) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...], tuple[float, ...]]:
    """Image sizes, mean and std: those of the file, else those of the weights, else the usual ones of the source."""
    data, own = config.recipe.data, _read_pretrained(config)
    usual_mean, usual_std = PIXEL_MEAN_STD[data.source]
    size = data.image_size
    if size == "auto":
        problem = "no config.json next to recipe.model.weights gives the size that they were trained with"
        if own.input_size is not None:
            _, height, size = own.input_size
            problem = f"the weights were trained with images of {height} × {size} pixels"
        if own.input_size is None or height != size or not 8 <= size <= 4096:
            raise config.source.refusal("recipe.data.image_size", problem, "use a number of pixels from 8 to 4096")
    mean = (own.mean or usual_mean) if data.mean == "auto" else data.mean
    std = (own.std or usual_std) if data.std == "auto" else data.std
    sizes = ((0, size),) if isinstance(size, int) else size
    return tuple(change for change in sizes if change[0] < config.recipe.schedule.epochs), mean, std


def scaling_words(config: Config) -> str:
    """How the peak rate follows from the batch, to be appended to the rate."""
    rules = config.recipe.schedule
    ratio = f"{config.train_batch_size:,} / {rules.reference_batch_size:,}"
    return {
        "linear": f" = {rules.reference_lr:g} × {ratio} (linear scaling)",
        "sqrt": f" = {rules.reference_lr:g} × √({ratio}) (square-root scaling)",
        "none": " (not scaled)",
    }[rules.scaling_rule]


def _rate_schedule(config: Config, timeline: Timeline) -> RateSchedule:
    """The rate of every step, from the rules of ``recipe.schedule`` and the rates that the file writes."""
    rules, written, batch = config.recipe.schedule, config.scheduler.params, config.train_batch_size
    start = rules.reference_lr
    peak = scaled_rate(rules.reference_lr, rules.reference_batch_size, batch, rules.scaling_rule)
    alternative = ', or recipe.schedule.scaling_rule "none" to keep it'
    if rules.scaling_rule == "none":
        rates = [rate for rate in (config.optimizer.params.lr, written.warmup_max_lr) if rate != "auto"]
        peak = rates[0] if rates else peak
        start = start if written.warmup_min_lr == "auto" else written.warmup_min_lr
        alternative = ""
    for key in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        _check(config, key, peak, f"the peak rate is {peak:.7g}{scaling_words(config)}", alternative)
    # Only above the reference batch (§2.2), and only towards a higher rate.
    warms_up = rules.warmup != "none" and batch > rules.reference_batch_size and peak > start
    warmup_steps = timeline.steps(rules.warmup_epochs) if warms_up else 0
    if warmup_steps == 0:
        start = peak
    which = "the reference rate" if warmup_steps else "the peak rate, as it has no warmup"
    _check(config, "scheduler.params.warmup_min_lr", start, f"this run starts at {start:.7g}, {which}")
    steps = f"{rules.warmup_epochs:g} epochs of {timeline.phases[0].steps_per_epoch} steps are {warmup_steps}"
    _check(
        config,
        "scheduler.params.warmup_num_steps",
        max(1, warmup_steps),
        steps if warms_up else "this run has no warmup",
        ", or change recipe.schedule.warmup_epochs",
    )
    if warmup_steps > timeline.total_steps:
        raise config.source.refusal(
            "recipe.schedule.warmup_epochs",
            f"the warmup is longer than the run of {rules.epochs} epochs",
            f"use at most {rules.epochs}, or more recipe.schedule.epochs",
        )
    if len(timeline.phases) > 1 and timeline.phases[1].first_step < warmup_steps:
        raise config.source.refusal(
            "recipe.schedule.batch_size",
            f"the batch changes within the {rules.warmup_epochs:g} epochs of warmup",
            'use later epochs, or recipe.schedule.warmup "none": the rate follows the batch anyway',
        )
    schedule = RateSchedule(
        start_rate=start,
        peak_rate=peak,
        warmup=rules.warmup if warmup_steps else "none",
        warmup_steps=warmup_steps,
        warmup_type=written.warmup_type,
        milestones=tuple(map(timeline.steps, rules.decay_epochs)) if rules.decay == "step" else (),
        decay_factor=rules.decay_factor,
        decay=rules.decay,
        final_rate=rules.final_lr,
        decay_power=rules.decay_power,
        scaling_rule=rules.scaling_rule,
        timeline=timeline,
    )
    lowest = min(map(schedule.peak, config.batches))
    if rules.final_lr > lowest:
        problem = f"the rate would rise from its peak of {lowest:.7g}"
        raise config.source.refusal("recipe.schedule.final_lr", problem, "use less than that")
    return schedule


def _weight_decay(config: Config) -> float:
    """The weight decay for this global batch, by the rule, or as written if the rule leaves it open."""
    rules, written = config.recipe.schedule, config.optimizer.params.weight_decay
    if rules.weight_decay_rule == "constant" and rules.reference_weight_decay is None and written != "auto":
        return written
    reference = PAPER_WEIGHT_DECAY if rules.reference_weight_decay is None else rules.reference_weight_decay
    # The paper's constant (§5.1), or divided by kn / 256.
    by_batch = rules.weight_decay_rule == "inverse"
    decay = reference / (config.train_batch_size / rules.reference_batch_size) if by_batch else reference
    problem = f'weight_decay_rule "{rules.weight_decay_rule}" turns {reference:g} into {decay:.7g}'
    alternative = ", or change recipe.schedule.reference_weight_decay"
    _check(config, "optimizer.params.weight_decay", decay, problem, alternative)
    return decay


def _check(config: Config, key: str, right: float, problem: str, alternative: str = "") -> None:
    """Refuse a number that is written under ``key`` and differs from what its rule gives."""
    written: Any = config
    for part in key.split("."):
        written = getattr(written, part)
    if written != "auto" and not math.isclose(written, right, rel_tol=RATE_TOLERANCE):
        shown = right if isinstance(right, int) else f"{right:.7g}"
        raise config.source.refusal(key, problem, f'use "auto" or {shown}{alternative}')
