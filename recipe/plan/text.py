"""The plan as text for people and as the JSON that repeats it."""

import json
import math
from collections.abc import Sequence

from recipe.config import printable, trains_no_batchnorm
from recipe.plan.cost import ModelFacts, shipped_facts
from recipe.plan.layout import NO_BREAK, columns, counted, fields, wrap
from recipe.plan.noise_scale import planned_measurements, too_few
from recipe.plan.plan import ASSUMED_MICRO_BATCH, PIXEL_MEAN_STD, Plan, scaling_words


def plan_json(plan: Plan) -> str:
    """The text of ``plan.json``: a DeepSpeed config that repeats this run on the same number of ranks."""
    config = plan.config.model_dump(mode="json", exclude_none=True)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def format_plan(plan: Plan, width: int | None = None) -> str:
    """The plan in lines of at most ``width`` characters, by default the terminal's width."""
    facts = shipped_facts(plan)
    return format_fields(plan, [*plan_fields(plan, facts), *(("note", note) for note in notes(plan, facts))], width)


def plan_fields(plan: Plan, facts: ModelFacts | None) -> list[tuple[str, str]]:
    """What a run will do, as pairs of label and text; ``facts`` are the model's, if known."""
    ranks, accumulation = counted(plan.world_size, "rank"), counted(plan.accumulation, "accumulation step")
    smoothing = plan.config.recipe.loss.label_smoothing
    texts = {
        "model": _model(plan, facts),
        "global batch": f"{plan.global_batch:,} = {ranks} × {accumulation} × micro-batch of {plan.micro_batch}",
        "data": _data(plan),
        "images": _images(plan),
        "image size": _image_sizes(plan),
        "steps": _steps(plan),
        "batch schedule": _batch_schedule(plan),
        "peak rate": f"{plan.schedule.peak_rate:.6g}{scaling_words(plan.config)}",
        "warmup": _warmup(plan),
        "decay": _decay(plan),
        "rate at step": ", ".join(f"{step:,}:{NO_BREAK}{rate:.5g}" for step, rate in rates(plan)),
        "optimizer": _optimizer(plan),
        "weight decay": _weight_decay(plan, facts),
        "loss": f"cross entropy, labels smoothed by {smoothing:g}" if smoothing else "",
        "weight average": _weight_average(plan),
        "local SGD": _local_sgd(plan),
        "checkpoints": _checkpoints(plan),
    }
    return [(label, text) for label, text in texts.items() if text]


