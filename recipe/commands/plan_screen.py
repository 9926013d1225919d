"""The plan command's answers: one screen, two configs side by side, JSON, a picture of the rate."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.commands.figure import COLOURS, add_legend, drawable, line_styles, new_figure, save_figure, set_log_scale
from recipe.config import printable
from recipe.plan import (
    CONTEXT_BYTES,
    LABEL_WIDTH,
    NO_BREAK,
    Link,
    ModelFacts,
    Plan,
    activation_bytes,
    all_reduce_bytes,
    batchnorm_traffic,
    columns,
    counted,
    fields,
    gradient_bytes,
    hidden_bandwidth,
    largest_micro_batch,
    memory,
    notes,
    overlaps_reduction,
    plan_fields,
    rates,
    reduced_bytes,
    speed,
    travelling_precision,
)
from recipe.reporting import table

SIDE_BY_SIDE_WIDTH = 150
PICTURE_POINTS = 4000


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted, each with words for where it comes from."""

    images_per_second: float | None
    """of one GPU that computes alone; None where nobody knows"""

    speed_source: str
    link: Link
    link_source: str
    gpu_bytes: float


def cost_fields(plan: Plan, facts: ModelFacts | None, assumed: Assumptions) -> list[tuple[str, str]]:
    """What the run will cost, label and text."""
    if facts is None:
        unknown = "not known for this model, whose name was not looked up either"
        return [("cost", f"{unknown}; --inspect asks timm for it, builds it without memory for it, and counts")]
    return [
        ("batch norm", _batchnorm(plan, facts)),
        ("memory per GPU", _memory(plan, facts, assumed.gpu_bytes)),
        ("all-reduce", _all_reduce(plan, facts, assumed)),
        *_speed(plan, facts, assumed),
    ]


def _batchnorm(plan: Plan, facts: ModelFacts) -> str:
    traffic = batchnorm_traffic(plan, facts)
    if not facts.batchnorm_layers:
        return "none in this model"
    over = f"{counted(facts.batchnorm_layers, 'layer')} over {traffic.images:,} images "
    if traffic.ranks == 1:
        whose = "of a rank's own micro-batch"
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
    words = [("weights", parts.weights), ("fp32 weights", parts.master_weights), ("gradients", parts.gradients)]
    words += [("momentum", parts.momentum), ("messages", parts.reduction)]
    words.append((f"activations ({plan.micro_batch} × {_size(activation_bytes(plan, facts))})", parts.activations))
    words.append(("workspace", parts.workspace))
    text = f"{_size(parts.total)} = " + " + ".join(f"{_size(size)} {name}" for name, size in words if size)
    text += f", {_size(CONTEXT_BYTES)} of it assumed"
    largest = largest_micro_batch(plan, facts, gpu_bytes)
    if largest is None:
        where = f"no micro-batch would fit {_size(gpu_bytes)}"
    elif parts.total > gpu_bytes:
        where = f"which is more than {_size(gpu_bytes)}: up to {largest:,} images would fit"
    else:
        where = f"of the micro-batches that share out the batch, up to {largest:,} would fit {_size(gpu_bytes)}"
    return f"{text}; {where}"


def _all_reduce(plan: Plan, facts: ModelFacts, assumed: Assumptions) -> str:
    if plan.world_size == 1:
        return "none, for one rank"
    sent = all_reduce_bytes(reduced_bytes(plan, facts), plan.world_size)
    gradients = f"{_size(gradient_bytes(plan, facts))} of {travelling_precision(plan)} gradients"
    text = f"{gradients}, {_size(sent)} sent per rank and step"
    if assumed.images_per_second is not None and overlaps_reduction(plan):
        needed = hidden_bandwidth(plan, facts, assumed.images_per_second)
        text += f"; at {_gbit(needed)} per rank the backward pass hides it"
    return text


