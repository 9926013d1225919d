"""Reads one config, a DeepSpeed JSON with a section ``recipe``, strictly into a frozen, typed view.

Every refusal is a ``ConfigError``: one line with file, key, value, what is wrong and what would be right.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from recipe.config.deepspeed_sections import (
    OPTIMIZER_KEYS,
    Auto,
    BatchSize,
    Count,
    DeepSpeedConfig,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    keys_of_others,
)
from recipe.config.model_names import trains_no_batchnorm
from recipe.config.reader import ABSENT, ConfigError, apply_override, parse_json, read_text
from recipe.config.validation import validate


@dataclass(frozen=True)
class Source:
    """Where a config comes from, for messages and for writing it down again."""

    file: str
    """the file's name, with every ``--set`` that changed it"""

    text: str
    """the JSON after every ``--set``, as the user wrote it: with each "auto", without defaults"""

    @property
    def raw(self) -> dict[str, Any]:
        """The JSON as a dict of the caller's own, which it may change."""
        raw: dict[str, Any] = json.loads(self.text)
        return raw

    def refusal(self, key: str, problem: str, remedy: str) -> ConfigError:
        """The error that refuses what the file says under a dotted key."""
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        return ConfigError(self.file, key, value, problem, remedy)


# The sources that recipe.data.path leads to, in words.
FOLDERS = {"imagefolder": "an imagefolder", "pack": "a pack", "huggingface": "a data set of Hugging Face"}


class Model(Section):
    name: str = Field(min_length=1)
    """timm's name of a model, such as "resnet50"; with a tag, such as "resnet50.a1_in1k", training starts from timm's
    weights of that name, which are fetched from the internet"""

    num_classes: int = Field(ge=2, le=10_000_000)
    """the number of classes, a whole number from 2 to 10,000,000"""

    zero_init_last: bool = True
    """true or false: whether the last batch norm of each residual block of a ResNet begins with gamma = 0, as the
    paper's does (section 5.1), or with 1"""

    weights: str | None = Field(None, min_length=1)
    """the weights that training starts from: a .safetensors or .pth file, a folder such as python -m recipe export
    writes, "hf-hub:owner/name", or null for random ones; a head for another number of classes is made anew"""

    freeze: Literal["none", "backbone"] = "none"
    """ "backbone" trains the head alone, with batch norm in evaluation mode; "none" trains all weights"""

    gradient_checkpointing: bool = False
    """true or false: whether the backward pass computes most activations again in place of keeping them, which takes
    less memory and more time; the training is the same to the bit. For models that timm can checkpoint, such as its
    ResNets; not with recipe.compile, which decides by itself what to compute again"""

    @property
    def architecture(self) -> str:
        """timm's name without a tag."""
        return self.name.partition(".")[0]

    @property
    def starts_from(self) -> str | None:
        """The weights, as the file or the name's tag has them; None for random ones."""
        return self.weights or (self.name if "." in self.name else None)


class BatchNorm(Section):
    statistics: Literal["global", "local"] | Count = "global"
    """what batch norm averages over: "global" (all GPUs' micro-batches), "local" (each GPU's) or a number of
    samples, a whole number >= 1; the paper's is 32. A number of samples makes the training the same on any number of
    GPUs; "global" is SyncBN"""


Unit = Annotated[float, Field(ge=0, le=1)]
Three = Field(strict=False, min_length=3, max_length=3)


Share = Annotated[float, Field(ge=0, le=1)]


class Mixup(Section):
    probability: Share = 0
    """the share of the steps in which mixup blends each image with its neighbour in the batch, a number from 0 to 1.
    All pairs of a step are blended alike"""

    alpha: PositiveFloat = 0.2
    """the alpha of Beta(alpha, alpha), by which mixup draws how much of an image stays, a number > 0; 0.2 in its paper
    for ImageNet"""


class CutMix(Section):
    probability: Share = 0
    """the share of the steps in which CutMix puts a box of its neighbour in the batch into each image, a number from 0
    to 1. All pairs of a step have one box"""

    alpha: PositiveFloat = 1
    """the alpha of Beta(alpha, alpha), by which CutMix draws how much of an image stays, a number > 0; 1 in its
    paper"""


