"""Reads one config, a DeepSpeed JSON file with a section ``recipe``, strictly into a frozen, typed view."""

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
    keys_of_other_kinds,
)
from recipe.config.model_names import trains_no_batchnorm
from recipe.config.reader import ABSENT, ConfigError, apply_override, parse_json, read_text
from recipe.config.validation import validate


@dataclass(frozen=True)
class Source:
    """Where a config comes from, for error messages and for writing it out again."""

    file: str
    """the file's name, with every ``--set`` override"""

    text: str
    """the JSON after all overrides, as the user wrote it: with each "auto", without defaults"""

    @property
    def raw(self) -> dict[str, Any]:
        """The JSON as a fresh dict, which the caller may change."""
        return json.loads(self.text)

    def refusal(self, key: str, problem: str, remedy: str) -> ConfigError:
        """The error that refuses the file's value for a dotted key."""
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        return ConfigError(self.file, key, value, problem, remedy)


# The data sources that need recipe.data.path, as messages name them.
FOLDERS = {"imagefolder": "an imagefolder", "pack": "a pack", "huggingface": "a Hugging Face data set"}


class Model(Section):
    name: str = Field(min_length=1)
    """the name of a timm model, such as "resnet50"; with a tag, such as "resnet50.a1_in1k", training starts from timm's
    weights of that name, which are downloaded"""

    num_classes: int = Field(ge=2, le=10_000_000)
    """the number of classes, a whole number from 2 to 10,000,000"""

    zero_init_last: bool = True
    """true or false: whether the last batch norm of each residual block of a ResNet starts with gamma = 0, as in the
    paper (section 5.1), or with 1"""

    weights: str | None = Field(None, min_length=1)
    """the weights to start training from: a .safetensors or .pth file, a folder such as python -m recipe export writes,
    "hf-hub:owner/name", or null for random ones; a head for another number of classes is reinitialised"""

    freeze: Literal["none", "backbone"] = "none"
    """ "backbone" trains only the head, with batch norm in evaluation mode; "none" trains all weights"""

    gradient_checkpointing: bool = False
    """true or false: whether the backward pass recomputes most activations instead of storing them, which takes less
    memory and more time; the training is bit-identical. For the models that timm can checkpoint, such as its ResNets;
    not with recipe.compile, which decides itself what to recompute"""

    @property
    def architecture(self) -> str:
        """timm's name without a tag."""
        return self.name.partition(".")[0]

    @property
    def starts_from(self) -> str | None:
        """The weights to start from, given by ``weights`` or the name's tag; None for random ones."""
        return self.weights or (self.name if "." in self.name else None)


class BatchNorm(Section):
    statistics: Literal["global", "local"] | Count = "global"
    """the images that batch norm averages over: "global" (all GPUs' micro-batches), "local" (each GPU's own) or a
    number of samples, a whole number >= 1; the paper uses 32. A number of samples makes the training the same on any
    number of GPUs; "global" is SyncBN"""


Fraction = Annotated[float, Field(ge=0, le=1)]
Three = Field(strict=False, min_length=3, max_length=3)


class Mixup(Section):
    probability: Fraction = 0
    """the fraction of steps in which mixup blends each image with its neighbour in the batch, a number from 0 to 1. All
    pairs of a step are blended alike"""

    alpha: PositiveFloat = 0.2
    """the alpha of the distribution Beta(alpha, alpha) from which mixup draws how much of an image is kept, a
    number > 0; its paper uses 0.2 for ImageNet"""


class CutMix(Section):
    probability: Fraction = 0
    """the fraction of steps in which CutMix pastes a box of its neighbour in the batch into each image, a number from 0
    to 1. All pairs of a step use the same box"""

    alpha: PositiveFloat = 1
    """the alpha of the distribution Beta(alpha, alpha) from which CutMix draws how much of an image is kept, a
    number > 0; its paper uses 1"""


