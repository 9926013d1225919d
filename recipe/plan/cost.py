"""Estimates the memory per GPU, the traffic between ranks and the time of a plan, from the stated assumptions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from recipe.config import FOLDERS
from recipe.plan.plan import Plan

VALUE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}
CONTEXT_BYTES = 1.5 * 2**30  # assumed: CUDA context, cuDNN workspaces and memory that the allocator cannot use
BACKWARD_SHARE = 2 / 3  # of a training step: twice the multiplications of the forward pass
VALIDATION_SPEEDUP = 3.0  # a forward pass alone, without the backward pass
RAW_SHORT_SIDE = 256  # of the raw-pixel pack that a plan recommends: the smallest for images of 224 px
# Random resized crops of 224 px that one core loads per second, by pack_short_side and pack_raw: on a busy Intel Xeon,
# benchmarks/results/input_pipeline_raw_cpu.md.
LOADED_PER_CORE: Mapping[tuple[int, bool], float] = {
    (0, False): 371.0,
    (352, False): 554.0,
    (320, False): 663.0,
    (352, True): 1721.0,
    (RAW_SHORT_SIDE, True): 2034.0,
}


@dataclass(frozen=True)
class ModelFacts:
    """Parameter counts of a model and its activation bytes per image of ``image_size`` × ``image_size`` pixels.

    All but ``frozen_parameters`` count only trained layers. ``saved_bytes`` maps each precision to what the forward
    pass keeps for the backward pass: the distinct storages of the tensors that autograd saves, without parameters.
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


# The models of the shipped configs, by name and number of classes; tests compare them with the models themselves. For
# any other model there is ``python -m recipe plan --inspect``.
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
    """The facts of the plan's model if a shipped config has it and all of it is trained."""
    model = plan.config.recipe.model
    return SHIPPED.get((model.architecture, model.num_classes)) if model.freeze == "none" else None


@dataclass(frozen=True)
class Link:
    """The network between two ranks."""

    bytes_per_second: float
    """in each direction, while both are in use"""

    latency_seconds: float
    """one way, for a short message"""


def all_reduce_bytes(message_bytes: float, ranks: int) -> float:
    """The bytes that each rank sends, and receives, in an all-reduce: 2 (P − 1) / P · M.

    No algorithm needs less (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
    """
    return 2 * (ranks - 1) / ranks * message_bytes


def all_reduce_seconds(
    message_bytes: float, ranks: int, link: Link, algorithm: Literal["ring", "tree"] = "ring"
) -> float:
    """The time of an all-reduce: its bytes over the bandwidth, plus the latency of each message of a chain.

    A ring has a chain of 2 (P − 1) messages, a tree and halving-doubling 2 ⌈log₂ P⌉ (Thakur, Rabenseifner and Gropp,
    "Optimization of collective communication operations in MPICH", 2005). The additions are assumed to take no time.
    """
    messages = 2 * (ranks - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(ranks))
    return all_reduce_bytes(message_bytes, ranks) / link.bytes_per_second + messages * link.latency_seconds


def exposed_seconds(all_reduce: float, backward: float, overlaps: bool) -> float:
    """The part of an all-reduce that a step waits for: all of it, or what the backward pass does not hide."""
    return max(0.0, all_reduce - backward) if overlaps else all_reduce


def efficiency(compute_seconds: float, waiting_seconds: float) -> float:
    """The fraction of a step in which a rank computes: the weak-scaling efficiency."""
    return compute_seconds / (compute_seconds + waiting_seconds)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak, which is the end of a forward pass."""

    weights: float
    master_weights: float
    """DeepSpeed's fp32 copy under fp16 and bf16"""

    gradients: float
    momentum: float
    """for LAMB, both moments"""

    average: float
    """the moving average of the weights"""

    reduction: float
    """the buffers of the gradient all-reduce"""

    data_set: float
    """the images that are kept on the device"""

    activations: float
    """the tensors that the forward pass keeps, and the images"""

    workspace: float
    """two gradients of the largest weight, before accumulation, and the context"""

    @property
    def fixed(self) -> float:
        """The part that does not depend on the micro-batch."""
        return sum(vars(self).values()) - self.activations

    @property
    def total(self) -> float:
        return self.fixed + self.activations


