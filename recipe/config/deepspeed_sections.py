"""The part of a config that DeepSpeed reads, as DeepSpeed 0.19.8 knows it.

Importing DeepSpeed to check a file would import torch, and DeepSpeed lets misspelt keys pass. Names and defaults are
DeepSpeed's, except where a docstring says otherwise; a test compares them. ``unsupported`` are DeepSpeed's keys that
this recipe refuses: what is wrong with each, and what would be right.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Auto = Literal["auto"]
# Upper bounds keep arithmetic with them finite.
Count = Annotated[int, Field(ge=1, le=10**15)]
BatchSize = Annotated[int, Field(ge=1, le=10**9)]  # its divisors are looked for one by one
Size = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e15)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e15)]

Refusals = dict[str, tuple[str, str]]


def _refused(names: str, problem: str, remedy: str = "remove it") -> Refusals:
    return dict.fromkeys(names.split(), (problem, remedy))


def keys_of_others(keys: Mapping[str, tuple[str, ...]], kind: str) -> set[str]:
    """Of keys that only some kinds of a thing have, those that this ``kind`` does without."""
    return set(chain.from_iterable(keys.values())).difference(keys[kind])


class Section(BaseModel):
    """An object of the file. Refusals quote the first sentence of a field's docstring, which says what is accepted;
    docs/configuration.md has all of it."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    unsupported: ClassVar[Mapping[str, tuple[str, str]]] = {}


class PassedOn(Section):
    """A section that is DeepSpeed's affair: a dump holds what the file writes and no default.

    Its class arguments name the keys of which only the type is known here.
    """

    def __init_subclass__(cls, flags: str = "", numbers: str = "", texts: str = "", **config: Any) -> None:
        super().__init_subclass__(**config)
        kinds: tuple[tuple[str, Any], ...] = ((flags, bool), (numbers, int), (texts, str | None))
        for names, kind in kinds:
            cls.__annotations__ |= dict.fromkeys(names.split(), kind)
            for name in names.split():
                setattr(cls, name, None)

    @model_serializer(mode="wrap")
    def _written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class OptimizerParams(Section):
    lr: PositiveFloat | Auto = "auto"
    """the peak rate, a number > 0, or "auto": the schedule's reference rate, scaled. A written number must be what
    recipe.schedule.scaling_rule gives; with "none" it is the peak rate as it stands"""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """the momentum of SGD and LARS, a number >= 0 and < 1; the paper's is 0.9 (section 5.1)"""

    nesterov: bool = True
    """true or false; the paper's momentum is Nesterov's (section 5.1). Only for SGD: LARS has plain momentum"""

    trust_coefficient: PositiveFloat = 0.001
    """LARS's trust coefficient, a number > 0; MLPerf's is 0.001. The weights of a layer move by about so large a part
    of their norm per step, times the rate"""

    eps: NonNegativeFloat | Auto = "auto"
    """what LARS adds to the norm by which it divides, and LAMB to the root of the second moment, a number >= 0, or
    "auto": timm's, 1e-8 for LARS and 1e-6 for LAMB"""

    weight_decay: NonNegativeFloat | Auto = "auto"
    """the weight decay, a number >= 0, or "auto": the rule recipe.schedule.weight_decay_rule. It applies to convolution
    and linear weights, not to biases and batch norm; "auto" is 1e-4 under the rule "constant" """

    unsupported = {
        **_refused("dampening", "the recipe's momentum is the paper's, without dampening"),
        **_refused("max_grad_norm", "DeepSpeed does not take it here", 'write "gradient_clipping" at the top level'),
    }


OPTIMIZER_KEYS = {
    "SGD": ("momentum", "nesterov"),
    "LARS": ("momentum", "trust_coefficient", "eps"),
    "LAMB": ("eps",),
}