ImageSize = Annotated[int, Field(ge=8, le=4096)]
SizeChange = Annotated[tuple[Annotated[int, Field(ge=0)], ImageSize], Field(strict=False)]

AUGMENT_KEYS: dict[str, tuple[str, ...]] = {"none": (), "trivial": (), "rand": ("augment_magnitude",)}


class Data(Section):
    source: Literal["digits", "imagefolder", "pack", "huggingface", "synthetic"]
    """ "digits" (scikit-learn's), "imagefolder" (one folder per class), "pack" (made of one by python -m recipe pack),
    "huggingface" (whatever Hugging Face's package datasets loads) or "synthetic" (random pixels). The digits ship with
    scikit-learn; "synthetic" is one random batch, for speed tests"""

    path: str | None = Field(None, min_length=1)
    """the folder of an imagefolder, a pack or a Hugging Face data set, or owner/name of one on the hub; null for the
    other sources. --data sets it"""

    pack_short_side: Annotated[int, Field(ge=0)] = 0
    """the short side in pixels to which the pack's larger images were resized, a whole number, as in its pack.json; 0:
    all images are the original bytes. A run checks it against the pack, because the pixels depend on it"""

    pack_raw: bool = False
    """true or false: whether the pack holds raw pixels, as in its pack.json. A run checks this, too"""

    image_size: Annotated[tuple[SizeChange, ...], Field(strict=False, min_length=1)] | ImageSize | Auto
    """height and width in pixels of the images that the model sees, a whole number from 8 to 4096, a list of
    [epoch, size] with epochs that rise from 0, or "auto": the size that recipe.model.weights were trained with, if a
    config.json next to them says so. A list is progressive resizing: training images have each size from its epoch on,
    counted from 0"""

    validation_image_size: ImageSize | None = None
    """height and width in pixels of the validation images, a whole number from 8 to 4096, or null: the size of the last
    training images. Objects look larger in random resized crops than in validation, so that a network gains from larger
    validation images (FixRes). evaluate, predict and export use this size, too"""

    train_images: Count | Auto = "auto"
    """the number of training images, a whole number >= 1, with which a plan needs no data, or "auto": counted in the
    data"""

    validation_images: Count | Auto = "auto"
    """the number of validation images, a whole number >= 1, or "auto": counted in the data"""

    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """the fraction of each class to hold out for validation if an imagefolder has no val/ or a Hugging Face data set no
    such split, a number > 0 and < 1, such as 0.1, or null. The choice depends only on the names or positions of the
    images, so that it is the same in every run"""

    crop: Literal["random_resized", "padded", "none"] = "random_resized"
    """ "random_resized" (the paper's), "padded" (shifted by a few pixels) or "none". For "random_resized", validation
    takes the centre crop of an image resized to 8/7 of its size (256 for 224); "padded" shifts by up to 1/8 of
    image_size"""

    flip: bool = True
    """true or false: whether half of the training images are mirrored, as in the paper"""

    augment: Literal["none", "trivial", "rand"] = "none"
    """ "none", "trivial" (TrivialAugment, Müller and Hutter 2021) or "rand" (RandAugment, Cubuk et al. 2020): the
    additional augmentation of training images. The operations are torchvision's, such as rotation, brightness and
    sharpness: one of random strength for "trivial", two of strength augment_magnitude for "rand". Loader processes run
    them, so that images cannot be decoded or kept on the device"""

    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """the strength of RandAugment's operations, a whole number from 0 to 30; 9 is torchvision's default"""

    random_erasing: Fraction = 0
    """the fraction of training images in which a box is erased, a number from 0 to 1. The box covers 2 to 33 % of the
    area and takes the mean colour, as in timm's and torchvision's RandomErasing"""

    mixup: Mixup = Mixup()
    cutmix: CutMix = CutMix()

    mean: Annotated[tuple[Fraction, ...], Three] | Auto = "auto"
    """the mean of red, green and blue, three numbers from 0 to 1, or "auto": the weights' own if a config.json next to
    them gives it, otherwise the source's. For image files that is ImageNet's"""

    std: Annotated[tuple[PositiveFloat, ...], Three] | Auto = "auto"
    """the standard deviation of red, green and blue on a scale from 0 to 1, three numbers > 0, or "auto": the weights'
    own, or the source's. For image files that is ImageNet's"""

    workers: Annotated[int, Field(ge=0)] | Auto = "auto"
    """loader processes per GPU, a whole number >= 0, or "auto": one less than a rank's share of the CPU cores, none for
    digits"""

    decoder: Literal["cpu", "gpu", "dali"] = "cpu"
    """the backend that decodes, crops and resizes JPEGs: "cpu" (the loader processes), "gpu" (nvJPEG and torch) or
    "dali" (NVIDIA's package, which also runs on a CPU); the crops are the same, the pixels nearly so. A run cannot
    resume with another decoder"""

    on_device: bool = False
    """true or false: whether all images are decoded once, at the start, and kept on the device, which crops and mirrors
    whole batches; for data of CIFAR's size. The digits always are if augment is "none"; the training is
    bit-identical"""

    on_bad_image: Literal["stop", "skip"] = "stop"
    """ "stop" or "skip": what a run does about an image that cannot be read. "skip" trains on the next image instead,
    leaves the bad one out of validation and lists it in the summary"""

    @model_serializer(mode="wrap")
    def _drop_keys_of_other_augmentations(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        others = keys_of_other_kinds(AUGMENT_KEYS, self.augment)
        return {name: value for name, value in dump(self).items() if name not in others}

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup.probability + self.cutmix.probability > 0

    @property
    def needs_counting(self) -> bool:
        """Whether the number of images is only known once the folder has been read."""
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
    """later global batch sizes, a list of [epoch, batch] with epochs >= 1 that rise, or null: train_batch_size
    throughout. From each epoch on, counted from 0, an optimizer step takes that many images, by more accumulation steps
    of the same micro-batch, at the rate that scaling_rule gives"""

    reference_lr: PositiveFloat = 0.1
    """the learning rate at the reference batch size, a number > 0; the paper uses 0.1 (section 2.1)"""

    reference_batch_size: Count = 256
    """the batch size, in images, to which reference_lr applies, a whole number >= 1; the paper uses 256"""

    scaling_rule: Literal["linear", "sqrt", "none"] = "linear"
    """ "linear" (the paper's), "sqrt" or "none": how the learning rate scales with the global batch. "none" uses
    optimizer.params.lr, or the reference rate if that is "auto" """

    warmup: Literal["gradual", "constant", "none"] = "gradual"
    """ "gradual" (the paper's), "constant" or "none": how the rate reaches its peak. Warmup starts at
    scheduler.params.warmup_min_lr, or at reference_lr if that is "auto"; only runs with a batch above the reference
    batch and a peak above that starting rate warm up"""

    warmup_epochs: NonNegativeFloat = 5
    """epochs of warmup, a number >= 0; the paper uses 5 (section 2.2)"""

    decay: Literal["step", "cosine", "polynomial", "linear", "none"] = "step"
    """ "step" (the paper's), "cosine", "polynomial", "linear" or "none": how the rate falls after warmup. "step" uses
    decay_epochs and decay_factor; "cosine", "polynomial" and "linear" fall from the peak rate to final_lr, which the
    step after the last would reach. Keys of another decay are refused; --set KEY=null removes one"""

    decay_epochs: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = (30, 60, 80)
    """the epochs after which the rate decays, a list of rising numbers > 0; the paper uses 30, 60 and 80"""

    decay_factor: float = Field(0.1, gt=0, le=1)
    """the factor of each decay, a number > 0 and <= 1; the paper uses 0.1"""

    decay_power: Annotated[float, Field(gt=0, le=100)] = 2
    """the power of a polynomial decay, a number > 0 and <= 100; MLPerf uses 2. The rate falls with
    (1 - fraction of the steps after warmup) ** decay_power"""

    final_lr: NonNegativeFloat = 0
    """the rate to which a cosine, polynomial or linear decay falls, a number >= 0. It does not scale with the batch"""

    weight_decay_rule: Literal["constant", "inverse"] = "constant"
    """ "constant" (the paper's) or "inverse": how the weight decay scales with the global batch. "inverse" divides the
    reference weight decay by train_batch_size / reference_batch_size"""

    reference_weight_decay: NonNegativeFloat | None = None
    """the weight decay at the reference batch size, a number >= 0, or null: 1e-4, the paper's"""

    @model_serializer(mode="wrap")
    def _drop_keys_of_other_decays(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        others = keys_of_other_kinds(DECAY_KEYS, self.decay)
        return {name: value for name, value in dump(self).items() if name not in others}


class Loss(Section):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """the fraction of each label that is spread evenly over all classes in training, a number >= 0 and < 1; record runs
    use 0.1, the paper 0. The training loss in metrics.jsonl includes it, the validation loss does not"""


class Ema(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """the decay per image of the moving average of the weights, a number > 0 and < 1, such as 0.9999998, or null for no
    average. A step decays it by decay ** the global batch, so that it spans the same number of images at any batch
    size; a usual decay d per step is d ** (1 / the global batch) here. Early in a run it is the plain mean of all
    weights so far. It is validated next to the weights, and evaluate, predict and export use it. Not with ZeRO stages 1
    to 3"""


class LocalSgd(Section):
    steps: Count | None = None
    """optimizer steps that each rank takes alone before the weights are averaged over the ranks, a whole number >= 1,
    or null: gradients are averaged at every step. Weights are also averaged at the end of each epoch, and checkpoints
    wait for an average; momentum stays local to each rank. The training then depends on the number of GPUs. Not with
    fp16, ZeRO stages 1 to 3, a moving average, the noise scale, or batch norm statistics over several ranks"""

    after_epoch: Annotated[int, Field(ge=0)] | None = None
    """the number of initial epochs in which gradients are averaged at every step, a whole number >= 0, or null for
    none"""


class Checkpoint(Section):
    every_steps: Count | None = None
    """optimizer steps between checkpoints within an epoch, a whole number >= 1, or null for none. Each epoch ends with
    a checkpoint anyway"""

    every_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """minutes between checkpoints within an epoch, a number > 0 and <= 1e6, or null for none"""

    @property
    def save_every(self) -> timedelta | None:
        """``every_minutes`` as a ``timedelta``."""
        return None if self.every_minutes is None else timedelta(minutes=self.every_minutes)

    keep_last: Count = 2
    """the number of latest checkpoints to keep, a whole number >= 1; 2, because the latest may be incomplete"""

    keep_best: bool = True
    """true or false: whether to keep the checkpoint with the best top-1 accuracy, too"""


class NoiseScale(Section):
    enabled: bool = False
    """true or false: whether to estimate the gradient noise scale, the batch size up to which larger batches pay off.
    Not with ZeRO stages 1 to 3 or batch norm statistics over several ranks ("global")"""

    every_steps: Count = 10
    """optimizer steps between measurements, a whole number >= 1; 10 divides their cost by ten"""


class Distributed(Section):
    timeout_seconds: Annotated[float, Field(ge=5, le=86_400)] = 120
    """seconds that a rank waits for the others, a number from 5 to 86400; 120, because a cluster is idle for that
    long when a host is cut off. A rank without data ends the run after three quarters of it"""


class Recipe(Section):
    """The keys that DeepSpeed does not have."""

    model: Model

    max_micro_batch_size: Count | Auto = 256
    """the largest micro-batch, in images per GPU and forward pass, that "auto" may choose, a whole number >= 1, or
    "auto": as many images as fit the GPU, 32 on a CPU. "auto" tries training steps at the start and takes the largest
    micro-batch that fits every rank's GPU"""

    batchnorm: BatchNorm = BatchNorm()
    data: Data
    schedule: Schedule
    loss: Loss = Loss()
    ema: Ema = Ema()
    local_sgd: LocalSgd = LocalSgd()

    precision: Literal["fp32", "fp64"] | None = None
    """ "fp32" keeps GPUs from rounding to TF32, "fp64" trains in double precision, for checks in which rounding must
    not matter; null: fp16 or bf16 if enabled, otherwise fp32 with TF32"""

    compile: bool = False
    """true or false: whether torch.compile generates kernels for model and loss, which takes minutes in the first
    steps; rounding differs, the training does not. Not with ZeRO stage 3"""

    cudnn_benchmark: bool = False
    """true or false: whether cuDNN measures which of its algorithms are fastest, which may be others in a resumed run;
    false uses only deterministic ones"""

    checkpoint: Checkpoint = Checkpoint()
    noise_scale: NoiseScale = NoiseScale()
    distributed: Distributed = Distributed()

    seed: int = Field(0, ge=0, lt=2**63)
    """the root of all randomness, a whole number >= 0 and < 2^63"""


class Config(DeepSpeedConfig):
    """A config that is consistent in itself; ``make_plan`` checks it against ranks and data.

    ``model_fields_set`` of each section tells which keys the file writes.
    """

    recipe: Recipe

    _source: Source = PrivateAttr()

    @property
    def source(self) -> Source:
        """The file behind the view; not a field, so that a dump of the view is a config again."""
        return self._source

    @property
    def batch_changes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of an epoch, the first 0, and the global batch from that epoch on."""
        schedule = self.recipe.schedule
        later = (change for change in schedule.batch_size or () if change[0] < schedule.epochs)
        return ((0, self.train_batch_size), *later)

    @property
    def batches(self) -> list[int]:
        """The global batches of the run in order."""
        return [batch for _, batch in self.batch_changes]

    @property
    def common_batch(self) -> int:
        """The greatest common divisor of the run's global batches, which a micro-batch must divide."""
        return math.gcd(*self.batches)

    @property
    def statistics(self) -> Literal["global", "local"] | int:
        """``recipe.batchnorm.statistics``, or "local" if no batch norm trains: that restricts no ranks or batches."""
        model = self.recipe.model
        return "local" if trains_no_batchnorm(model.name, model.freeze) else self.recipe.batchnorm.statistics

    @property
    def precision(self) -> str:
        """The precision of the forward and backward pass."""
        if self.recipe.precision is not None:
            return self.recipe.precision
        if self.fp16.enabled:
            return "fp16"
        return "bf16" if self.bf16.enabled else "fp32"


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file and apply ``--set`` overrides, each a dotted KEY=VALUE with JSON or a plain string as value."""
    file = str(path)
    raw = parse_json(read_text(Path(path), "*.json"), file)
    if overrides:
        file += f" (with {' '.join(f'--set {override}' for override in overrides)})"
    for override in overrides:
        apply_override(raw, override, file)
    return parse_config(raw, file)


def parse_config(raw: dict[str, Any], file: str) -> Config:
    """The typed view of a config that is already in memory; ``file`` is its name in messages."""
    if "cases" in raw and "recipe" not in raw:
        problem, remedy = "this is a study, not a config", f"run it with python -m recipe study {file}"
        raise ConfigError(file, "", ABSENT, problem, remedy)
    config = validate(Config, raw, file, "write a DeepSpeed config with a section recipe")
    config._source = Source(file, json.dumps(raw))
    for key, problem, remedy in (contradictions := _contradictions(config)):
        others = "".join(f"; also {': '.join(other[:2])}; {other[2]}" for other in contradictions)
        raise config.source.refusal(key, problem, remedy + others)
    return config


def _contradictions(config: Config) -> Iterator[tuple[str, str, str]]:
    """Key, problem and remedy of each pair of keys that contradict each other."""
    params, zero = config.optimizer.params, config.zero_optimization
    recipe, data, schedule = config.recipe, config.recipe.data, config.recipe.schedule
    optimizer, by_zero = config.optimizer.type, f"ZeRO stage {zero.stage}"
    for path, section, kind, chosen, keys_by_kind in (
        ("optimizer.params", params, "optimizer", optimizer, OPTIMIZER_KEYS),
        ("recipe.schedule", schedule, "decay", schedule.decay, DECAY_KEYS),
        ("recipe.data", data, "augmentation", data.augment, AUGMENT_KEYS),
    ):
        for name in sorted(keys_of_other_kinds(keys_by_kind, chosen) & section.model_fields_set):
            users = " or ".join(f'"{user}"' for user, keys in keys_by_kind.items() if name in keys)
            remedy = f"remove it (--set {path}.{name}=null), or choose the {kind} {users}"
            yield f"{path}.{name}", f'the {kind} "{chosen}" does not use it', remedy
    if optimizer != "SGD" and zero.stage:
        problem = f"{by_zero} splits weights into parts, which do not have the norms of whole layers"
        yield "optimizer.type", problem, 'use zero_optimization.stage 0, or "SGD"'
    if optimizer != "SGD" and params.weight_decay == 0:
        yield "optimizer.params.weight_decay", f"{optimizer} has no trust ratio without it", "use a number > 0"
    if optimizer == "SGD" and params.nesterov and params.momentum == 0:
        yield "optimizer.params.momentum", "Nesterov momentum cannot be 0", 'use a number > 0, or "nesterov": false'
    if config.fp16.enabled and config.bf16.enabled:
        yield "bf16.enabled", "fp16 is also enabled", "enable only one of them"
    if recipe.precision is not None and (config.fp16.enabled or config.bf16.enabled):
        yield "recipe.precision", "fp16 or bf16 is also enabled", "remove one of them"
    if recipe.precision == "fp64" and zero.stage:
        yield "recipe.precision", "a ZeRO stage is also enabled", "remove one of them"
    if recipe.compile and zero.stage == 3:
        yield "recipe.compile", f"{by_zero} gathers weights layer by layer, between kernels", "use false"
    if recipe.model.gradient_checkpointing and recipe.compile:
        problem = "recipe.compile decides itself what to recompute"
        yield "recipe.model.gradient_checkpointing", problem, "use false for one of them"
    if recipe.ema.decay is not None and zero.stage:
        problem = f"{by_zero} leaves no rank with the whole master weights to average"
        yield "recipe.ema.decay", problem, "use null, or zero_optimization.stage 0"
    if recipe.local_sgd.steps is not None:
        yield from (("recipe.local_sgd.steps", *conflict) for conflict in _local_sgd_conflicts(config))
    if recipe.noise_scale.enabled and zero.stage:
        problem = f"{by_zero} leaves no rank with the whole mean gradient to take the norm of"
        yield "recipe.noise_scale.enabled", problem, "use false, or zero_optimization.stage 0"
    if not zero.compute_grad_norm and zero.stage not in (1, 2):
        yield "zero_optimization.compute_grad_norm", "only ZeRO stages 1 and 2 work without it", "use true"
    if data.source in FOLDERS and data.path is None:
        yield "recipe.data.path", f"{FOLDERS[data.source]} has no default path", "set it to the path of the folder"
    if data.source not in FOLDERS and data.path is not None:
        yield "recipe.data.path", f"{data.source} data has no folder", 'remove it, or use "source": "imagefolder"'
    for name in ("pack_short_side", "pack_raw"):
        if data.source != "pack" and getattr(data, name):
            yield f"recipe.data.{name}", f"{data.source} data is not a pack", 'remove it, or use "source": "pack"'
    if data.decoder != "cpu" and data.pack_raw:
        yield "recipe.data.decoder", "raw pixels need no decoder", 'use "cpu"'
    if data.source not in ("imagefolder", "huggingface") and data.validation_share is not None:
        yield "recipe.data.validation_share", f"{data.source} data has its own validation images", "remove it"
    if data.source == "synthetic" and data.on_device:
        yield "recipe.data.on_device", "synthetic data is generated there", "remove it"
    if data.decoder != "cpu" and data.source not in FOLDERS:
        yield "recipe.data.decoder", f"{data.source} data contains no JPEGs", 'use "cpu"'
    if data.decoder != "cpu" and data.on_device:
        yield "recipe.data.decoder", "with on_device true, the CPU decodes all images once", 'use "cpu"'
    if data.augment != "none" and data.on_device:
        problem = "with on_device true, no loader process sees the images"
        yield "recipe.data.augment", problem, 'use "none", or on_device false'
    if data.augment != "none" and data.decoder != "cpu":
        problem = f'no loader process sees the images that the decoder "{data.decoder}" decodes'
        yield "recipe.data.augment", problem, 'use "none", or the decoder "cpu"'
    for name, value in ("augment", data.augment != "none"), ("random_erasing", data.random_erasing):
        if data.source == "synthetic" and value:
            yield f"recipe.data.{name}", "synthetic data is already random", "remove it"
    for name in ("train_images", "validation_images"):
        if data.source == "synthetic" and getattr(data, name) == "auto":
            yield f"recipe.data.{name}", "synthetic data has no images to count", "set it to the number of images"
    if isinstance(data.image_size, tuple):
        epochs = [epoch for epoch, _ in data.image_size]
        if epochs != sorted({0, *epochs}):
            yield "recipe.data.image_size", "the epochs do not rise from 0", "list each once, 0 first"
    if data.mixup.probability + data.cutmix.probability > 1:
        problem = "together with mixup's it exceeds 1, and a step uses at most one of the two"
        yield "recipe.data.cutmix.probability", problem, "lower one of them"
    if recipe.model.weights is not None and "." in recipe.model.name:
        yield "recipe.model.weights", f"{recipe.model.name} names weights, too", "remove it, or the tag of the name"
    if recipe.model.freeze != "none" and recipe.model.starts_from is None:
        yield "recipe.model.freeze", "random weights would stay random", 'use "none", or recipe.model.weights'
    changed_in = [epoch for epoch, _ in schedule.batch_size or ()]
    if changed_in != sorted(set(changed_in)):
        yield "recipe.schedule.batch_size", "the epochs do not rise", "list each once, the smallest first"
    if list(schedule.decay_epochs) != sorted(set(schedule.decay_epochs)):
        yield "recipe.schedule.decay_epochs", "the numbers do not rise", "list each once, the smallest first"
    if schedule.batch_size and schedule.weight_decay_rule != "constant":
        problem = "the weight decay would change with the batch during the run"
        yield "recipe.schedule.weight_decay_rule", problem, 'use "constant", or recipe.schedule.batch_size null'


def _local_sgd_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Problem and remedy of each setting that does not work if ranks step alone."""
    recipe, stage = config.recipe, config.zero_optimization.stage
    if stage:
        yield f"ZeRO stage {stage} leaves no rank with the whole weights", "use null, or zero_optimization.stage 0"
    if config.fp16.enabled:
        yield "each rank would arrive at its own loss scale", "use null, or train in bf16 or fp32"
    if config.bf16.enabled and (config.bf16.check_grad_overflow or config.gradient_clipping):
        remedy = "use null, or bf16.check_grad_overflow false and gradient_clipping 0"
        yield "a rank would skip a step that overflows while the others continue", remedy
    if recipe.ema.decay is not None:
        yield "each rank would average its own weights", "use null, or recipe.ema.decay null"
    if recipe.noise_scale.enabled:
        yield "there is no mean gradient to take the norm of", "use null, or recipe.noise_scale.enabled false"