def memory(plan: Plan, facts: ModelFacts) -> Memory:
    """Memory by part; ZeRO partitions optimizer state (stage 1), gradients (2) and weights (3) over the ranks."""
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
        data_set=held_bytes(plan),
        activations=plan.micro_batch * activation_bytes(plan, facts),
        workspace=2 * value * facts.largest_parameter + CONTEXT_BYTES,
    )


def held_bytes(plan: Plan) -> float:
    """Bytes of the images that ``recipe.data.on_device`` keeps on each device, as far as a plan can know.

    Training images that are cropped anew in every epoch, or have several sizes, keep their own size, which only the
    files tell: they are left out.
    """
    data = plan.config.recipe.data
    if not data.on_device:
        return 0.0
    resized_once = data.crop != "random_resized" and len(plan.image_sizes) == 1
    training = plan.train_images * plan.image_sizes[0][1] ** 2 if resized_once else 0
    return 3.0 * (training + plan.validation_images * plan.validation_image_size**2)


def activation_bytes(plan: Plan, facts: ModelFacts) -> float:
    """Bytes per image of the largest size: what autograd saves, which grows with the area, and the pixels.

    The pixels count twice, because a batch is prefetched.
    """
    size = plan.largest_image_size
    pixels = 3 * size**2 * VALUE_BYTES[plan.precision]
    return facts.saved_bytes[plan.precision] * (size / facts.image_size) ** 2 + 2 * pixels


def largest_micro_batch(plan: Plan, facts: ModelFacts, gpu_bytes: float) -> int | None:
    """The largest micro-batch that the run could use and that fits the GPU, or None."""
    room = (gpu_bytes - memory(plan, facts).fixed) / activation_bytes(plan, facts)
    return next((size for size in plan.possible_micro_batches if size <= room), None)


def reduction_precision(plan: Plan) -> str:
    """The precision of the gradient all-reduce; fp64 gradients are never reduced in less."""
    return plan.precision if plan.precision == "fp64" else plan.config.communication_data_type or plan.precision


def gradient_bytes(plan: Plan, facts: ModelFacts) -> float:
    """The size of one rank's gradients in the precision of the all-reduce."""
    return VALUE_BYTES[reduction_precision(plan)] * facts.parameters


def reduced_bytes(plan: Plan, facts: ModelFacts) -> float:
    """The size of the single all-reduce that equals the gradient traffic of an optimizer step.

    ZeRO stages 2 and 3 reduce the gradients of every micro-batch, and stage 3 gathers the weights once more, for the
    backward pass, which is half an all-reduce.
    """
    stage = plan.config.zero_optimization.stage
    times = (plan.accumulation if stage >= 2 else 1) * (1.5 if stage == 3 else 1.0)
    return gradient_bytes(plan, facts) * times


def local_bytes(plan: Plan, facts: ModelFacts) -> float | None:
    """The bytes of weights that local SGD averages per optimizer step, on average; None without local SGD."""
    every = plan.config.recipe.local_sgd.steps
    return None if every is None else max(4, VALUE_BYTES[plan.precision]) * facts.parameters / every


@dataclass(frozen=True)
class BatchNormTraffic:
    """Batch norm's images and ranks per group, and its communication per rank and optimizer step.

    ``messages`` is the length of the chain of messages: ⌈log₂ P⌉ per collective, at best.
    """

    images: int
    ranks: int
    collectives: int
    messages: int
    bytes: float


