"""The part of a config that DeepSpeed reads, field by field as DeepSpeed 0.19.8 knows it.

A mirror, because importing DeepSpeed to check a file would import torch, and because DeepSpeed lets typos
pass. Names and defaults are DeepSpeed's, except where a docstring says otherwise; a test compares them. What
DeepSpeed knows and this recipe does not take is ``unsupported``: what is wrong, and what would be right.
"""

import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Auto = Literal["auto"]
# Upper bounds keep arithmetic with them finite.
Count = Annotated[int, Field(ge=1, le=10**15)]
# Its divisors are looked for one by one.
BatchSize = Annotated[int, Field(ge=1, le=10**9)]
Size = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e15)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e15)]

NOT_HERE = ("this recipe does not support this key of DeepSpeed's", "remove it")
REMOVED = ("DeepSpeed has removed this feature", "remove it")
OFFLOAD = (
    "DeepSpeed's offloading is made for its own CPU Adam and Lion; this recipe trains with SGD",
    "remove it",
)


# fmt: off
OTHER_KEYS = frozenset((
    "activation_checkpointing", "aio", "autotuning", "checkpoint", "compile", "data_efficiency",
    "data_parallel_size", "data_types", "datastates_ckpt", "disable_python_gc", "expert_parallel",
    "hybrid_engine", "log_level", "managed_gradient_accumulation", "pipeline",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "tensor_parallel",
    "use_data_before_expert_parallelism", "vocabulary_size", "weight_quantization",
))
REMOVED_KEYS = frozenset((
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
))
# fmt: on


class Section(BaseModel):
    """An object of the file. The first sentence of a field's docstring says what belongs there, and refusals quote it;
    the others explain it, and stand in docs/configuration.md with it."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    unsupported: ClassVar[Mapping[str, tuple[str, str]]] = {}


class PassedOn(Section):
    """A section that is DeepSpeed's affair alone: a dump holds what the file writes and no default."""

    @model_serializer(mode="wrap")
    def _written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class OptimizerParams(Section):
    lr: PositiveFloat | Auto = "auto"
    """the peak rate, a number > 0, or "auto": the schedule's reference rate, scaled. A written number must be what
    recipe.schedule.scaling_rule gives; with "none" it is the peak rate as it stands"""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """the momentum, a number >= 0 and < 1; the paper's is 0.9 (section 5.1)"""

    nesterov: bool = True
    """true or false; the paper's momentum is Nesterov's (section 5.1)"""

    weight_decay: NonNegativeFloat | Auto = "auto"
    """the weight decay, a number >= 0, or "auto": the rule recipe.schedule.weight_decay_rule. It applies to convolution
    and linear weights, not to biases and batch norm; "auto" is 1e-4 under the rule "constant" """

    unsupported = {
        "dampening": ("the recipe's momentum is the paper's, without dampening", "remove it"),
        "max_grad_norm": ("DeepSpeed does not take it here", 'write "gradient_clipping" at the top level'),
    }


class Optimizer(Section):
    type: Literal["SGD"] = "SGD"
    """ "SGD": the recipe's rules for rate, momentum and weight decay are SGD's"""

    params: OptimizerParams = OptimizerParams()
    """an object with lr, momentum, nesterov and weight_decay"""

    unsupported = {"legacy_fusion": NOT_HERE}


class WarmupParams(Section):
    warmup_min_lr: NonNegativeFloat | Auto = "auto"
    """the rate of the first update, a number >= 0, or "auto": the schedule's"""

    warmup_max_lr: PositiveFloat | Auto = "auto"
    """the rate at the end of the warmup, a number > 0, or "auto": the peak rate"""

    warmup_num_steps: Count | Auto = "auto"
    """optimizer steps of warmup, a whole number >= 1, or "auto": from recipe.schedule.warmup_epochs"""

    warmup_type: Literal["linear", "log"] = "linear"
    """ "linear", as in the paper, or "log": DeepSpeed would only warn about any other, and take log"""