class Optimizer(Section):
    type: Literal["SGD", "LARS", "LAMB"] = "SGD"
    """ "SGD" (the paper's), "LARS" or "LAMB" for the largest batches. The last two are timm's, not DeepSpeed's, and
    leave biases and batch norm without trust ratio and weight decay. The rules for the rate are SGD's:
    recipe.schedule.scaling_rule "none" takes a written one, and warmup to it starts at scheduler.params.warmup_min_lr.
    Keys of another optimizer are refused: --set KEY=null removes one. Not with ZeRO stages 1 to 3"""

    params: OptimizerParams = OptimizerParams()
    """an object with lr, weight_decay and, for SGD, momentum and nesterov"""

    @model_serializer(mode="wrap")
    def _of_this_type(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        section, others = dump(self), keys_of_others(OPTIMIZER_KEYS, self.type)
        return section | {"params": {name: value for name, value in section["params"].items() if name not in others}}

    unsupported = _refused("legacy_fusion", "this recipe does not support this key of DeepSpeed's")


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
    """ "WarmupLR": the recipe adds the decay itself, from recipe.schedule.decay"""

    params: WarmupParams = WarmupParams()
    """an object with warmup_min_lr, warmup_max_lr, warmup_num_steps and warmup_type"""


class Fp16(PassedOn, flags="consecutive_hysteresis", numbers="hysteresis min_loss_scale"):
    enabled: bool = False
    auto_cast: Literal[False] = False
    """false: the loop hands images over in the model's precision itself"""

    loss_scale: NonNegativeFloat = 0
    """a fixed loss scale, a number > 0, or 0 for a dynamic one"""

    initial_scale_power: Annotated[int, Field(ge=0, le=127)] = 16
    """the first dynamic loss scale as a power of two, a whole number from 0 to 127, where fp32 ends"""

    loss_scale_window: Count = 1000
    """optimizer steps without overflow after which the loss scale doubles, a whole number >= 1"""

    unsupported = _refused("fp16_master_weights_and_grads", "the recipe's master weights are fp32")


class Bf16(PassedOn, flags="immediate_grad_update"):
    enabled: bool = False
    check_grad_overflow: bool = True
    """true or false: whether an update whose gradients are not finite is skipped and counted. For SGD the check stays
    on the device. With false such a gradient ends the run at the next report, as in fp32"""

    unsupported = _refused(
        "bf16_master_weights_and_grads bf16_optimizer_states", "the recipe's master weights and momentum are fp32"
    )


class ZeroOptimization(
    PassedOn,
    flags="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
    "load_from_fp32_weights ignore_unused_parameters round_robin_gradients parameter_alignment zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear override_module_apply "
    "log_trace_cache_warnings enable_sanity_checks stage3_gather_16bit_weights_on_model_save "
    "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential",
    numbers="sub_group_size zero_hpz_partition_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_module_granularity_threshold",
):
    """ZeRO. Of DeepSpeed's two spellings of a key only the documented one, so that no setting can be written twice."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """what is partitioned, a whole number from 0 to 3; at 0 checkpoints load on any number of GPUs. A
    checkpoint of stage 1 to 3 loads only on as many ranks as have written it"""

    reduce_bucket_size: Count = 500_000_000
    """elements reduced at a time, a whole number >= 1, without exponent or fraction"""

    allgather_bucket_size: Size = 500_000_000
    """elements gathered at a time, a whole number >= 0, without exponent or fraction"""

    overlap_comm: bool | None = None
    """true, false or null: whether gradients are reduced during the backward pass; at stage 0 they are unless it is
    false. At stage 0 the recipe does this itself: DeepSpeed would wait for the end of the backward pass"""

    compute_grad_norm: bool = True

    unsupported = {
        **_refused(
            "offload_param offload_optimizer zenflow cpu_offload cpu_offload_param cpu_offload_use_pin_memory",
            "DeepSpeed's offloading is made for its own CPU Adam and Lion, which this recipe does not have",
        ),
        **_refused(
            "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param elastic_checkpoint legacy_stage1 "
            "leaf_module pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory",
            "this recipe does not support this key of DeepSpeed's",
        ),
        **_refused(
            "stage3_gather_fp16_weights_on_model_save",
            "DeepSpeed has renamed this key",
            'write "stage3_gather_16bit_weights_on_model_save"',
        ),
    }


class TensorBoard(PassedOn, texts="output_path job_name"):
    enabled: bool = False


class Wandb(PassedOn, texts="group team project"):
    enabled: bool = False


class CsvMonitor(PassedOn, texts="output_path job_name"):
    enabled: bool = False


class Comet(PassedOn, numbers="samples_log_interval", texts="project workspace experiment_name experiment_key"):
    enabled: bool = False
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None

    unsupported = _refused(
        "api_key",
        "a run writes its config down, and a secret does not belong there",
        "set COMET_API_KEY in the environment",
    )


class FlopsProfiler(
    PassedOn, flags="enabled detailed", numbers="profile_step module_depth top_modules", texts="output_file"
):
    recompute_fwd_factor: NonNegativeFloat = 0.0


class CommsLogger(PassedOn, flags="prof_all verbose debug"):
    enabled: bool = False
    prof_ops: Annotated[tuple[str, ...], Field(strict=False)] = ()


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
    ranks × accumulation steps × micro-batch; peak rate, warmup steps and accumulation follow from it. Where
    recipe.schedule.batch_size changes it, it is the first"""

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
    metrics.jsonl are written this often, on a GPU one step later: the host does not wait for it"""

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
        **_refused(
            "activation_checkpointing aio amp autotuning checkpoint compile compression_training curriculum_learning "
            "data_efficiency data_parallel_size data_types datastates_ckpt disable_python_gc eigenvalue "
            "expert_parallel graph_harvesting hybrid_engine log_level managed_gradient_accumulation nebula pipeline "
            "progressive_layer_drop quantize_training seq_parallel_communication_data_type sequence_parallel_size "
            "sparse_attention sparse_gradients tensor_parallel use_data_before_expert_parallelism vocabulary_size "
            "weight_quantization",
            "this recipe does not support this key of DeepSpeed's",
        ),
        **_refused("bfloat16", "DeepSpeed has renamed this key", 'write "bf16"'),
        **_refused("dataloader_drop_last", "the recipe's own sampler decides about the last batch"),
        **_refused("elasticity", "the plan keeps the global batch on any number of GPUs by itself"),
        **_refused(
            "torch_autocast",
            "under fp16 its checkpoints lack the loss scale and its skipped steps go uncounted",
            'write "fp16" or "bf16"',
        ),
    }

    @model_serializer(mode="wrap")
    def _without_empty_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value != {}}