def _speed(plan: Plan, facts: ModelFacts, assumed: Assumptions) -> list[tuple[str, str]]:
    if assumed.images_per_second is None:
        return [("speed", "not known for this model: --images-per-second of one GPU, or the folder of a run, tells it")]
    found = speed(plan, facts, assumed.images_per_second, assumed.link)
    network = f" and {assumed.link_source}" if plan.world_size > 1 else ""
    step = f"{_seconds(found.step_seconds)} per step = {_seconds(found.compute_seconds)} to compute"
    if plan.world_size > 1:
        hidden = found.all_reduce_seconds - found.exposed_seconds
        step += f" + {_seconds(found.exposed_seconds)} all-reduce (beside {_seconds(hidden)} that are hidden)"
    if batchnorm_traffic(plan, facts).collectives:
        step += f" + {_seconds(found.batchnorm_seconds)} batch norm"
    return [
        (
            "speed",
            f"{step}: {found.images_per_second:,.0f} images/s, efficiency {found.efficiency:.0%}; for "
            f"{assumed.speed_source}{network}, data that never waits",
        ),
        (
            "time to train",
            f"{_duration(found.training_seconds)} and {_duration(found.validation_seconds)} of validation (a forward "
            "pass alone, taken for a third of a step)",
        ),
    ]


def side_by_side(
    plans: Sequence[Plan],
    answers: Sequence[Sequence[tuple[str, str]]],
    said: Sequence[Sequence[str]],
    width: int | None = None,
) -> str:
    """Two plans, A and B, in two columns, and what is ``said`` of each below; ≠ marks the rows that differ."""
    width = width or columns(SIDE_BY_SIDE_WIDTH)
    names = [(name, printable(plan.config.source.file)) for name, plan in zip("AB", plans, strict=True)]
    rows = [("", "A", "B")]
    for label in dict.fromkeys(label for answer in answers for label, _ in answer):
        a, b = (dict(answer).get(label, "–").replace(NO_BREAK, " ") for answer in answers)
        rows.append((f"{' ' if a == b else '≠'} {label:<{LABEL_WIDTH - 2}}", a, b))
    found = [("note", f"{name}: {note}") for name, one in zip("AB", said, strict=True) for note in one]
    return f"{fields(names, width)}\n{table(rows, width)}{fields(found, width)}"


def plan_screen(plan: Plan, facts: ModelFacts | None, assumed: Assumptions) -> list[tuple[str, str]]:
    """All that the screen says of a plan, but for the notes."""
    return [*plan_fields(plan, facts), *cost_fields(plan, facts, assumed)]


def as_json(plan: Plan, facts: ModelFacts | None, assumed: Assumptions) -> dict[str, Any]:
    """The same for programs; bytes and seconds, rates as pairs of step and rate."""
    schedule = plan.schedule
    answer: dict[str, Any] = {
        "file": plan.config.source.file,
        "world_size": plan.world_size,
        "global_batch": plan.global_batch,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "train_images": plan.train_images,
        "validation_images": plan.validation_images,
        "steps_per_epoch": plan.steps_per_epoch,
        "left_over_images": plan.left_over_images,
        "total_steps": plan.total_steps,
        "peak_rate": schedule.peak_rate,
        "warmup_steps": schedule.warmup_steps,
        "rates": rates(plan),
        "weight_decay": plan.weight_decay,
        "notes": notes(plan, facts),
        "config": plan.config.model_dump(mode="json", exclude_none=True),
    }
    if facts is None:
        return answer
    largest = largest_micro_batch(plan, facts, assumed.gpu_bytes)
    parts = memory(plan, facts)
    answer |= {
        "parameters": {"decayed": facts.decayed_parameters, "undecayed": facts.undecayed_parameters},
        "batchnorm": asdict(batchnorm_traffic(plan, facts)),
        "memory_bytes": asdict(parts) | {"total": parts.total},
        "largest_micro_batch": {"gpu_bytes": assumed.gpu_bytes, "images": largest},
        "gradient_bytes": gradient_bytes(plan, facts),
        "all_reduce_bytes_sent": all_reduce_bytes(reduced_bytes(plan, facts), plan.world_size),
    }
    if assumed.images_per_second is not None:
        found = speed(plan, facts, assumed.images_per_second, assumed.link)
        answer["speed"] = asdict(found) | {
            "step_seconds": found.step_seconds,
            "assumed": {"speed": assumed.speed_source, "link": assumed.link_source},
        }
    return answer