class Scheduler(Section):
    type: Literal["WarmupLR"] = "WarmupLR"
    """ "WarmupLR": the recipe adds the decay itself, from recipe.schedule.decay_epochs"""

    params: WarmupParams = WarmupParams()
    """an object with warmup_min_lr, warmup_max_lr, warmup_num_steps and warmup_type"""


class Fp16(PassedOn):
    enabled: bool = False
    auto_cast: bool = False
    """false: the loop hands images over in the model's precision itself"""

    loss_scale: NonNegativeFloat = 0
    """a fixed loss scale, a number > 0, or 0 for a dynamic one"""

    initial_scale_power: Annotated[int, Field(ge=0, le=127)] = 16
    """the first dynamic loss scale as a power of two, a whole number from 0 to 127, where fp32 ends"""

    loss_scale_window: Count = 1000
    """optimizer steps without overflow after which the loss scale doubles, a whole number >= 1"""

    hysteresis: Count = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Count = 1

    unsupported = {
        "fp16_master_weights_and_grads": ("the recipe's master weights are fp32", "remove it"),
    }


class Bf16(PassedOn):
    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    """true or false: whether an update whose gradients are not finite is skipped and counted. The check stays on the
    device. With false such a gradient ends the run at the next report, as in fp32"""

    unsupported = dict.fromkeys(
        ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
        ("the recipe's master weights and momentum are fp32", "remove it"),
    )


