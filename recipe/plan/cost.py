"""What a plan costs on paper: memory per GPU, messages between ranks, time. Each function says what it assumes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from recipe.config import FOLDERS
from recipe.plan.plan import Plan, fitting_micro_batches

VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}
CONTEXT_BYTES = 1.5 * 2**30  # assumed: CUDA's context, cuDNN's workspaces, what the allocator cannot use
BACKWARD_SHARE = 2 / 3  # of a training step: twice the multiplications of the forward pass
VALIDATION_SPEEDUP = 3.0  # a forward pass alone
RAW_SHORT_SIDE = 256  # of the pack of raw pixels that is recommended: the smallest for images of 224 px
# Random resized crops of 224 px that one core reads, decodes and cuts per second, by pack_short_side and pack_raw: on a
# busy Intel Xeon, benchmarks/results/input_pipeline_raw_cpu.md.
LOADED_PER_CORE: Mapping[tuple[int, bool], float] = {
    (0, False): 371.0,
    (352, False): 554.0,
    (320, False): 663.0,
    (352, True): 1721.0,
    (RAW_SHORT_SIDE, True): 2034.0,
}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model: numbers of values, and bytes per image of ``image_size`` pixels a side.

    All but ``frozen_parameters`` is of what is trained. ``saved_bytes`` is what a forward pass keeps for the backward
    pass, by precision: the distinct storages among the tensors that autograd saves, without the parameters.
    """

    decayed_parameters: int
    undecayed_parameters: int
    largest_parameter: int
    batchnorm_layers: int
    batchnorm_channels: int
    image_size: int
    saved_bytes: Mapping[str, int]
    frozen_parameters: int = 0

    @property
    def parameters(self) -> int:
        return self.decayed_parameters + self.undecayed_parameters


# The shipped configs' models, by name and classes; tests hold them against the models themselves. Any other is
# inspected: ``python -m recipe plan --inspect``.
SHIPPED: Mapping[tuple[str, int], ModelFacts] = {
    ("resnet50", 1000): ModelFacts(
        decayed_parameters=25_502_912,
        undecayed_parameters=54_120,
        largest_parameter=2_359_296,
        batchnorm_layers=53,
        batchnorm_channels=26_560,
        image_size=224,
        saved_bytes={"fp32": 85_913_512, "fp16": 43_761_576, "bf16": 43_761_576, "fp64": 170_221_384},
    ),
    ("resnet18", 10): ModelFacts(
        decayed_parameters=11_172_032,
        undecayed_parameters=9_610,
        largest_parameter=2_359_296,
        batchnorm_layers=20,
        batchnorm_channels=4_800,
        image_size=64,
        saved_bytes={"fp32": 1_812_528, "fp16": 971_824, "bf16": 971_824, "fp64": 3_493_976},
    ),
    ("test_resnet", 10): ModelFacts(
        decayed_parameters=371_568,
        undecayed_parameters=2_090,
        largest_parameter=165_888,
        batchnorm_layers=15,
        batchnorm_channels=1_040,
        image_size=32,
        saved_bytes={"fp32": 238_896, "fp16": 127_664, "bf16": 127_664, "fp64": 461_400},
    ),
}


def shipped_facts(plan: Plan) -> ModelFacts | None:
    """Those of the plan's model, where it is among the shipped configs' and trains as a whole."""
    model = plan.config.recipe.model
    return SHIPPED.get((model.architecture, model.num_classes)) if model.freeze == "none" else None


@dataclass(frozen=True)
class Link:
    """What lies between two ranks."""

    bytes_per_second: float
    """what a rank sends while it receives as much"""

    latency_seconds: float
    """of a short message, one way"""


def all_reduce_bytes(message_bytes: float, ranks: int) -> float:
    """What each rank sends, and receives, in an all-reduce: 2 (P − 1) / P · M.

    No algorithm needs less (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
    """
    return 2 * (ranks - 1) / ranks * message_bytes


def all_reduce_seconds(
    message_bytes: float, ranks: int, link: Link, algorithm: Literal["ring", "tree"] = "ring"
) -> float:
    """The time of an all-reduce: its bytes over the bandwidth, and a latency for each message of a chain.

    A ring has 2 (P − 1) messages one after the other, a tree and halving-doubling 2 ⌈log₂ P⌉ (Thakur, Rabenseifner and
    Gropp, "Optimization of collective communication operations in MPICH", 2005). Adding up the numbers takes no time
    here.
    """
    messages = 2 * (ranks - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(ranks))
    return all_reduce_bytes(message_bytes, ranks) / link.bytes_per_second + messages * link.latency_seconds


def exposed_seconds(all_reduce: float, backward: float, overlaps: bool) -> float:
    """What of an all-reduce a step waits for: all of it, or what the backward pass does not hide."""
    return max(0.0, all_reduce - backward) if overlaps else all_reduce


