"""Config and world size → a frozen ``Plan`` in which no "auto" is left. Imports no torch: a plan takes no time."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe.config import FOLDERS, Config, Contents, parse_config
from recipe.plan.scaling import Phase, RateSchedule, Timeline, scaled_rate

DIGITS_CLASSES, DIGITS_IMAGES = 10, {"train": 1442, "validation": 355}

# Pixel statistics of the training images scaled to 0..1, per channel.
PIXEL_MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3054, 0.3054, 0.3054), (0.3237, 0.3237, 0.3237)),
    **dict.fromkeys(FOLDERS, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),  # ImageNet's
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}

PAPER_WEIGHT_DECAY = 1e-4
TIMM_EPS = {"LARS": 1e-8, "LAMB": 1e-6}
ASSUMED_MICRO_BATCH = 256  # the largest that a plan assumes where "auto" asks the run to measure; the headline's
RATE_TOLERANCE = 1e-6  # a rate written with seven digits agrees with the rule


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``config`` is the file with every "auto" replaced by a number: a config that repeats it."""

    config: Config
    world_size: int
    micro_batch: int
    accumulation: int
    """steps of the first global batch; see ``accumulation_of``"""

    train_images: int
    validation_images: int
    schedule: RateSchedule
    weight_decay: float
    image_sizes: tuple[tuple[int, int], ...]
    """(epoch, size of training images from that on), the first epoch 0; in pixels, within the run"""

    validation_image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    workers: int
    assumes_workers: bool
    """whether their number is still to follow from the cores of the ranks' machines"""

    assumes_micro_batch: bool
    """whether the run has yet to find the micro-batch, the largest that fits the device"""

    contents: Contents | None = None
    """what the data's folder holds, where somebody has looked and found what the config says"""

    @property
    def global_batch(self) -> int:
        """Images in one optimizer step, over all ranks; the first, where it changes."""
        return self.config.train_batch_size

    @property
    def timeline(self) -> Timeline:
        """Which steps are in which epoch, and of which batch."""
        return self.schedule.timeline

    def accumulation_of(self, phase: Phase) -> int:
        """Accumulation steps of the global batch of a phase."""
        return phase.global_batch // (self.world_size * self.micro_batch)

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
        """Images of an epoch's permutation that fill no global batch; others each epoch. The most of all phases."""
        return max(self.train_images % phase.global_batch for phase in self.timeline.phases)

    @property
    def largest_image_size(self) -> int:
        """Of the images that the run trains on, which decide what fits a GPU; validation keeps no activations."""
        return max(size for _, size in self.image_sizes)

    def saves_after(self, steps_done: int, due: bool = False) -> bool:
        """Whether the clock (``due``) or ``every_steps`` asks for a checkpoint here, where no epoch ends.

        What asks after a local step is heard where the weights are averaged next.
        """
        every, local = self.config.recipe.checkpoint.every_steps, self.config.recipe.local_sgd.steps
        since = local if local is not None and self.is_local(steps_done - 1) else 1
        asked = due or (every is not None and steps_done % every < since)
        return asked and self.equal_after(steps_done) and self.timeline.place(steps_done)[1] != 0

    def is_local(self, step: int) -> bool:
        """Whether each rank makes this step alone; never on a single rank."""
        local = self.config.recipe.local_sgd
        alone = local.steps is not None and self.world_size > 1
        return alone and self.timeline.place(step)[0] >= (local.after_epoch or 0)

    def equal_after(self, steps_done: int) -> bool:
        """Whether all ranks have the same weights after so many steps: local ones are averaged within each epoch."""
        every = self.config.recipe.local_sgd.steps
        return every is None or not self.is_local(steps_done - 1) or self.timeline.place(steps_done)[1] % every == 0

    @property
    def batchnorm_images(self) -> int:
        """Images that batch norm's statistics come from."""
        statistics = self.config.statistics
        if isinstance(statistics, int):
            return statistics
        return self.micro_batch * (self.world_size if statistics == "global" else 1)

    @property
    def precision(self) -> str:
        """The precision of forward and backward pass."""
        return self.config.precision