def json_text(answers: Sequence[dict[str, Any]]) -> str:
    """One plan as an object, two as a list."""
    return json.dumps(answers[0] if len(answers) == 1 else list(answers), indent=2, ensure_ascii=False) + "\n"


def draw_rates(plans: Sequence[Plan], path: Path) -> list[Path]:
    """The rate over epochs, the warmup once more enlarged; return the files.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the files cannot be written.
    """
    warm = max(plan.schedule.warmup_steps / plan.steps_per_epoch for plan in plans)
    figure, axes = new_figure(1, 2 if warm else 1, (11 if warm else 7, 4.5))
    from matplotlib.lines import Line2D

    whole, *enlarged = axes if warm else [axes]
    for one, epochs in [(whole, max(plan.epochs for plan in plans)), *((one, 1.6 * warm) for one in enlarged)]:
        curves = [_rate_curve(plan, min(plan.total_steps, math.ceil(epochs * plan.steps_per_epoch))) for plan in plans]
        for plan, curve, colour, style in zip(plans, curves, COLOURS, line_styles(curves), strict=False):
            file = textwrap.shorten(Path(drawable(plan.config.source.file)).name, 70, placeholder=" …")
            name = f"{file}: batch {plan.global_batch:,}"
            one.plot(*curve, color=colour, label=name, drawstyle="steps-post", linewidth=1.6, **style)
        one.set_xlim(0, max(x[-1] for x, _ in curves))
    for one in (whole, *enlarged):
        one.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    rates = [plan.schedule.rate(step) for plan in plans for step in (0, *_turns(plan, plan.total_steps))]
    logarithmic = max(rates) > 20 * min(rates)  # else what is small would lie on the axis
    if logarithmic:
        whole.autoscale(axis="y")
        set_log_scale(whole)
    whole.set(title="The whole run" + (", logarithmic" if logarithmic else ""))
    for one in enlarged:
        one.set(title="The warmup, enlarged, linear")
    handles = [Line2D([], [], color=line.get_color()) for line in whole.get_lines()]
    labels = [str(line.get_label()) for line in whole.get_lines()]
    add_legend(figure, handles, labels, loc="outside lower center", ncols=1)
    return save_figure(figure, path)


def _rate_curve(plan: Plan, end: int) -> tuple[list[float], list[float]]:
    """Epochs at which steps begin, and their rates; the last rate holds to the end of its step."""
    steps = sorted({*range(0, end, max(1, end // PICTURE_POINTS)), end - 1, *_turns(plan, end)})
    rates = [plan.schedule.rate(step) for step in steps]
    return [step / plan.steps_per_epoch for step in (*steps, end)], [*rates, rates[-1]]


def _turns(plan: Plan, end: int) -> list[int]:
    around = (plan.schedule.warmup_steps, *plan.schedule.milestones)
    return [step for turn in around for step in (turn - 1, turn) if 0 <= step < end]


def _size(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g}{NO_BREAK}{name}"
    return f"{size:.0f}{NO_BREAK}B"


def _gbit(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e9:.3g}{NO_BREAK}Gbit/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}{NO_BREAK}s" if seconds >= 1 else f"{seconds * 1000:.3g}{NO_BREAK}ms"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return _seconds(seconds)
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes}{NO_BREAK}min {rest}{NO_BREAK}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"))
    return " ".join(f"{number}{NO_BREAK}{unit}" for number, unit in parts if number)