def efficiency(compute_seconds: float, waiting_seconds: float) -> float:
    """The share of a step in which a rank computes: its speed beside that of one alone, for as many images each."""
    return compute_seconds / (compute_seconds + waiting_seconds)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak, which is the end of a forward pass."""

    weights: float
    master_weights: float
    """DeepSpeed's fp32 copy under fp16 and bf16"""

    gradients: float
    momentum: float
    """of LAMB two moments"""

    average: float
    """the moving average of the weights"""

    reduction: float
    """the messages in which gradients travel"""

    activations: float
    """what the forward pass keeps, and the images"""

    workspace: float
    """the gradient of the largest weight before it is added up, twice; the context"""

    @property
    def fixed(self) -> float:
        """All that does not depend on the micro-batch."""
        return sum(vars(self).values()) - self.activations

    @property
    def total(self) -> float:
        return self.fixed + self.activations


def memory(plan: Plan, facts: ModelFacts) -> Memory:
    """Memory by part; under ZeRO the optimizer's state (1), gradients (2) and weights (3) are shared by the ranks."""
    value, ranks, parameters = VALUE_BYTES[plan.precision], plan.world_size, facts.parameters
    stage = plan.config.zero_optimization.stage
    half = plan.precision in ("fp16", "bf16")
    optimizer_share = 1 / ranks if stage >= 1 else 1.0
    return Memory(
        weights=value * (parameters + facts.frozen_parameters) / (ranks if stage == 3 else 1),
        master_weights=4 * parameters * optimizer_share if half else 0.0,
        gradients=value * parameters / (ranks if stage >= 2 else 1),
        momentum=max(4, value) * parameters * optimizer_share * (2 if plan.config.optimizer.type == "LAMB" else 1),
        average=max(4, value) * parameters if plan.config.recipe.ema.decay is not None else 0.0,
        reduction=gradient_bytes(plan, facts) if ranks > 1 else 0.0,
        activations=plan.micro_batch * activation_bytes(plan, facts),
        workspace=2 * value * facts.largest_parameter + CONTEXT_BYTES,
    )


def activation_bytes(plan: Plan, facts: ModelFacts) -> float:
    """Bytes per image: what autograd saves, which grows with the area, and the image twice, as one is fetched ahead.

    Of the largest images.
    """
    size = plan.largest_image_size
    pixels = 3 * size**2 * VALUE_BYTES[plan.precision]
    return facts.saved_bytes[plan.precision] * (size / facts.image_size) ** 2 + 2 * pixels


def largest_micro_batch(plan: Plan, facts: ModelFacts, gpu_bytes: float) -> int | None:
    """The largest micro-batch that shares out the global batch, holds batch norm's groups and fits; None if none."""
    room = (gpu_bytes - memory(plan, facts).fixed) / activation_bytes(plan, facts)
    sizes = fitting_micro_batches(plan.config.common_batch, plan.world_size, plan.config.statistics)
    return next((size for size in sizes if size <= room), None)


def travelling_precision(plan: Plan) -> str:
    """In which gradients travel; the recipe lets those of fp64 travel in nothing less."""
    return plan.precision if plan.precision == "fp64" else plan.config.communication_data_type or plan.precision


def gradient_bytes(plan: Plan, facts: ModelFacts) -> float:
    """The gradients of one rank, in the precision in which they travel."""
    return VALUE_BYTES[travelling_precision(plan)] * facts.parameters


def reduced_bytes(plan: Plan, facts: ModelFacts) -> float:
    """What is reduced in an optimizer step, as the length of one all-reduce.

    The gradients once; from ZeRO-2 on DeepSpeed reduces those of every micro-batch, and ZeRO-3 gathers the weights
    once more, for the backward pass, which is half an all-reduce.
    """
    stage = plan.config.zero_optimization.stage
    times = (plan.accumulation if stage >= 2 else 1) * (1.5 if stage == 3 else 1.0)
    return gradient_bytes(plan, facts) * times


def local_bytes(plan: Plan, facts: ModelFacts) -> float | None:
    """What local SGD reduces in an optimizer step, on average: the weights, every so many steps; None without it."""
    every = plan.config.recipe.local_sgd.steps
    return None if every is None else max(4, VALUE_BYTES[plan.precision]) * facts.parameters / every


@dataclass(frozen=True)
class BatchNormTraffic:
    """``ranks`` hold a group's images together; the rest is of one rank and optimizer step.

    ``messages`` counts those that follow one another: ⌈log₂ P⌉ a collective, at best.
    """

    images: int
    ranks: int
    collectives: int
    messages: int
    bytes: float