def make_plan(
    config: Config,
    world_size: int,
    cores_per_rank: int | None = None,
    look: Callable[[str, str, float | None], Contents] | None = None,
) -> Plan:
    """Resolve every "auto" and check every number that is written out against the rule that it follows.

    ``look`` counts what a folder holds, given ``source``, ``path`` and ``validation_share`` of ``recipe.data``; it is
    called once the batch is known to be right.

    Raises:
        ConfigError: a contradiction, a batch that the ranks cannot share, a warmup longer than the run, …
        ValueError: what ``look`` refuses, after the file and "recipe.data.path".
    """
    recipe = config.recipe
    largest, assumes_micro_batch = recipe.max_micro_batch_size, False
    if largest == "auto":
        assumes_micro_batch = config.train_micro_batch_size_per_gpu == config.gradient_accumulation_steps == "auto"
        largest = ASSUMED_MICRO_BATCH if assumes_micro_batch else config.train_batch_size
    micro_batch, accumulation = batch_triangle(config, world_size, largest)
    if recipe.noise_scale.enabled and micro_batch in config.batches:
        raise config.source.refusal(
            "recipe.noise_scale.enabled",
            f"one rank takes the whole batch of {micro_batch} as one micro-batch, and there are no two sizes of batch "
            "to compare",
            'write a train_micro_batch_size_per_gpu below that and gradient_accumulation_steps "auto", start more '
            "ranks, or write false",
        )
    statistics = config.statistics
    spans_ranks = statistics > micro_batch if isinstance(statistics, int) else statistics == "global" and world_size > 1
    # What a rank has of the gradient holds large parts that cancel out in the sum of all: measured on the digits, two
    # ranks gave a variance of 1,749 where there was one of 138.
    for key, wanted, problem, off in (
        (
            "noise_scale.enabled",
            recipe.noise_scale.enabled,
            "what a rank has is no gradient of its own images",
            "false",
        ),
        ("local_sgd.steps", recipe.local_sgd.steps is not None, "they would not step alone", "null"),
    ):
        if wanted and spans_ranks:
            raise config.source.refusal(
                f"recipe.{key}",
                f"batch norm's statistics come from several ranks, and {problem}",
                f'write {off}, or for recipe.batchnorm.statistics "local" or a number of images up to a '
                f"micro-batch's, {micro_batch}",
            )
    if recipe.ema.decay is not None and statistics == "local" and world_size > 1:
        raise config.source.refusal(
            "recipe.ema.decay",
            'with "local" statistics each rank has running averages of its own, which no average of theirs would fit',
            'write null, or for recipe.batchnorm.statistics "global" or a number of images',
        )
    contents = _contents(config, look)
    train_images, validation_images = _data_set_sizes(config, contents)
    if max(config.batches) > train_images:
        raise config.source.refusal(
            "train_batch_size" if config.train_batch_size > train_images else "recipe.schedule.batch_size",
            f"the training set has {train_images:,} images, so that no step would be full",
            f"write at most {train_images}",
        )
    timeline = Timeline.of(config.batch_changes, train_images, recipe.schedule.epochs)
    schedule = _rate_schedule(config, timeline)
    weight_decay = _weight_decay(config)
    image_sizes, mean, std = _preprocessing(config)
    validation_image_size = recipe.data.validation_image_size or image_sizes[-1][1]
    workers = recipe.data.workers
    if workers == "auto":
        workers = _workers(recipe.data.source, cores_per_rank or os.cpu_count() or 1)

    resolved = config.model_dump(mode="json", exclude_none=True)
    resolved["train_micro_batch_size_per_gpu"] = micro_batch
    resolved["gradient_accumulation_steps"] = accumulation
    resolved["optimizer"]["params"] |= {"lr": schedule.peak_rate, "weight_decay": weight_decay}
    if resolved["optimizer"]["params"].get("eps") == "auto":
        resolved["optimizer"]["params"]["eps"] = TIMM_EPS[config.optimizer.type]
    resolved["scheduler"]["params"] |= {
        "warmup_min_lr": schedule.start_rate,
        "warmup_max_lr": schedule.peak_rate,
        # DeepSpeed takes no 0; without a warmup both rates are the peak, and any number of steps says the same.
        "warmup_num_steps": max(1, schedule.warmup_steps),
    }
    if config.zero_optimization.stage:
        # DeepSpeed's word for SGD under ZeRO; without it, it refuses to start.
        resolved["zero_allow_untested_optimizer"] = True
    if recipe.max_micro_batch_size == "auto":
        resolved["recipe"]["max_micro_batch_size"] = micro_batch
    resolved["recipe"]["data"] |= {
        "train_images": train_images,
        "validation_images": validation_images,
        "mean": list(mean),
        "std": list(std),
        "workers": workers,
    }
    if recipe.data.image_size == "auto":
        resolved["recipe"]["data"]["image_size"] = image_sizes[0][1]
    elif not isinstance(recipe.data.image_size, int):
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
        assumes_workers=recipe.data.workers == "auto" and recipe.data.source in FOLDERS and cores_per_rank is None,
        assumes_micro_batch=assumes_micro_batch,
        contents=contents,
    )