def batchnorm_traffic(plan: Plan, facts: ModelFacts) -> BatchNormTraffic:
    """The traffic of SyncBN on GPUs: mean and variance forward, 2 sums per channel backward.

    With statistics over n images, the running averages (2 values per channel) are averaged over all ranks once a step.
    """
    images = plan.batchnorm_images
    ranks = max(1, images // plan.micro_batch)
    collectives, messages, sent = 0, 0, 0.0
    channel_bytes = 2 * max(4, VALUE_BYTES[plan.precision]) * facts.batchnorm_channels
    if ranks > 1:
        collectives = 2 * facts.batchnorm_layers * plan.accumulation
        messages = collectives * math.ceil(math.log2(ranks))
        sent = plan.accumulation * ((ranks - 1) * channel_bytes + all_reduce_bytes(channel_bytes, ranks))
    if isinstance(plan.config.statistics, int) and plan.world_size > 1 and facts.batchnorm_layers:
        collectives += 1
        messages += math.ceil(math.log2(plan.world_size))
        sent += all_reduce_bytes(channel_bytes, plan.world_size)
    return BatchNormTraffic(images, ranks, collectives, messages, sent)


def cores_to_load(plan: Plan, images_per_second: float) -> tuple[float, float] | None:
    """The CPU cores that load images as fast as one GPU trains: as planned, and from a pack of raw pixels.

    None if no measurement covers this plan.
    """
    data = plan.config.recipe.data
    loaded = LOADED_PER_CORE.get((data.pack_short_side, data.pack_raw))
    is_measured = data.crop == "random_resized" and plan.image_sizes == ((0, 224),) and data.source in FOLDERS
    if loaded is None or not is_measured or data.on_device or data.decoder != "cpu" or data.augment != "none":
        return None
    return images_per_second / loaded, images_per_second / LOADED_PER_CORE[RAW_SHORT_SIDE, True]


@dataclass(frozen=True)
class StepTime:
    """The seconds of an optimizer step by part."""

    compute_seconds: float
    all_reduce_seconds: float
    exposed_seconds: float
    """the part of the all-reduce that the backward pass does not hide"""

    batchnorm_seconds: float

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.batchnorm_seconds


@dataclass(frozen=True)
class Speed(StepTime):
    """The time of a step with the first global batch, and of the whole run."""

    images_per_second: float
    efficiency: float
    training_seconds: float
    validation_seconds: float


def speed(plan: Plan, facts: ModelFacts, images_per_second: float, link: Link) -> Speed:
    """Estimate the time, if each GPU alone trains ``images_per_second``, data is always ready and no rank is late.

    The gradient all-reduce takes the better of ring and tree; batch norm's small collectives take ⌈log₂ P⌉ latencies,
    which nothing hides.
    """
    training, first = 0.0, _step_time(plan, facts, images_per_second, link)
    for phase, steps in plan.timeline.spans(plan.total_steps):
        phase_plan = replace(plan, accumulation=plan.accumulation_of(phase))
        training += steps * _step_time(phase_plan, facts, images_per_second, link).step_seconds
    validation_speed = VALIDATION_SPEEDUP * plan.world_size * images_per_second
    return Speed(
        **vars(first),
        images_per_second=plan.global_batch / first.step_seconds,
        efficiency=efficiency(first.compute_seconds, first.exposed_seconds + first.batchnorm_seconds),
        training_seconds=training,
        validation_seconds=plan.epochs * plan.validation_images / validation_speed,
    )


def _step_time(plan: Plan, facts: ModelFacts, images_per_second: float, link: Link) -> StepTime:
    ranks, traffic, reduction = plan.world_size, batchnorm_traffic(plan, facts), 0.0
    if ranks > 1:
        message = reduced_bytes(plan, facts)
        reduction = min(all_reduce_seconds(message, ranks, link, algorithm) for algorithm in ("ring", "tree"))
    return StepTime(
        compute_seconds=plan.accumulation * plan.micro_batch / images_per_second,
        all_reduce_seconds=reduction,
        exposed_seconds=exposed_seconds(reduction, hiding_seconds(plan, images_per_second), overlaps_reduction(plan)),
        batchnorm_seconds=traffic.bytes / link.bytes_per_second + traffic.messages * link.latency_seconds,
    )


def overlaps_reduction(plan: Plan) -> bool:
    """Whether gradients are reduced during the backward pass: at ZeRO stages 0 and 3 by default.

    A compiled backward pass returns them only at its end.
    """
    if plan.config.recipe.compile:
        return False
    zero = plan.config.zero_optimization
    return zero.stage in (0, 3) if zero.overlap_comm is None else zero.overlap_comm


def hiding_seconds(plan: Plan, images_per_second: float) -> float:
    """The time of the backward passes that hide the all-reduce: the last one, or all of a step from ZeRO-2 on."""
    images = plan.micro_batch * (plan.accumulation if plan.config.zero_optimization.stage >= 2 else 1)
    return BACKWARD_SHARE * images / images_per_second


def hidden_bandwidth(plan: Plan, facts: ModelFacts, images_per_second: float) -> float:
    """The bytes per second, each way, at which the backward pass just hides the all-reduce."""
    sent = all_reduce_bytes(reduced_bytes(plan, facts), plan.world_size)
    return sent / hiding_seconds(plan, images_per_second)