def batchnorm_traffic(plan: Plan, facts: ModelFacts) -> BatchNormTraffic:
    """As torch's SyncBatchNorm: a layer gathers mean, variance and count forward, and sums 2 values a channel back.

    With n images the running averages, 2 values a channel, are averaged over all ranks once a step.
    """
    n, value = plan.config.statistics, 8 if plan.precision == "fp64" else 4
    if n == "global":
        images, ranks = plan.micro_batch * plan.world_size, plan.world_size
    elif n == "local":
        images, ranks = plan.micro_batch, 1
    else:
        images, ranks = n, max(1, n // plan.micro_batch)
    collectives, messages, sent = 0, 0, 0.0
    two_a_channel = value * 2 * facts.batchnorm_channels
    if ranks > 1:
        collectives = 2 * facts.batchnorm_layers * plan.accumulation
        messages = collectives * math.ceil(math.log2(ranks))
        forward = (ranks - 1) * (two_a_channel + value * facts.batchnorm_layers)
        sent = plan.accumulation * (forward + all_reduce_bytes(two_a_channel, ranks))
    if isinstance(n, int) and plan.world_size > 1 and facts.batchnorm_layers:
        collectives += 1
        messages += math.ceil(math.log2(plan.world_size))
        sent += all_reduce_bytes(two_a_channel, plan.world_size)
    return BatchNormTraffic(images, ranks, collectives, messages, sent)


def cores_to_load(plan: Plan, images_per_second: float) -> tuple[float, float] | None:
    """Cores that make as many images ready as one GPU trains: as planned, and from a pack of raw pixels.

    None where nobody has measured what is planned.
    """
    data = plan.config.recipe.data
    loaded = LOADED_PER_CORE.get((data.pack_short_side, data.pack_raw))
    is_measured = data.crop == "random_resized" and plan.image_sizes == ((0, 224),) and data.source in FOLDERS
    if loaded is None or not is_measured or data.on_device or data.decoder != "cpu" or data.augment != "none":
        return None
    return images_per_second / loaded, images_per_second / LOADED_PER_CORE[RAW_SHORT_SIDE, True]


@dataclass(frozen=True)
class Speed:
    """Seconds of a step by part, and what follows for the run."""

    compute_seconds: float
    all_reduce_seconds: float
    exposed_seconds: float
    """what of the all-reduce the backward pass of the last micro-batch does not hide"""

    batchnorm_seconds: float
    images_per_second: float
    efficiency: float
    training_seconds: float
    validation_seconds: float

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.batchnorm_seconds


def speed(plan: Plan, facts: ModelFacts, images_per_second: float, link: Link) -> Speed:
    """Time on paper, where each GPU alone computes ``images_per_second``, the data never waits and nobody is late.

    The gradients' all-reduce is the better of ring and tree; batch norm's small collectives take ⌈log₂ P⌉ latencies at
    best, and nothing hides them.
    """
    compute, reduction, exposed, batchnorm = _step_seconds(plan, facts, images_per_second, link)
    step, training = compute + exposed + batchnorm, 0.0
    for phase, steps in plan.timeline.spans(plan.total_steps):
        of_phase = replace(plan, accumulation=plan.accumulation_of(phase))
        computing, _, *waiting = _step_seconds(of_phase, facts, images_per_second, link)
        training += steps * (computing + sum(waiting))
    return Speed(
        compute_seconds=compute,
        all_reduce_seconds=reduction,
        exposed_seconds=exposed,
        batchnorm_seconds=batchnorm,
        images_per_second=plan.global_batch / step,
        efficiency=efficiency(compute, exposed + batchnorm),
        training_seconds=training,
        validation_seconds=plan.epochs
        * plan.validation_images
        / (VALIDATION_SPEEDUP * plan.world_size * images_per_second),
    )


def _step_seconds(
    plan: Plan, facts: ModelFacts, images_per_second: float, link: Link
) -> tuple[float, float, float, float]:
    """Of a step of the plan's accumulation: computing, the all-reduce, what of it is exposed, and batch norm's part."""
    ranks, traffic, reduction = plan.world_size, batchnorm_traffic(plan, facts), 0.0
    if ranks > 1:
        message = reduced_bytes(plan, facts)
        reduction = min(all_reduce_seconds(message, ranks, link, algorithm) for algorithm in ("ring", "tree"))
    return (
        plan.accumulation * plan.micro_batch / images_per_second,
        reduction,
        exposed_seconds(reduction, hiding_seconds(plan, images_per_second), overlaps_reduction(plan)),
        traffic.bytes / link.bytes_per_second + traffic.messages * link.latency_seconds,
    )


def overlaps_reduction(plan: Plan) -> bool:
    """Whether gradients travel during the backward pass: the recipe's own way at stage 0, DeepSpeed's default at 3.

    A compiled backward pass delivers them at its end.
    """
    if plan.config.recipe.compile:
        return False
    zero = plan.config.zero_optimization
    return zero.stage in (0, 3) if zero.overlap_comm is None else zero.overlap_comm


def hiding_seconds(plan: Plan, images_per_second: float) -> float:
    """The backward passes that hide the all-reduce: the last micro-batch's, and from ZeRO-2 on all of a step."""
    images = plan.micro_batch * (plan.accumulation if plan.config.zero_optimization.stage >= 2 else 1)
    return BACKWARD_SHARE * images / images_per_second


def hidden_bandwidth(plan: Plan, facts: ModelFacts, images_per_second: float) -> float:
    """Bytes a second, each way, at which the backward pass just hides the all-reduce."""
    sent = all_reduce_bytes(reduced_bytes(plan, facts), plan.world_size)
    return sent / hiding_seconds(plan, images_per_second)