ImageSize = Annotated[int, Field(ge=8, le=4096)]
SizeChange = Annotated[tuple[Annotated[int, Field(ge=0)], ImageSize], Field(strict=False)]


class Data(Section):
    source: Literal["digits", "imagefolder", "pack", "huggingface", "synthetic"]
    """ "digits" (scikit-learn's), "imagefolder" (a folder for each class), "pack" (what python -m recipe pack makes of
    one), "huggingface" (what Hugging Face's package datasets loads) or "synthetic" (random pixels). The digits ship
    with scikit-learn; "synthetic" is one random batch, for speed tests"""

    path: str | None = Field(None, min_length=1)
    """the folder of an imagefolder, a pack or a data set of Hugging Face, or the owner/name of one on the hub; null for
    the other sources. --data sets it"""

    pack_short_side: Annotated[int, Field(ge=0)] = 0
    """the short side in pixels to which the pack's larger images were resized, a whole number, as its pack.json says;
    0: all images are the original bytes. A run checks it against the pack, because the pixels depend on it"""

    pack_raw: bool = False
    """true or false: whether the pack is one of raw pixels, as its pack.json says. A run checks that, too"""

    image_size: Annotated[tuple[SizeChange, ...], Field(strict=False, min_length=1)] | ImageSize | Auto
    """height and width of the images that the model sees, in pixels, a whole number from 8 to 4096, a list of
    [epoch, size], epochs that rise from 0, or "auto": as the weights of recipe.model.weights were trained, where a
    config.json beside them tells. A list is progressive resizing: from that epoch on, counted from 0, training images
    have that size"""

    validation_image_size: ImageSize | None = None
    """height and width of the images in validation, in pixels, a whole number from 8 to 4096, or null: those of the
    last training images. Crops that are resized show objects larger than validation does, so that a network gains from
    larger images there (FixRes). evaluate, predict and export take this size, too"""

    train_images: Count | Auto = "auto"
    """images to train on, a whole number >= 1, so that a plan needs no data, or "auto": as many as there are"""

    validation_images: Count | Auto = "auto"
    """images to validate on, a whole number >= 1, so that a plan needs no data, or "auto": as many as there are"""

    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """the share of the images of each class to validate on where an imagefolder has no val/, or a data set of Hugging
    Face no such split, a number > 0 and < 1, such as 0.1, or null. Which images these are is a function of their names,
    or places, the same in every run"""

    crop: Literal["random_resized", "padded", "none"] = "random_resized"
    """ "random_resized" (the paper's), "padded" (shifted by a few pixels) or "none". Validation takes the centre
    crop of an image resized to 8/7 of its size (256 for 224) for "random_resized"; "padded" shifts by up to 1/8 of
    image_size"""

    flip: bool = True
    """true or false: whether half of the training images are mirrored; the paper's are"""

    augment: Literal["none", "trivial", "rand"] = "none"
    """ "none", "trivial" (TrivialAugment, Müller and Hutter 2021) or "rand" (RandAugment, Cubuk et al. 2020): what else
    is done to each training image. The operations are torchvision's, such as rotating, brightening and sharpening, one
    of them of any strength for "trivial", two of the strength augment_magnitude for "rand". Loader processes do it, so
    that images may not be decoded or held on the device"""

    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """the strength of the operations of augment "rand", a whole number from 0 to 30; 9 is torchvision's default"""

    random_erasing: Share = 0
    """the share of the training images of which a box is erased, a number from 0 to 1. The box has 2 to 33 % of the
    area and becomes the mean colour, as with timm's and torchvision's RandomErasing"""

    mixup: Mixup = Mixup()
    """an object with probability and alpha"""

    cutmix: CutMix = CutMix()
    """an object with probability and alpha"""

    mean: Annotated[tuple[Unit, ...], Three] | Auto = "auto"
    """the mean of red, green and blue, three numbers from 0 to 1, or "auto": the weights' own,
    where a config.json beside them tells, or else the source's. For files of images that is ImageNet's"""

    std: Annotated[tuple[PositiveFloat, ...], Three] | Auto = "auto"
    """the standard deviation of red, green and blue on a scale from 0 to 1, three numbers > 0, or "auto": the
    weights' own, or the source's. For files of images that is ImageNet's"""

    workers: Annotated[int, Field(ge=0)] | Auto = "auto"
    """loader processes per GPU, a whole number >= 0, or "auto": from the CPU cores at hand. That is a rank's
    share of the cores less one, and none for digits"""

    decoder: Literal["cpu", "gpu", "dali"] = "cpu"
    """what decodes, crops and resizes JPEGs: "cpu" (the workers), "gpu" (nvJPEG and
    torch) or "dali" (NVIDIA's package, on a CPU, too); the crops are the same, the pixels nearly so. A
    run cannot resume with another decoder"""

    on_device: bool = False
    """true or false: whether all images are decoded once, at the start, and kept on the device, which crops and mirrors
    whole batches; for data of CIFAR's size. Digits are, where augment is "none"; the training is the same to the
    bit"""

    on_bad_image: Literal["stop", "skip"] = "stop"
    """ "stop" or "skip": what an image that cannot be read does to the run. "skip" trains on the next image
    instead, leaves it out of validation and lists it in the summary"""

    @model_serializer(mode="wrap")
    def _of_this_augmentation(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        others = set() if self.augment == "rand" else {"augment_magnitude"}
        return {name: value for name, value in dump(self).items() if name not in others}

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup.probability + self.cutmix.probability > 0

    @property
    def is_to_be_counted(self) -> bool:
        """Whether only a look into the folder tells how many images there are."""
        return self.source in FOLDERS and "auto" in (self.train_images, self.validation_images)


BatchChange = Annotated[tuple[Count, BatchSize], Field(strict=False)]

DECAY_KEYS = {
    "step": ("decay_epochs", "decay_factor"),
    "cosine": ("final_lr",),
    "polynomial": ("decay_power", "final_lr"),
    "linear": ("final_lr",),
    "none": (),
}


class Schedule(Section):
    epochs: Annotated[int, Field(ge=1, le=10**6)]
    """passes over the training images, a whole number from 1 to 1,000,000. The last, partial batch of each is
    dropped"""

    batch_size: Annotated[tuple[BatchChange, ...], Field(strict=False, min_length=1)] | None = None
    """later global batches, a list of [epoch, batch], epochs >= 1 that rise, or null: train_batch_size throughout.
    From that epoch on, counted from 0, an optimizer step has so many images, by more accumulation steps of the same
    micro-batch, and scaling_rule gives its rate"""

    reference_lr: PositiveFloat = 0.1
    """the rate at the reference batch, a number > 0; the paper's is 0.1 (section 2.1)"""

    reference_batch_size: Count = 256
    """images in the batch for which the reference rate holds, a whole number >= 1; the paper's is 256"""

    scaling_rule: Literal["linear", "sqrt", "none"] = "linear"
    """ "linear" (the paper's), "sqrt" or "none": how the rate follows the global batch. "none" takes the rate
    that optimizer.params.lr writes, or else the reference rate"""

    warmup: Literal["gradual", "constant", "none"] = "gradual"
    """ "gradual" (the paper's), "constant" or "none": how the rate comes to its peak. Warmup starts at
    scheduler.params.warmup_min_lr, with "auto" reference_lr; only batches above the reference batch with a peak above
    that rate have one"""

    warmup_epochs: NonNegativeFloat = 5
    """epochs of warmup, a number >= 0; the paper's is 5 (section 2.2)"""

    decay: Literal["step", "cosine", "polynomial", "linear", "none"] = "step"
    """ "step" (the paper's), "cosine", "polynomial", "linear" or "none": how the rate falls after the warmup. "step"
    has decay_epochs and decay_factor; "cosine", "polynomial" and "linear" lead from the peak rate to final_lr, which
    the step after the last would have. Keys of another decay are refused: --set KEY=null removes one"""

    decay_epochs: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = (30, 60, 80)
    """the epochs after which the rate decays, a list of rising numbers > 0; the paper's are 30, 60 and 80"""

    decay_factor: float = Field(0.1, gt=0, le=1)
    """by what the rate is multiplied at each decay, a number > 0 and <= 1; the paper's is 0.1"""

    decay_power: Annotated[float, Field(gt=0, le=100)] = 2
    """the power of a polynomial decay, a number > 0 and <= 100; MLPerf's is 2. The rate falls by
    (1 - share of the steps after the warmup) ** decay_power"""

    final_lr: NonNegativeFloat = 0
    """the rate to which a cosine, polynomial or linear decay leads, a number >= 0. It does not follow the batch"""

    weight_decay_rule: Literal["constant", "inverse"] = "constant"
    """ "constant" (the paper's) or "inverse": how the weight decay follows the global batch. "inverse" divides
    the reference weight decay by train_batch_size / reference_batch_size"""

    reference_weight_decay: NonNegativeFloat | None = None
    """the weight decay at the reference batch, a number >= 0, or null. Null is 1e-4, the paper's"""

    @model_serializer(mode="wrap")
    def _of_this_decay(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        others = keys_of_others(DECAY_KEYS, self.decay)
        return {name: value for name, value in dump(self).items() if name not in others}


class Loss(Section):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """the share of each label that is spread evenly over all classes in training, a number >= 0 and < 1; 0.1 in the
    records, 0 in the paper. The training loss in metrics.jsonl has it, that of a validation has not"""


class Ema(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """by what each image multiplies the moving average of the weights before theirs are added to it, a number > 0 and
    < 1, such as 0.9999998, or null for none. A step decays it by decay ** the global batch, so that another batch looks
    back equally far; a usual decay d per step is d ** (1 / the global batch) here. Until the average has seen that many
    images, it is the plain mean of all weights so far. It is validated beside the weights, and evaluate, predict and
    export take it. Not with ZeRO stages 1 to 3"""


class LocalSgd(Section):
    steps: Count | None = None
    """optimizer steps that each rank makes alone before the weights are averaged over the ranks, a whole number >= 1,
    or null: gradients are averaged at every step. Weights are averaged at the end of each epoch, too, and checkpoints
    wait for it; momentum stays each rank's own. The training is then another on another number of GPUs. Not with fp16,
    ZeRO stages 1 to 3, a moving average, the noise scale, nor batch norm statistics over several ranks"""

    after_epoch: Annotated[int, Field(ge=0)] | None = None
    """the epochs before that in which gradients are averaged at every step, a whole number >= 0, or null for none"""


class Checkpoint(Section):
    every_steps: Count | None = None
    """optimizer steps between checkpoints within an epoch, a whole number >= 1, or null for none. Each epoch ends with
    a checkpoint anyway"""

    every_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """minutes between checkpoints within an epoch, a number > 0 and <= 1e6, or null for none. Each epoch ends with a
    checkpoint anyway"""

    @property
    def save_every(self) -> timedelta | None:
        """``every_minutes`` as a span of time."""
        return None if self.every_minutes is None else timedelta(minutes=self.every_minutes)

    keep_last: Count = 2
    """how many of the latest checkpoints stay, a whole number >= 1; 2, because the latest may not be whole"""

    keep_best: bool = True
    """true or false: whether the checkpoint with the best top-1 accuracy stays, too"""


class NoiseScale(Section):
    enabled: bool = False
    """true or false: whether the gradient noise scale is estimated, that is, up to which batch more images pay.
    Not with ZeRO stages 1 to 3, nor with statistics over several ranks ("global")"""

    every_steps: Count = 10
    """optimizer steps between two measurements, a whole number >= 1; 10, which divides their cost by ten"""


class Distributed(Section):
    timeout_seconds: Annotated[float, Field(ge=5, le=86_400)] = 120
    """how long a rank waits for the others, in seconds, a number from 5 to 86400; 120, because it is the time that a
    cluster stands still when a host is cut off. A rank without data ends the run after three quarters of it"""


class Recipe(Section):
    """What DeepSpeed has no word for."""

    model: Model
    """an object with name, num_classes and zero_init_last"""

    max_micro_batch_size: Count | Auto = 256
    """images per GPU and forward pass that an "auto" may take at most, a whole number >= 1, or "auto": as many as fit
    the GPU, 32 on a CPU. "auto" tries training steps at the start and takes the largest micro-batch that fits every
    rank's GPU"""

    batchnorm: BatchNorm = BatchNorm()
    """an object with statistics"""

    data: Data
    """an object with source, image_size and what else the source needs"""

    schedule: Schedule
    """an object with epochs and what else differs from the paper"""

    loss: Loss = Loss()
    """an object with label_smoothing"""

    ema: Ema = Ema()
    """an object with decay"""

    local_sgd: LocalSgd = LocalSgd()
    """an object with steps and after_epoch"""

    precision: Literal["fp32", "fp64"] | None = None
    """ "fp32" keeps GPUs from rounding factors to TF32, "fp64" trains in double precision, for checks in which rounding
    must not matter; null: as fp16 and bf16 say, and else fp32 with TF32"""

    compile: bool = False
    """true or false: whether torch.compile makes kernels of its own for model and loss, for which the first steps take
    minutes; other roundings, the same training. Not with ZeRO stage 3"""

    cudnn_benchmark: bool = False
    """true or false: whether cuDNN tries out which of its algorithms are the fastest, which may be others in a resumed
    run; false takes only those that give the same bits again"""

    checkpoint: Checkpoint = Checkpoint()
    """an object with every_steps, every_minutes, keep_last and keep_best"""

    noise_scale: NoiseScale = NoiseScale()
    """an object with enabled and every_steps"""

    distributed: Distributed = Distributed()
    """an object with timeout_seconds"""

    seed: int = Field(0, ge=0, lt=2**63)
    """the root of all randomness, a whole number >= 0 and < 2^63"""


class Config(DeepSpeedConfig):
    """A config that holds together by itself; whether it fits GPUs and data is the plan's to say.

    ``model_fields_set`` of each section tells which keys the file writes.
    """

    recipe: Recipe
    """an object with model, data and schedule"""

    _source: Source = PrivateAttr()

    @property
    def source(self) -> Source:
        """The file behind the view; not a field, so that a dump of the view is a config again."""
        return self._source

    @property
    def batch_changes(self) -> tuple[tuple[int, int], ...]:
        """The global batches within the run, each with the epoch, counted from 0, from which on it holds."""
        schedule = self.recipe.schedule
        later = (change for change in schedule.batch_size or () if change[0] < schedule.epochs)
        return ((0, self.train_batch_size), *later)

    @property
    def batches(self) -> list[int]:
        """The global batches within the run, in their order."""
        return [batch for _, batch in self.batch_changes]

    @property
    def common_batch(self) -> int:
        """Images whose divisors divide every global batch of the run, as a micro-batch must."""
        return math.gcd(*self.batches)

    @property
    def statistics(self) -> Literal["global", "local"] | int:
        """``recipe.batchnorm.statistics``; where no batch norm trains, nothing is asked of ranks and micro-batch."""
        model = self.recipe.model
        return "local" if trains_no_batchnorm(model.name, model.freeze) else self.recipe.batchnorm.statistics

    @property
    def precision(self) -> str:
        """The precision of forward and backward pass."""
        if self.recipe.precision is not None:
            return self.recipe.precision
        if self.fp16.enabled:
            return "fp16"
        return "bf16" if self.bf16.enabled else "fp32"


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file; an override is ``--set``'s KEY=VALUE: a dotted key, and JSON or else a string."""
    file = str(path)
    raw = parse_json(read_text(Path(path), "*.json"), file)
    if overrides:
        file += f" (with {' '.join(f'--set {override}' for override in overrides)})"
    for override in overrides:
        apply_override(raw, override, file)
    return parse_config(raw, file)


def parse_config(raw: dict[str, Any], file: str) -> Config:
    """The typed view of a config that is already in memory; ``file`` is its name in messages."""
    config = validate(Config, raw, file, "write a DeepSpeed config with a section recipe")
    config._source = Source(file, json.dumps(raw))
    for key, problem, remedy in (contradictions := _contradictions(config)):
        others = "".join(f"; also {': '.join(other[:2])}; {other[2]}" for other in contradictions)
        raise config.source.refusal(key, problem, remedy + others)
    return config


def _contradictions(config: Config) -> Iterator[tuple[str, str, str]]:
    """Key, problem and remedy of what keys say that only together are wrong."""
    params, zero = config.optimizer.params, config.zero_optimization
    data, schedule = config.recipe.data, config.recipe.schedule
    optimizer = config.optimizer.type
    for name in sorted(keys_of_others(OPTIMIZER_KEYS, optimizer) & params.model_fields_set):
        key = f"optimizer.params.{name}"
        yield key, f"{optimizer} has none", f"remove it (--set {key}=null)"
    if optimizer != "SGD" and zero.stage:
        yield (
            "optimizer.type",
            f"ZeRO stage {zero.stage} cuts the weights into parts, which do not have the norms of whole layers",
            'write zero_optimization.stage 0, or "SGD"',
        )
    if optimizer != "SGD" and params.weight_decay == 0:
        yield "optimizer.params.weight_decay", f"{optimizer} has no trust ratio without it", "write a number > 0"
    if optimizer == "SGD" and params.nesterov and params.momentum == 0:
        yield "optimizer.params.momentum", "Nesterov's needs some", 'write one > 0, or "nesterov": false'
    if config.fp16.enabled and config.bf16.enabled:
        yield "bf16.enabled", "fp16 is enabled, too", "enable one of the two"
    if config.recipe.precision is not None and (config.fp16.enabled or config.bf16.enabled):
        yield "recipe.precision", "fp16 or bf16 is enabled, too", "remove it, or them"
    if config.recipe.precision == "fp64" and zero.stage:
        yield "recipe.precision", "a ZeRO stage is enabled, too", "remove it, or that"
    if config.recipe.compile and zero.stage == 3:
        yield "recipe.compile", "ZeRO stage 3 gathers weights layer by layer, between kernels", "write false"
    if config.recipe.model.gradient_checkpointing and config.recipe.compile:
        problem = "recipe.compile decides by itself what to compute again"
        yield "recipe.model.gradient_checkpointing", problem, "write false for one of them"
    if config.recipe.ema.decay is not None and zero.stage:
        problem = f"ZeRO stage {zero.stage} leaves no rank the whole master weights to average"
        yield "recipe.ema.decay", problem, "write null, or zero_optimization.stage 0"
    if config.recipe.local_sgd.steps is not None:
        yield from (("recipe.local_sgd.steps", *why_not) for why_not in _what_local_steps_bar(config))
    if config.recipe.noise_scale.enabled and zero.stage:
        yield (
            "recipe.noise_scale.enabled",
            f"ZeRO stage {zero.stage} leaves no rank the whole mean gradient to take its norm of",
            "write false, or zero_optimization.stage 0",
        )
    if not zero.compute_grad_norm and zero.stage not in (1, 2):
        yield "zero_optimization.compute_grad_norm", "only ZeRO stages 1 and 2 can do without", "write true"
    if data.source in FOLDERS and data.path is None:
        yield "recipe.data.path", f"{FOLDERS[data.source]} has no default", "write the path of the folder"
    if data.source not in FOLDERS and data.path is not None:
        yield "recipe.data.path", f"{data.source} data has no folder", 'remove it, or write "source": "imagefolder"'
    if data.source != "pack" and data.pack_short_side:
        yield "recipe.data.pack_short_side", f"{data.source} data is no pack", 'write 0, or "source": "pack"'
    if data.source != "pack" and data.pack_raw:
        yield "recipe.data.pack_raw", f"{data.source} data is no pack", 'write false, or "source": "pack"'
    if data.decoder != "cpu" and data.pack_raw:
        yield "recipe.data.decoder", "raw pixels need none", 'write "cpu"'
    if data.source not in ("imagefolder", "huggingface") and data.validation_share is not None:
        yield "recipe.data.validation_share", f"{data.source} data has a validation part", "remove it"
    if data.source == "synthetic" and data.on_device:
        yield "recipe.data.on_device", "synthetic data is made there", "remove it"
    if data.decoder != "cpu" and data.source not in FOLDERS:
        yield "recipe.data.decoder", f"{data.source} data holds no JPEGs", 'write "cpu"'
    if data.decoder != "cpu" and data.on_device:
        yield "recipe.data.decoder", "with on_device true all is decoded once, by the CPU", 'write "cpu"'
    if data.augment != "rand" and "augment_magnitude" in data.model_fields_set:
        yield "recipe.data.augment_magnitude", f'the augmentation "{data.augment}" has none', "remove it"
    if data.augment != "none" and data.on_device:
        yield "recipe.data.augment", "with on_device true no loader process sees the images", 'write "none", or false'
    if data.augment != "none" and data.decoder != "cpu":
        problem = f'no loader process sees what the decoder "{data.decoder}" makes'
        yield "recipe.data.augment", problem, 'write "none", or the decoder "cpu"'
    for name, value in ("augment", data.augment != "none"), ("random_erasing", data.random_erasing):
        if data.source == "synthetic" and value:
            yield f"recipe.data.{name}", "synthetic data is random as it is", "remove it"
    if isinstance(data.image_size, tuple):
        epochs = [epoch for epoch, _ in data.image_size]
        if epochs != sorted({0, *epochs}):
            yield "recipe.data.image_size", "the epochs do not rise from 0", "write each once, 0 first"
    if data.mixup.probability + data.cutmix.probability > 1:
        problem = "with that of mixup it is more than 1, and a step has one of the two"
        yield "recipe.data.cutmix.probability", problem, "lower one of the two"
    if config.recipe.model.weights is not None and "." in config.recipe.model.name:
        yield "recipe.model.weights", f"{config.recipe.model.name} names weights, too", "remove it, or the name's tag"
    if config.recipe.model.freeze != "none" and config.recipe.model.starts_from is None:
        yield "recipe.model.freeze", "random weights would stay random", 'write "none", or recipe.model.weights'
    for name, images in ("train_images", data.train_images), ("validation_images", data.validation_images):
        if data.source == "synthetic" and images == "auto":
            yield f"recipe.data.{name}", '"auto" is not for synthetic', "write the number of images"
    for name in sorted(keys_of_others(DECAY_KEYS, schedule.decay) & schedule.model_fields_set):
        whose = " or ".join(f'"{decay}"' for decay, keys in DECAY_KEYS.items() if name in keys)
        key = f"recipe.schedule.{name}"
        remedy = f"remove it (--set {key}=null), or write the decay {whose}"
        yield key, f'the decay "{schedule.decay}" has none', remedy
    changed_in = [epoch for epoch, _ in schedule.batch_size or ()]
    if changed_in != sorted(set(changed_in)):
        yield "recipe.schedule.batch_size", "the epochs do not rise", "write each once, the smallest first"
    if schedule.batch_size and schedule.weight_decay_rule != "constant":
        problem = "the weight decay would change with the batch within the run"
        yield "recipe.schedule.weight_decay_rule", problem, 'write "constant", or for recipe.schedule.batch_size null'
    if list(schedule.decay_epochs) != sorted(set(schedule.decay_epochs)):
        yield "recipe.schedule.decay_epochs", "the numbers do not rise", "write each once, the smallest first"


def _what_local_steps_bar(config: Config) -> Iterator[tuple[str, str]]:
    """Problem and remedy of what ranks cannot do that step alone."""
    recipe, stage = config.recipe, config.zero_optimization.stage
    if stage:
        yield f"ZeRO stage {stage} leaves no rank the whole weights", "write null, or zero_optimization.stage 0"
    if config.fp16.enabled:
        yield "each rank would come to a loss scale of its own", "write null, or train in bf16 or fp32"
    if config.bf16.enabled and (config.bf16.check_grad_overflow or config.gradient_clipping):
        remedy = "write null, or bf16.check_grad_overflow false and gradient_clipping 0"
        yield "a rank would skip an update that overflows while the others go on", remedy
    if recipe.ema.decay is not None:
        yield "each rank would average its own weights", "write null, or for recipe.ema.decay"
    if recipe.noise_scale.enabled:
        yield "there is no mean gradient to take the norm of", "write null, or for recipe.noise_scale.enabled false"