def format_fields(plan: Plan, rows: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """A title, then labels on the left and texts on the right."""
    width = width or columns()
    title = "\n".join(wrap(f"Plan of {printable(plan.config.source.file)}", width, others="  "))
    return f"{title}\n\n{fields(rows, width)}"


def notes(plan: Plan, facts: ModelFacts | None = None) -> list[str]:
    """What to know before the run starts; ``facts`` are the model's, if known."""
    found = _batchnorm_notes(plan, facts)
    if plan.assumes_micro_batch:
        found.append(
            f'max_micro_batch_size is "auto": the run finds the largest micro-batch that fits the GPU (32 on a CPU); '
            f"this plan assumes up to {ASSUMED_MICRO_BATCH}"
        )
    if plan.config.recipe.model.gradient_checkpointing:
        found.append("with gradient checkpointing, activations take less memory and steps more time than estimated")
    found += _weights_notes(plan) + _rate_notes(plan)
    if plan.precision == "bf16" and plan.accumulation >= 64:
        found.append(
            f"bf16 gradients of {plan.accumulation} accumulation steps are summed in bf16, which has 8 bits of "
            "precision; with more GPUs or a larger micro-batch there are fewer to sum"
        )
    if min(phase.steps_per_epoch for phase in plan.timeline.phases) == 1:
        found.append("an epoch is a single step; a smaller train_batch_size would give more updates")
    measured = plan.config.recipe.noise_scale
    few = too_few(planned_measurements(plan.total_steps, measured.every_steps), plan.total_steps, measured.every_steps)
    if measured.enabled and few is not None:
        found.append(f"noise scale: {few}")
    if max(plan.config.batches) > 8192 and plan.config.optimizer.type == "SGD":
        found.append(
            "beyond 8k the paper's error rises: 24.79 % at 16k, 27.55 % at 32k, 33.96 % at 64k (Figure 1); for such "
            "batches the literature uses LARS, a polynomial decay and label smoothing, as in resnet50_lars_b32k.json, "
            "or LAMB"
        )
    return found


def _has_batchnorm(plan: Plan, facts: ModelFacts | None) -> bool | None:
    """Whether the model trains batch norm; None if that is not known."""
    if facts is not None:
        return facts.batchnorm_layers > 0
    model = plan.config.recipe.model
    return False if trains_no_batchnorm(model.name, model.freeze) else None


def _batchnorm_notes(plan: Plan, facts: ModelFacts | None) -> list[str]:
    has_batchnorm, found = _has_batchnorm(plan, facts), []
    if has_batchnorm is False:
        return []
    statistics, images = plan.config.statistics, plan.batchnorm_images
    if plan.assumes_micro_batch and not isinstance(statistics, int):
        found.append(
            f'with "statistics": "{statistics}" the training depends on the micro-batch, which "auto" makes depend on '
            "the GPU; with a number of images (the paper's 32) it does not"
        )
    if images < 16:
        found.append(f"batch norm's statistics come from only {images} images; the paper used 32 (section 2.3)")
    elif images > 64:
        found.append(
            f"batch norm's statistics come from {images:,} images; the paper used 32 (section 2.3), as does "
            '"statistics": 32'
        )
    return found if has_batchnorm else [f"if the model has batch norm: {note}" for note in found]


def _weights_notes(plan: Plan) -> list[str]:
    """What a plan cannot know about weights that are downloaded when the run starts."""
    model, usual = plan.config.recipe.model, PIXEL_MEAN_STD[plan.config.recipe.data.source]
    is_downloaded = model.starts_from is not None and (model.weights or "hf-hub:").startswith("hf-hub:")
    if not is_downloaded or (plan.mean, plan.std) != usual:
        return []
    return [
        f"mean and std are the usual ones; if {printable(str(model.starts_from))} was trained with others, set "
        "recipe.data.mean and std to those that its page on the hub or timm.get_pretrained_cfg gives"
    ]


def _rate_notes(plan: Plan) -> list[str]:
    """What the paper found about rates and warmups other than its own, all at 8k on ImageNet with ResNet-50."""
    rules, schedule, optimizer = plan.config.recipe.schedule, plan.schedule, plan.config.optimizer.type
    found = list[str]()
    if optimizer != "SGD" and rules.scaling_rule != "none":
        found.append(
            f"the scaling rules are for SGD, and {optimizer} needs other rates: set recipe.schedule.scaling_rule to "
            '"none" and optimizer.params.lr to a number'
        )
    if plan.global_batch <= rules.reference_batch_size or optimizer != "SGD":
        return found
    if rules.scaling_rule != "linear":
        how, error = {"sqrt": ("scaled by the square root", 26.22), "none": ("not scaled", 41.67)}[rules.scaling_rule]
        found.append(f"the rate is {how}: in the paper, {error} % error at 8k instead of 23.74 % (Table 2a)")
    if schedule.peak_rate <= rules.reference_lr:
        return found
    if schedule.warmup != "gradual":
        how, error = {"constant": ("a constant warmup", 25.88), "none": ("no warmup", 24.84)}[schedule.warmup]
        found.append(f"{how}: in the paper, {error} % error at 8k instead of 23.74 % (Table 1)")
    elif rules.warmup_epochs < 5:
        found.append(f"a warmup of {counted(rules.warmup_epochs, 'epoch')} is shorter than the paper's 5 (section 2.2)")
    if schedule.milestones and schedule.milestones[0] < schedule.warmup_steps:
        found.append(f"the rate decays at step {schedule.milestones[0]:,}, before warmup ends: it never peaks")
    return found


def _model(plan: Plan, facts: ModelFacts | None) -> str:
    model, n = plan.config.recipe.model, plan.config.statistics
    has_batchnorm = _has_batchnorm(plan, facts)
    if has_batchnorm is False:
        batchnorm = "no batch norm" if model.freeze == "none" else "batch norm, if any, in evaluation mode"
    elif isinstance(n, int):
        ranks, groups = n // plan.micro_batch, plan.micro_batch // n
        where = f"{counted(groups, 'group')} per micro-batch" if groups else f"{ranks} ranks"
        batchnorm = f"batch norm over groups of {n} images ({where})"
    else:
        batchnorm = {"global": "SyncBN over all ranks", "local": "batch norm over each rank's micro-batch"}[n]
    if has_batchnorm is None:
        batchnorm += ", if the model has batch norm"
    parts = [
        printable(model.name),
        f"{model.num_classes} classes",
        f"{_size_range(plan)} px",
        plan.precision,
        batchnorm,
    ]
    if model.starts_from is not None:
        parts.append(f"from {printable(model.starts_from)} (a head of another size is reinitialised)")
    if model.freeze == "backbone":
        parts.append("all but the head frozen")
    if model.gradient_checkpointing:
        parts.append("gradient checkpointing")
    return ", ".join(parts)


def _data(plan: Plan) -> str:
    data = plan.config.recipe.data
    where = f"{data.source} in {printable(data.path)}" if data.path else data.source
    if data.pack_short_side:
        where += f" (short side {data.pack_short_side}{', raw pixels' if data.pack_raw else ''})"
    share = f" (a fraction of {data.validation_share:g})" if data.validation_share is not None else ""
    found = [f"{where}: {plan.train_images:,} training images, {plan.validation_images:,} for validation{share}"]
    if plan.contents is not None:
        found += [plan.contents.name_imbalance(), plan.contents.name_left_out()]
    return "; ".join(printable(part) for part in found if part)


def _images(plan: Plan) -> str:
    data, size = plan.config.recipe.data, f"{_size_range(plan)} px"
    if data.source == "synthetic":
        return ""
    crop = {
        "random_resized": f"random resized crops of {size}",
        "padded": f"{size}, shifted by up to {plan.largest_image_size // 8}",
        "none": f"{size}, uncropped",
    }[data.crop]
    workers = f"{counted(plan.workers, 'loader process', 'es')} per rank" if plan.workers else "no loader processes"
    if plan.assumes_workers:
        workers = "loader processes: one less than a rank's share of the cores"
    decoded = {"cpu": "", "gpu": ", decoded by nvJPEG", "dali": ", decoded by DALI"}[data.decoder]
    held = ", all kept on the device" if data.on_device else ""
    mixed = ", ".join(
        f"{name} in {100 * mix.probability:g} % of steps (α = {mix.alpha:g})"
        for name, mix in (("mixup", data.mixup), ("CutMix", data.cutmix))
        if mix.probability
    )
    changed = {
        "none": "",
        "trivial": ", TrivialAugment",
        "rand": f", RandAugment of magnitude {data.augment_magnitude}",
    }[data.augment]
    erased = f", a box erased in {100 * data.random_erasing:g} % of them" if data.random_erasing else ""
    flipped = f"{', half of them mirrored' if data.flip else ''}{changed}{erased}{f', {mixed}' if mixed else ''}"
    return f"{crop}{flipped}{decoded}{held}; {workers}"


def _size_range(plan: Plan) -> str:
    sizes = [size for _, size in plan.image_sizes]
    return f"{sizes[0]}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"


def _image_sizes(plan: Plan) -> str:
    """The sizes by epoch and in validation; "" if there is only one size."""
    (_, first), *later = plan.image_sizes
    if not later and plan.validation_image_size == first:
        return ""
    training = [f"{first} px", *(f"{size} px from epoch {epoch} on" for epoch, size in later)]
    return f"{', '.join(training)}; {plan.validation_image_size} px in validation"


def _steps(plan: Plan) -> str:
    first, *later = plan.timeline.phases
    ends = [*(phase.first_epoch for phase in later), plan.epochs]
    steps = f"{counted(first.steps_per_epoch, 'step')} per epoch × {counted(ends[0], 'epoch')}"
    for phase, end in zip(later, ends[1:], strict=True):
        steps += f" + {counted(phase.steps_per_epoch, 'step')} × {counted(end - phase.first_epoch, 'epoch')}"
    steps += f" = {plan.total_steps:,}"
    if not plan.left_over_images:
        return steps
    most = "up to " if later else ""
    return f"{steps}; {most}{counted(plan.left_over_images, 'image')} dropped per epoch, different ones each time"


def _batch_schedule(plan: Plan) -> str:
    """The later global batches with their accumulation steps and peak rates; "" if the batch does not change."""
    return "; ".join(
        f"{phase.global_batch:,} from epoch {phase.first_epoch} (step {phase.first_step:,}) on, in "
        f"{counted(plan.accumulation_of(phase), 'accumulation step')}: peak rate "
        f"{plan.schedule.peak(phase.global_batch):.6g}"
        for phase in plan.timeline.phases[1:]
    )


def _warmup(plan: Plan) -> str:
    rules, schedule = plan.config.recipe.schedule, plan.schedule
    if schedule.warmup == "none":
        if rules.warmup == "none":
            return "none"
        if plan.global_batch <= rules.reference_batch_size:
            return f"none: only batches above {rules.reference_batch_size:,} warm up"
        if plan.timeline.steps(rules.warmup_epochs) == 0:
            return f"none: warmup_epochs {rules.warmup_epochs:g} is 0 steps"
        return "none: the peak rate is not above the rate where warmup would start"
    duration = f"{counted(schedule.warmup_steps, 'step')} ({counted(rules.warmup_epochs, 'epoch')})"
    if schedule.warmup == "constant":
        return f"constant: {schedule.start_rate:.6g} for {duration}, then {schedule.peak_rate:.6g}"
    curve = "" if schedule.warmup_type == "linear" else ", logarithmic"
    return f"gradual: {schedule.start_rate:.6g} → {schedule.peak_rate:.6g} over {duration}{curve}"


def _decay(plan: Plan) -> str:
    rules, milestones = plan.config.recipe.schedule, plan.schedule.milestones
    if plan.schedule.has_curve:
        power = f" of power {rules.decay_power:g}" if rules.decay == "polynomial" else ""
        return f"{rules.decay}{power} from {plan.schedule.peak_rate:.6g} to {rules.final_lr:g} at the end of the run"
    if not milestones:
        return "none"
    turns = list(zip(rules.decay_epochs, milestones, strict=True))
    reached = ", ".join(f"epoch {epoch:g} (step {step:,})" for epoch, step in turns if step < plan.total_steps)
    late = ", ".join(f"{epoch:g}" for epoch, step in turns if step >= plan.total_steps)
    text = f"× {rules.decay_factor:g} at {reached}" if reached else "none within the run"
    return text + (f"; after its end: epoch {late}" if late else "")


def rates(plan: Plan) -> list[tuple[int, float]]:
    """Pairs of step and rate: first, last, half-way down a curve, and around every change of the rate."""
    steps = {0, 1, plan.total_steps - 1}
    if plan.schedule.has_curve:
        steps.add((plan.schedule.warmup_steps + plan.total_steps) // 2)
    changes = (phase.first_step for phase in plan.timeline.phases[1:])
    for turn in (plan.schedule.warmup_steps, *plan.schedule.milestones, *changes):
        steps |= {turn - 1, turn}
    return [(step, plan.schedule.rate(step)) for step in sorted(steps) if 0 <= step < plan.total_steps]


def _optimizer(plan: Plan) -> str:
    params, clipping = plan.config.optimizer.params, plan.config.gradient_clipping
    optimizer = {
        "SGD": f"SGD, momentum {params.momentum:g}{', Nesterov' if params.nesterov else ''}",
        "LARS": f"LARS, momentum {params.momentum:g}, trust coefficient {params.trust_coefficient:g}",
        "LAMB": "LAMB",
    }[plan.config.optimizer.type]
    return f"{optimizer}, {f'gradients clipped to norm {clipping:g}' if clipping else 'no gradient clipping'}"


def _weight_decay(plan: Plan, facts: ModelFacts | None) -> str:
    decayed = f"{facts.decayed_parameters:,} " if facts else ""
    undecayed = f"{facts.undecayed_parameters:,} " if facts else "the "
    others = "batch-norm parameters and biases" if facts and facts.batchnorm_layers else "other parameters"
    return f"{plan.weight_decay:.6g} on {decayed}convolution and linear weights; none on {undecayed}{others}"


def _weight_average(plan: Plan) -> str:
    decay = plan.config.recipe.ema.decay
    if decay is None:
        return ""
    images = math.log(0.5) / math.log(decay)
    step = f"{decay**plan.global_batch:.6g} per step of {plan.global_batch:,}"
    return f"decay {decay!r} per image, {step}: a half-life of {images:,.0f} images"


def _local_sgd(plan: Plan) -> str:
    local = plan.config.recipe.local_sgd
    if local.steps is None or plan.world_size == 1:
        return "" if local.steps is None else "no effect on a single rank"
    since = ""
    if local.after_epoch:
        if local.after_epoch >= plan.epochs:
            return f"no effect: it would start at epoch {local.after_epoch}, and the run has {plan.epochs}"
        since = f"from epoch {local.after_epoch} (step {plan.timeline.steps(local.after_epoch):,}) on, "
    return (
        f"{since}each rank steps alone; weights are averaged every {counted(local.steps, 'step')} and at the end of "
        "each epoch. The training depends on the number of ranks"
    )


def _checkpoints(plan: Plan) -> str:
    settings = plan.config.recipe.checkpoint
    every = f", every {counted(settings.every_steps, 'step')}" if settings.every_steps else ""
    every += f", every {counted(settings.every_minutes, 'minute')}" if settings.every_minutes else ""
    best = " and the best" if settings.keep_best else ""
    last = "the last" if settings.keep_last == 1 else f"the last {settings.keep_last}"
    return f"after each epoch{every}; {last}{best} are kept"
