"""The output of the plan command: one plan, two side by side, JSON, or a picture of the learning rate."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.commands.figure import new_figure, save_figure, scale_y
from recipe.config import printable
from recipe.plan import (
    CONTEXT_BYTES,
    LABEL_WIDTH,
    NO_BREAK,
    RAW_SHORT_SIDE,
    Link,
    ModelFacts,
    Plan,
    activation_bytes,
    all_reduce_bytes,
    batchnorm_traffic,
    columns,
    cores_to_load,
    counted,
    fields,
    format_fields,
    gradient_bytes,
    hidden_bandwidth,
    largest_micro_batch,
    local_bytes,
    memory,
    notes,
    overlaps_reduction,
    plan_fields,
    rates,
    reduced_bytes,
    reduction_precision,
    speed,
)
from recipe.reporting import table

SIDE_BY_SIDE_WIDTH = 150
PICTURE_POINTS = 4000


@dataclass(frozen=True)
class Answer:
    """A plan with the assumptions behind its cost estimate and their sources."""

    plan: Plan
    facts: ModelFacts | None
    """None if the model is unknown"""

    images_per_second: float | None
    """of a single GPU; None if unknown"""

    speed_source: str
    link: Link
    link_source: str
    gpu_bytes: float


def format_answers(answers: Sequence[Answer], hints: Sequence[str] = (), width: int | None = None) -> str:
    """One plan as a list of fields; two, A and B, in columns with ≠ before rows that differ. Notes come last."""
    screens = [[*plan_fields(one.plan, one.facts), *_cost(one)] for one in answers]
    said = [notes(one.plan, one.facts) for one in answers]
    if len(answers) == 1:
        return format_fields(answers[0].plan, [*screens[0], *(("note", note) for note in (*hints, *said[0]))], width)
    width = width or columns(SIDE_BY_SIDE_WIDTH)
    names = [(name, printable(one.plan.config.source.file)) for name, one in zip("AB", answers, strict=True)]
    rows = [("", "A", "B")]
    for label in dict.fromkeys(label for screen in screens for label, _ in screen):
        a, b = (dict(screen).get(label, "–").replace(NO_BREAK, " ") for screen in screens)
        rows.append((f"{' ' if a == b else '≠'} {label:<{LABEL_WIDTH - 2}}", a, b))
    found = [("note", f"{name}: {note}") for name, one in zip("AB", said, strict=True) for note in one]
    return f"{fields(names, width)}\n{table(rows, width)}{fields(found, width)}"


def _cost(answer: Answer) -> list[tuple[str, str]]:
    """The estimated cost of the run, as pairs of label and text."""
    if answer.facts is None:
        remedy = "--inspect checks its name, builds it without allocating memory, and counts"
        return [("cost", f"not known for this model; {remedy}")]
    plan, facts = answer.plan, answer.facts
    return [
        ("batch norm", _batchnorm(plan, facts)),
        ("memory per GPU", _memory(plan, facts, answer.gpu_bytes)),
        ("all-reduce", _all_reduce(plan, facts, answer.images_per_second)),
        *_speed(plan, facts, answer),
    ]


def _batchnorm(plan: Plan, facts: ModelFacts) -> str:
    traffic = batchnorm_traffic(plan, facts)
    if not facts.batchnorm_layers:
        return "none in this model" if plan.config.recipe.model.freeze == "none" else "none is trained"
    over = f"{counted(facts.batchnorm_layers, 'layer')} over {traffic.images:,} images "
    if traffic.ranks == 1:
        whose = "of each rank's own micro-batch"
        if not traffic.collectives:
            return f"{over}{whose}, nothing is sent"
        whose += ", running averages over all ranks"
    elif traffic.ranks == plan.world_size:
        whose = f"of all {plan.world_size:,} ranks"
    else:
        whose = f"of {traffic.ranks} neighbouring ranks, such as 0 to {traffic.ranks - 1}"
    return (
        f"{over}{whose}: {counted(traffic.collectives, 'collective')} and {_size(traffic.bytes)} sent per rank and step"
    )


def _memory(plan: Plan, facts: ModelFacts, gpu_bytes: float) -> str:
    parts = memory(plan, facts)
    summed = " + ".join(f"{_size(size)} {name.replace('_', ' ')}" for name, size in asdict(parts).items() if size)
    activations = f"{plan.micro_batch} × {_size(activation_bytes(plan, facts))}"
    text = f"{_size(parts.total)} = {summed}; activations: {activations}, workspace: {_size(CONTEXT_BYTES)} assumed"
    largest = largest_micro_batch(plan, facts, gpu_bytes)
    if largest is None:
        where = f"no micro-batch would fit {_size(gpu_bytes)}"
    elif parts.total > gpu_bytes:
        where = f"more than {_size(gpu_bytes)}, in which micro-batches of up to {largest:,} would fit"
    elif largest * plan.world_size == plan.config.common_batch:
        where = f"a rank's whole share of the batch, {largest:,} images, would fit {_size(gpu_bytes)}"
    else:
        where = f"micro-batches of up to {largest:,} would fit {_size(gpu_bytes)}"
    return f"{text}; {where}"


def _all_reduce(plan: Plan, facts: ModelFacts, images_per_second: float | None) -> str:
    if plan.world_size == 1:
        return "none on a single rank"
    sent = all_reduce_bytes(reduced_bytes(plan, facts), plan.world_size)
    gradients = f"{_size(gradient_bytes(plan, facts))} of {reduction_precision(plan)} gradients"
    text = f"{gradients}, {_size(sent)} sent per rank and step"
    if images_per_second is not None and overlaps_reduction(plan):
        gbit = hidden_bandwidth(plan, facts, images_per_second) * 8 / 1e9
        text += f"; from {gbit:.3g}{NO_BREAK}Gbit/s per rank on, the backward pass hides it"
    if local := local_bytes(plan, facts):
        sent = all_reduce_bytes(local, plan.world_size)
        instead = "; with local SGD" if plan.config.recipe.local_sgd.after_epoch else "; but with local SGD instead"
        text += f"{instead} {_size(sent)} of weights per rank and step, which the estimated speed and time leave out"
    return text


def _speed(plan: Plan, facts: ModelFacts, assumed: Answer) -> list[tuple[str, str]]:
    if assumed.images_per_second is None:
        return [("speed", "not known for this model, size and precision: give one GPU's --images-per-second")]
    found = speed(plan, facts, assumed.images_per_second, assumed.link)
    network = f" and {assumed.link_source}" if plan.world_size > 1 else ""
    step = f"{_seconds(found.step_seconds)} per step = {_seconds(found.compute_seconds)} computation"
    if plan.world_size > 1:
        hidden = found.all_reduce_seconds - found.exposed_seconds
        step += f" + {_seconds(found.exposed_seconds)} all-reduce (plus {_seconds(hidden)} hidden by the backward pass)"
    if batchnorm_traffic(plan, facts).collectives:
        step += f" + {_seconds(found.batchnorm_seconds)} batch norm"
    return [
        (
            "speed",
            f"{step}: {found.images_per_second:,.0f} images/s, efficiency {100 * found.efficiency:.0f}{NO_BREAK}%; "
            f"assuming {assumed.speed_source}{network} and data that is always ready",
        ),
        (
            "time to train",
            f"{_hours(found.training_seconds)} plus {_hours(found.validation_seconds)} of validation (hours:minutes:"
            "seconds; assuming that a forward pass takes a third of a step)",
        ),
        *_loading(plan, assumed.images_per_second),
    ]


def _loading(plan: Plan, images_per_second: float) -> list[tuple[str, str]]:
    cores = cores_to_load(plan, images_per_second)
    if cores is None:
        return []
    planned, raw = cores
    text = f"{planned:.1f} cores per GPU for {images_per_second:,.0f} images/s (measured on a busy Xeon)"
    if not plan.assumes_workers and plan.workers < planned:
        text += f": {counted(plan.workers, 'loader process', 'es')} per rank may be too few"
    if not plan.config.recipe.data.pack_raw:
        pack = f"python -m recipe pack SRC DST --short-side {RAW_SHORT_SIDE} --raw"
        text += f"; {raw:.1f} from a pack of raw pixels, {pack}"
    return [("loading", text)]


def as_json(answer: Answer) -> dict[str, Any]:
    """The answer as JSON: sizes in bytes, times in seconds, rates as pairs of step and rate."""
    plan, facts = answer.plan, answer.facts
    numbers = (
        "world_size global_batch micro_batch accumulation train_images validation_images left_over_images total_steps "
        "weight_decay"
    )
    found: dict[str, Any] = {
        "file": plan.config.source.file,
        **{name: getattr(plan, name) for name in numbers.split()},
        "steps_per_epoch": plan.timeline.phases[0].steps_per_epoch,
        "phases": [asdict(phase) for phase in plan.timeline.phases],
        "peak_rate": plan.schedule.peak_rate,
        "warmup_steps": plan.schedule.warmup_steps,
        "rates": rates(plan),
        "notes": notes(plan, facts),
        "config": plan.config.model_dump(mode="json", exclude_none=True),
    }
    if facts is None:
        return found
    parts, largest = memory(plan, facts), largest_micro_batch(plan, facts, answer.gpu_bytes)
    found |= {
        "parameters": {"decayed": facts.decayed_parameters, "undecayed": facts.undecayed_parameters},
        "batchnorm": asdict(batchnorm_traffic(plan, facts)),
        "memory_bytes": asdict(parts) | {"total": parts.total},
        "largest_micro_batch": {"gpu_bytes": answer.gpu_bytes, "images": largest},
        "gradient_bytes": gradient_bytes(plan, facts),
        "all_reduce_bytes_sent": all_reduce_bytes(reduced_bytes(plan, facts), plan.world_size),
    }
    if answer.images_per_second is not None:
        time = speed(plan, facts, answer.images_per_second, answer.link)
        assumed = {"speed": answer.speed_source, "link": answer.link_source}
        found["speed"] = asdict(time) | {"step_seconds": time.step_seconds, "assumed": assumed}
        if cores := cores_to_load(plan, answer.images_per_second):
            found["cores_to_load_a_gpu"] = dict(zip(("planned", "raw"), cores, strict=True))
    return found


def draw_rates(plans: Sequence[Plan], path: Path) -> list[Path]:
    """Draw the learning rate over the epochs, as PNG and SVG; return the files.

    Raises:
        OSError: they cannot be written.
    """
    figure, axes = new_figure()
    for plan, width in zip(plans, (3.0, 1.5), strict=False):  # so that both show if they coincide
        steps = sorted({plan.total_steps * point // PICTURE_POINTS for point in range(PICTURE_POINTS + 1)})
        rates = [plan.schedule.rate(min(step, plan.total_steps - 1)) for step in steps]
        axes.plot([plan.timeline.epochs_done(step) for step in steps], rates, drawstyle="steps-post", linewidth=width)
    scale_y(axes)
    axes.set(xlabel="epoch", ylabel="learning rate")
    files = [printable(Path(plan.config.source.file).name) for plan in plans]
    axes.legend(axes.lines, [f"{file}: batch {plan.global_batch:,}" for file, plan in zip(files, plans, strict=True)])
    return save_figure(figure, path)


def _size(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g}{NO_BREAK}{name}"
    return f"{size:.0f}{NO_BREAK}B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}{NO_BREAK}s" if seconds >= 1 else f"{seconds * 1000:.3g}{NO_BREAK}ms"


def _hours(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{left:02}"