def _contents(config: Config, look: Callable[[str, str, float | None], Contents] | None) -> Contents | None:
    """What the data's folder holds; None where nobody looks, or the data lies in no folder."""
    data = config.recipe.data
    if look is None or data.path is None:
        return None
    try:
        return look(data.source, data.path, data.validation_share)
    except ValueError as error:
        raise ValueError(f"{config.source.file}: recipe.data.path: {error}") from error


def with_micro_batch(plan: Plan, micro_batch: int) -> Plan:
    """The plan with the micro-batch that was found for it, and the accumulation that follows."""
    raw = plan.config.source.raw
    raw |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": "auto"}
    raw["recipe"]["max_micro_batch_size"] = micro_batch
    settled = make_plan(parse_config(raw, plan.config.source.file), plan.world_size)
    return replace(settled, contents=plan.contents)


def batch_triangle(config: Config, world_size: int, largest: int) -> tuple[int, int]:
    """Micro-batch and accumulation steps with ranks × accumulation × micro-batch = global batch.

    An "auto" micro-batch is the largest up to ``largest`` that divides what is left for it, of every batch of the
    schedule; the accumulation steps are those of the first.

    Raises:
        ConfigError: no such numbers; it names the nearest global batches that have some.
    """
    batch = config.train_batch_size
    micro, accumulation = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    factors = {"ranks": world_size}
    if isinstance(accumulation, int):
        factors["accumulation steps"] = accumulation
    if isinstance(micro, int):
        factors["images in a micro-batch"] = micro
    unit = math.prod(factors.values())
    limit = math.inf
    if isinstance(accumulation, int):
        limit = unit * largest if micro == "auto" else unit
    if batch % unit or batch > limit:
        product = f"{' × '.join(map(str, factors.values()))} ({' × '.join(factors)})"
        if batch > limit and micro == "auto":
            product += f" × at most {largest} images in a micro-batch (recipe.max_micro_batch_size)"
        nearest = {min(max(size, unit), limit) for size in (batch // unit * unit, batch // unit * unit + unit)}
        remedy = f"the nearest that can: {' or '.join(f'{size:.0f}' for size in sorted(nearest))}"
        if len(factors) > 1:
            remedy += '; or write "auto" for train_micro_batch_size_per_gpu and gradient_accumulation_steps'
        raise config.source.refusal("train_batch_size", f"it cannot be shared out as {product}", remedy)
    share = batch // world_size
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    n, mixes = config.statistics, config.recipe.data.mixes
    written = share // accumulation if isinstance(accumulation, int) else micro
    # As with train_batch_size, a micro-batch is left for it exactly if ranks, pairs and groups share it out.
    own = written if isinstance(written, int) else 2 if mixes else 1
    unit = math.lcm(world_size * own, n if isinstance(n, int) else 1)
    for later in config.batches[1:]:
        if later % unit:
            raise config.source.refusal(
                "recipe.schedule.batch_size",
                f"{later} cannot be shared out among {ranks} in the micro-batches of train_batch_size",
                f"the nearest that can: {max(unit, later // unit * unit)} or {later // unit * unit + unit}",
            )
    fitting = fitting_micro_batches(config.common_batch, world_size, n, even=mixes)
    if mixes and (share if written == "auto" else written) % 2:
        raise config.source.refusal(
            f"recipe.data.{'mixup' if config.recipe.data.mixup.probability else 'cutmix'}.probability",
            f"{share if written == 'auto' else written} images do not make whole pairs",
            "write 0, or an even number of images for each rank and micro-batch",
        )
    if not isinstance(written, int):
        size = next((size for size in fitting if size <= largest), None)
        if size is None and fitting and config.recipe.max_micro_batch_size == "auto":
            size = fitting[-1]
        if size is None:
            raise config.source.refusal(
                "recipe.batchnorm.statistics",
                f"no micro-batch up to {largest} (recipe.max_micro_batch_size) holds groups of {n} samples or, on "
                f"{ranks}, makes them up",
                _fitting_remedy(fitting, batch, n, world_size),
            )
    elif written in fitting:
        size = written
    else:
        raise config.source.refusal(
            "train_micro_batch_size_per_gpu",
            f"micro-batches of {written} neither hold groups of {n} samples (recipe.batchnorm.statistics) nor, on "
            f"{ranks}, make them up",
            _fitting_remedy(fitting, batch, n, world_size),
        )
    return size, share // size


def fitting_micro_batches(
    global_batch: int, world_size: int, statistics: str | int, *, even: bool = False
) -> list[int]:
    """All micro-batches that share out the global batch and hold batch norm's groups, the largest first.

    ``even`` leaves those out that do not hold whole pairs of images.
    """
    share = global_batch // world_size
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    return [
        size
        for size in sorted({*small, *(share // size for size in small)}, reverse=True)
        if (not isinstance(statistics, int) or holds_groups(statistics, size, world_size)) and not (even and size % 2)
    ]


def holds_groups(n: int, micro_batch: int, world_size: int) -> bool:
    """Whether batch norm over n samples can be had: of parts of a micro-batch, or of those of neighbouring ranks."""
    return micro_batch % n == 0 or (n % micro_batch == 0 and world_size % (n // micro_batch) == 0)


def _fitting_remedy(fitting: list[int], batch: int, n: str | int, world_size: int) -> str:
    if fitting:
        return f"micro-batches that do: {', '.join(map(str, sorted(fitting)))}"
    assert isinstance(n, int), "any micro-batch does for other statistics"
    # A batch has such a micro-batch exactly if both ranks and groups share it out.
    unit = math.lcm(n, world_size)
    nearest = sorted({max(unit, batch // unit * unit), batch // unit * unit + unit})
    return (
        f'the nearest train_batch_size that can: {" or ".join(map(str, nearest))}, with "auto" for '
        "train_micro_batch_size_per_gpu and gradient_accumulation_steps; or choose another number of samples or ranks"
    )


def check_contents(config: Config, contents: Contents) -> None:
    """Refuse data of other sizes or classes than the config says; one message says all that is to change.

    Raises:
        ConfigError: it is.
    """
    data = config.recipe.data
    found = {
        "recipe.model.num_classes": (config.recipe.model.num_classes, len(contents.classes)),
        "recipe.data.train_images": (data.train_images, contents.train_images),
        "recipe.data.validation_images": (data.validation_images, contents.validation_images),
    }
    wrong = {key: actual for key, (written, actual) in found.items() if written not in (actual, "auto")}
    if not wrong:
        return
    key, actual = next(iter(wrong.items()))
    problem = f"the data has {actual}"
    if key == "recipe.model.num_classes":
        problem += f", with the fewest training images first {contents.name_classes()}"
    if left_out := contents.name_left_out():
        problem += f"; {left_out}"
    numbers = ", ".join(f"{key} {actual}" for key, actual in wrong.items())
    # First the folder: one of another level, or with a folder too many, trains as well, and what comes of it is junk.
    raise config.source.refusal(key, problem, f"check the folder (--data); if it is the right one, write {numbers}")


def _data_set_sizes(config: Config, contents: Contents | None) -> tuple[int, int]:
    """Training and validation images: from the file, from a look at the folder, or known of what ships with a library.

    Raises:
        ConfigError: what is written is not what is there, or "auto" and nobody has looked.
    """
    data, known = config.recipe.data, dict[str, int]()
    if data.source == "digits":
        if config.recipe.model.num_classes != DIGITS_CLASSES:
            raise config.source.refusal(
                "recipe.model.num_classes", f"the data has {DIGITS_CLASSES} classes", f"write {DIGITS_CLASSES}"
            )
        known = {"train_images": DIGITS_IMAGES["train"], "validation_images": DIGITS_IMAGES["validation"]}
    elif contents is not None:
        check_contents(config, contents)
        known = {"train_images": contents.train_images, "validation_images": contents.validation_images}
    sizes = []
    for key in ("train_images", "validation_images"):
        written = getattr(data, key)
        if written != "auto" and written != known.get(key, written):
            raise config.source.refusal(
                f"recipe.data.{key}", f"the digits have {known[key]} of them", f'write {known[key]} or "auto"'
            )
        if written == "auto" and key not in known:
            raise config.source.refusal(
                f"recipe.data.{key}",
                "only the folder tells how many there are",
                "write the number, or give the folder by --data",
            )
        sizes.append(known[key] if written == "auto" else written)
    return sizes[0], sizes[1]


def _preprocessing(config: Config) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...], tuple[float, ...]]:
    """Image sizes, mean and std: as the file has them, as the weights were trained, or as is usual for the source."""
    data, weights = config.recipe.data, config.recipe.model.weights
    own: dict[str, Any] = {}
    if weights is not None:
        path = Path(weights.removeprefix("local-dir:"))
        folder = path if path.is_dir() else path.parent
        with suppress(OSError, ValueError, LookupError, TypeError):
            own = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    usual_mean, usual_std = PIXEL_MEAN_STD[data.source]
    size = own.get("input_size", [None])[-1] if data.image_size == "auto" else data.image_size
    if not isinstance(size, (int, tuple)):
        raise config.source.refusal(
            "recipe.data.image_size",
            "no config.json beside recipe.model.weights tells with which size they were trained",
            "write a number of pixels",
        )
    mean = tuple(own.get("mean", usual_mean)) if data.mean == "auto" else data.mean
    std = tuple(own.get("std", usual_std)) if data.std == "auto" else data.std
    sizes = ((0, size),) if isinstance(size, int) else size
    return tuple(change for change in sizes if change[0] < config.recipe.schedule.epochs), mean, std


def _rate_schedule(config: Config, timeline: Timeline) -> RateSchedule:
    """The rate of every step, from the rules of ``recipe.schedule`` and what the file writes out itself."""
    rules, batch = config.recipe.schedule, config.train_batch_size
    written = config.scheduler.params
    peak = scaled_rate(rules.reference_lr, rules.reference_batch_size, batch, rules.scaling_rule)
    if rules.scaling_rule == "none":
        # The file means what it says: a rate that is written out is the rate.
        peaks = [rate for rate in (config.optimizer.params.lr, written.warmup_max_lr) if rate != "auto"]
        peak = peaks[0] if peaks else peak
    formula = f"{rules.reference_lr:g} × {batch} / {rules.reference_batch_size}"
    rule = {
        "linear": f"the linear rule gives {formula} = {peak:.7g}",
        "sqrt": f"the square-root rule gives {rules.reference_lr:g} × √({batch} / {rules.reference_batch_size})"
        f" = {peak:.7g}",
        "none": f"the peak rate is {peak:.7g}",
    }[rules.scaling_rule]
    remedy = f'write "auto" or {peak:.7g}'
    if rules.scaling_rule != "none":
        remedy += ', or recipe.schedule.scaling_rule "none" if you mean it'
    _check(config, "optimizer.params.lr", peak, rule, remedy)
    _check(config, "scheduler.params.warmup_max_lr", peak, rule, remedy)

    start = rules.reference_lr
    if rules.scaling_rule == "none" and written.warmup_min_lr != "auto":
        start = written.warmup_min_lr
    # Only above the reference batch (§2.2), and only towards a higher rate.
    warms_up = rules.warmup != "none" and batch > rules.reference_batch_size and peak > start
    warmup_steps = timeline.steps(rules.warmup_epochs) if warms_up else 0
    if warmup_steps == 0:
        start = peak
    _check(
        config,
        "scheduler.params.warmup_min_lr",
        start,
        f"this run starts at {start:.7g}"
        + (", the reference rate" if warmup_steps else ", the peak rate, as it has no warmup"),
        f'write "auto" or {start:.7g}',
    )
    _check(
        config,
        "scheduler.params.warmup_num_steps",
        max(1, warmup_steps),
        f"{rules.warmup_epochs:g} epochs of {timeline.phases[0].steps_per_epoch} steps are {warmup_steps}"
        if warms_up
        else "this run has no warmup",
        f'write "auto" or {max(1, warmup_steps)}, or change recipe.schedule.warmup_epochs',
    )
    if warmup_steps > timeline.total_steps:
        raise config.source.refusal(
            "recipe.schedule.warmup_epochs",
            f"the warmup is longer than the run of {rules.epochs} epochs",
            f"write at most {rules.epochs}, or more recipe.schedule.epochs",
        )
    if len(timeline.phases) > 1 and timeline.phases[1].first_step < warmup_steps:
        raise config.source.refusal(
            "recipe.schedule.batch_size",
            f"the batch changes within the {rules.warmup_epochs:g} epochs of warmup",
            'write later epochs, or for recipe.schedule.warmup "none": the rate follows the batch anyway',
        )
    decays_by_steps = rules.decay == "step"
    schedule = RateSchedule(
        start_rate=start,
        peak_rate=peak,
        warmup=rules.warmup if warmup_steps else "none",
        warmup_steps=warmup_steps,
        warmup_type=written.warmup_type,
        milestones=tuple(timeline.steps(epoch) for epoch in rules.decay_epochs if decays_by_steps),
        decay_factor=rules.decay_factor,
        decay=rules.decay,
        final_rate=rules.final_lr,
        decay_power=rules.decay_power,
        scaling_rule=rules.scaling_rule,
        timeline=timeline,
    )
    lowest = min(schedule.peak(batch) for batch in config.batches)
    if rules.final_lr > lowest:
        raise config.source.refusal(
            "recipe.schedule.final_lr", f"the rate would rise from its peak of {lowest:.7g}", "write less than that"
        )
    return schedule


def _weight_decay(config: Config) -> float:
    """λ for this global batch: of the rule, or as it is written where the rule leaves it alone."""
    rules, written = config.recipe.schedule, config.optimizer.params.weight_decay
    if rules.weight_decay_rule == "constant" and rules.reference_weight_decay is None and written != "auto":
        return written
    reference = PAPER_WEIGHT_DECAY if rules.reference_weight_decay is None else rules.reference_weight_decay
    # The paper's constant (§5.1), or divided by kn / 256.
    by_batch = rules.weight_decay_rule == "inverse"
    decay = reference / (config.train_batch_size / rules.reference_batch_size) if by_batch else reference
    _check(
        config,
        "optimizer.params.weight_decay",
        decay,
        f'weight_decay_rule "{rules.weight_decay_rule}" makes {decay:.7g} of {reference:g}',
        f'write "auto" or {decay:.7g}, or change recipe.schedule.reference_weight_decay',
    )
    return decay


def _check(config: Config, key: str, right: float, rule: str, remedy: str) -> None:
    """Refuse a number that is written out under ``key`` and contradicts the rule."""
    written: Any = config
    for part in key.split("."):
        written = getattr(written, part)
    if written != "auto" and not math.isclose(written, right, rel_tol=RATE_TOLERANCE):
        raise config.source.refusal(key, rule, remedy)


def _workers(source: str, cores_per_rank: int) -> int:
    """Loader processes of a rank: its share of the cores but one; none for data that lies in memory."""
    return max(1, min(16, cores_per_rank - 1)) if source in FOLDERS else 0