class ZeroOptimization(PassedOn):
    """ZeRO. Of DeepSpeed's two spellings only the documented one, so that no setting can be written twice."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """what is partitioned, a whole number from 0 to 3; at 0 checkpoints load on any number of GPUs. A
    checkpoint of stage 1 to 3 loads only on as many ranks as have written it"""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Count = 500_000_000
    """elements reduced at a time, a whole number >= 1, without exponent or fraction"""

    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Size = 500_000_000
    """elements gathered at a time, a whole number >= 0, without exponent or fraction"""

    overlap_comm: bool | None = None
    """true, false or null: whether gradients are reduced during the backward pass; at stage 0 they are unless it is
    false. At stage 0 the recipe does this itself: DeepSpeed would wait for the end of the backward pass"""

    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    sub_group_size: Size = 1_000_000_000
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: Size = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    stage3_prefetch_bucket_size: Size = 50_000_000
    stage3_param_persistence_threshold: Size = 100_000
    stage3_model_persistence_threshold: Size = sys.maxsize
    stage3_max_live_parameters: Size = 1_000_000_000
    stage3_max_reuse_distance: Size = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: int = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False

    unsupported = {
        **dict.fromkeys(("offload_param", "offload_optimizer", "zenflow"), OFFLOAD),
        **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"), OFFLOAD),
        **dict.fromkeys(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), REMOVED),
        **dict.fromkeys(("elastic_checkpoint", "legacy_stage1"), NOT_HERE),
        "leaf_module": ("it is for mixtures of experts, and an image classifier has none", "remove it"),
        "pipeline_loading_checkpoint": ("the recipe has no pipeline", "remove it"),
        "save_muon_momentum_buffer_in_memory": ("this recipe trains with SGD, not with Muon", "remove it"),
        "stage3_gather_fp16_weights_on_model_save": (
            "DeepSpeed has renamed this key",
            'write "stage3_gather_16bit_weights_on_model_save"',
        ),
    }


class TensorBoard(PassedOn):
    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Wandb(PassedOn):
    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CsvMonitor(PassedOn):
    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Comet(PassedOn):
    enabled: bool = False
    samples_log_interval: Count = 100
    project: str | None = None
    workspace: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None

    unsupported = {
        "api_key": (
            "a run writes its config down, and a secret does not belong there",
            "set COMET_API_KEY in the environment",
        )
    }


class FlopsProfiler(PassedOn):
    enabled: bool = False
    recompute_fwd_factor: NonNegativeFloat = 0.0
    profile_step: Count = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLogger(PassedOn):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: Annotated[tuple[str, ...], Field(strict=False)] = ()
    verbose: bool = False
    debug: bool = False


class ThroughputTimer(Section):
    enabled: bool = False
    """true or false: whether DeepSpeed measures its speed, for which it waits for the GPU twice per micro-batch; false,
    because the recipe measures it without (DeepSpeed's default is true)"""

    synchronized: bool = True


class Timers(Section):
    throughput: ThroughputTimer = ThroughputTimer()
    """an object with enabled and synchronized"""


class DeepSpeedConfig(Section):
    """The top level without the recipe's section."""

    train_batch_size: BatchSize
    """the global batch: images per optimizer step, over all GPUs, a whole number from 1 to 1000000000. It is
    ranks × accumulation steps × micro-batch; peak rate, warmup steps and accumulation follow from it"""

    train_micro_batch_size_per_gpu: Count | Auto = "auto"
    """images per GPU and forward pass, a whole number >= 1, or "auto": the largest that the plan can use.
    That is the largest up to recipe.max_micro_batch_size that divides a rank's share of the global batch"""

    gradient_accumulation_steps: Count | Auto = "auto"
    """forward passes per optimizer step, a whole number >= 1, or "auto": as few as the plan needs. That is
    train_batch_size / (ranks × micro-batch)"""

    optimizer: Optimizer = Optimizer()
    """an object with type and params"""

    scheduler: Scheduler = Scheduler()
    """an object with type and params"""

    fp16: Fp16 = Fp16()
    """DeepSpeed's fp16 section, an object. "enabled": true trains in fp16 with fp32 master weights; the loss scale is
    dynamic unless loss_scale is written"""

    bf16: Bf16 = Bf16()
    """DeepSpeed's bf16 section, an object. "enabled": true trains in bf16 with fp32 master weights"""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    """DeepSpeed's ZeRO section, an object. Stages 0 to 3 work; offloading does not"""

    gradient_clipping: NonNegativeFloat = 0.0
    """the largest gradient norm, a number >= 0; 0 does not clip, like the paper (DeepSpeed's default is 1)"""

    steps_per_print: Count = 10
    """optimizer steps between reports, a whole number >= 1 (DeepSpeed divides by it). Progress bar, log and
    metrics.jsonl are written this often, and only then does the host wait for the device"""

    gradient_allreduce_op: Literal["mean"] = "mean"
    """ "mean": the rate rules hold for the mean gradient over the global batch"""

    prescale_gradients: bool = False
    """true or false: whether gradients are divided before they are summed over the GPUs"""

    gradient_predivide_factor: PositiveFloat = 1.0
    """the part of the division that comes before the sum over the GPUs, a number > 0"""

    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """ "fp32", "fp16" or "bf16", in which gradients are reduced; null for the precision of the training"""

    disable_allgather: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    timers: Timers = Timers()
    """an object with throughput"""

    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    tensorboard: TensorBoard = TensorBoard()
    wandb: Wandb = Wandb()
    csv_monitor: CsvMonitor = CsvMonitor()
    comet: Comet = Comet()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()

    unsupported = {
        **dict.fromkeys(OTHER_KEYS, NOT_HERE),
        **dict.fromkeys(REMOVED_KEYS, REMOVED),
        "bfloat16": ("DeepSpeed has renamed this key", 'write "bf16"'),
        "dataloader_drop_last": ("the recipe's own sampler decides about the last batch", "remove it"),
        "elasticity": ("the plan keeps the global batch on any number of GPUs by itself", "remove it"),
        "torch_autocast": (
            "under fp16 its checkpoints lack the loss scale and its skipped steps go uncounted",
            'write "fp16" or "bf16"',
        ),
    }

    @model_serializer(mode="wrap")
    def _without_empty_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value != {}}
