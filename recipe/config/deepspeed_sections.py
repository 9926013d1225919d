"""The keys of a config that DeepSpeed 0.19.8 reads.

DeepSpeed itself ignores misspelt keys, and importing it would import torch. Names and defaults are DeepSpeed's unless
a docstring says otherwise; a test compares them.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Auto = Literal["auto"]
# Upper bounds keep arithmetic with them finite.
Count = Annotated[int, Field(ge=1, le=10**15)]
BatchSize = Annotated[int, Field(ge=1, le=10**9)]  # its divisors are tried one by one
Size = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e15)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e15)]

Refusals = dict[str, tuple[str, str]]


def _refused(
    names: str, problem: str = "this recipe does not support this DeepSpeed key", remedy: str = "remove it"
) -> Refusals:
    return dict.fromkeys(names.split(), (problem, remedy))


def keys_of_other_kinds(keys_by_kind: Mapping[str, tuple[str, ...]], kind: str) -> set[str]:
    """The keys that only other kinds of optimizer, decay or augmentation use."""
    return set(chain.from_iterable(keys_by_kind.values())).difference(keys_by_kind[kind])


class Section(BaseModel):
    """An object of the file. Refusals quote the first sentence of a field's docstring, which says what is accepted;
    docs/configuration.md has all of it. A field that is a section itself needs no docstring."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    unsupported: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """problem and remedy for each key that DeepSpeed has and this recipe refuses"""


class PassedOn(Section):
    """A section that is passed on to DeepSpeed: a dump holds only the keys that the file writes, and no defaults.

    The class arguments name the keys whose type is all that is checked here.
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
    """the peak learning rate, a number > 0, or "auto": the reference rate, scaled by recipe.schedule.scaling_rule. A
    written number must match that rule; with the rule "none" it is used as is"""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """the momentum of SGD and LARS, a number >= 0 and < 1; the paper uses 0.9 (section 5.1)"""

    nesterov: bool = True
    """true or false: whether SGD uses Nesterov momentum, as in the paper (section 5.1). LARS has plain momentum"""

    trust_coefficient: PositiveFloat = 0.001
    """LARS's trust coefficient, a number > 0; MLPerf uses 0.001. A step moves the weights of a layer by about this
    fraction of their norm, times the learning rate"""

    eps: NonNegativeFloat | Auto = "auto"
    """the epsilon that LARS adds to the norm it divides by and LAMB to the root of the second moment, a number >= 0, or
    "auto": timm's default, 1e-8 for LARS and 1e-6 for LAMB"""

    weight_decay: NonNegativeFloat | Auto = "auto"
    """the weight decay, a number >= 0, or "auto": from recipe.schedule.weight_decay_rule. It applies to convolution and
    linear weights, not to biases and batch norm; "auto" is 1e-4 under the rule "constant" """

    unsupported = {
        **_refused("dampening", "the recipe's momentum is the paper's, without dampening"),
        **_refused("max_grad_norm", "DeepSpeed ignores it here", 'use "gradient_clipping" at the top level'),
    }


OPTIMIZER_KEYS = {
    "SGD": ("momentum", "nesterov"),
    "LARS": ("momentum", "trust_coefficient", "eps"),
    "LAMB": ("eps",),
}


class Optimizer(Section):
    type: Literal["SGD", "LARS", "LAMB"] = "SGD"
    """ "SGD" (the paper's), "LARS" or "LAMB"; the last two are for the largest batches. They are timm's, not
    DeepSpeed's, and apply neither trust ratio nor weight decay to biases and batch norm. The scaling rules are for SGD:
    with recipe.schedule.scaling_rule "none" you write the rate yourself, and warmup starts at
    scheduler.params.warmup_min_lr. Keys of another optimizer are refused; --set KEY=null removes one. LARS and LAMB do
    not work with ZeRO stages 1 to 3"""

    params: OptimizerParams = OptimizerParams()

    @model_serializer(mode="wrap")
    def _drop_keys_of_other_optimizers(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        section, others = dump(self), keys_of_other_kinds(OPTIMIZER_KEYS, self.type)
        return section | {"params": {name: value for name, value in section["params"].items() if name not in others}}

    unsupported = _refused("legacy_fusion")


class WarmupParams(Section):
    warmup_min_lr: NonNegativeFloat | Auto = "auto"
    """the learning rate of the first step, a number >= 0, or "auto": recipe.schedule.reference_lr, or the peak rate if
    there is no warmup"""

    warmup_max_lr: PositiveFloat | Auto = "auto"
    """the learning rate at the end of warmup, a number > 0, or "auto": the peak rate"""

    warmup_num_steps: Count | Auto = "auto"
    """optimizer steps of warmup, a whole number >= 1, or "auto": from recipe.schedule.warmup_epochs"""

    warmup_type: Literal["linear", "log"] = "linear"
    """ "linear", as in the paper, or "log"; DeepSpeed would only warn about any other value and use log"""


class Scheduler(Section):
    type: Literal["WarmupLR"] = "WarmupLR"
    """ "WarmupLR": the recipe adds the decay itself, from recipe.schedule.decay"""

    params: WarmupParams = WarmupParams()


class Fp16(PassedOn, flags="consecutive_hysteresis", numbers="hysteresis min_loss_scale"):
    enabled: bool = False
    auto_cast: Literal[False] = False
    """false: the training loop casts images to the model's precision itself"""

    loss_scale: NonNegativeFloat = 0
    """a fixed loss scale, a number > 0, or 0 for dynamic loss scaling"""

    initial_scale_power: Annotated[int, Field(ge=0, le=127)] = 16
    """the initial dynamic loss scale as a power of two, a whole number from 0 to 127, the limit of fp32"""

    loss_scale_window: Count = 1000
    """optimizer steps without overflow after which the loss scale doubles, a whole number >= 1"""

    unsupported = _refused("fp16_master_weights_and_grads", "the recipe's master weights are fp32")


class Bf16(PassedOn, flags="immediate_grad_update"):
    enabled: bool = False
    check_grad_overflow: bool = True
    """true or false: whether a step with non-finite gradients is skipped and counted. For SGD the check stays on the
    device. With false, such a gradient ends the run at the next report, as in fp32"""

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
    """ZeRO. If DeepSpeed has two spellings of a key, only the documented one is accepted, so that none is set twice."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """the ZeRO stage, a whole number from 0 to 3. Checkpoints of stage 0 load on any number of GPUs, those of stages 1
    to 3 only on as many as wrote them"""

    reduce_bucket_size: Count = 500_000_000
    """elements per bucket of the gradient reduction, a whole number >= 1, without exponent or fraction"""

    allgather_bucket_size: Size = 500_000_000
    """elements per bucket of the all-gather, a whole number >= 0, without exponent or fraction"""

    overlap_comm: bool | None = None
    """true, false or null: whether gradients are reduced during the backward pass; at stage 0, null means true. There
    the recipe implements the overlap itself, because DeepSpeed would wait for the end of the backward pass"""

    compute_grad_norm: bool = True

    unsupported = {
        **_refused(
            "offload_param offload_optimizer zenflow cpu_offload cpu_offload_param cpu_offload_use_pin_memory",
            "DeepSpeed's offloading needs its own CPU Adam or Lion, which this recipe does not support",
        ),
        **_refused(
            "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param elastic_checkpoint legacy_stage1 "
            "leaf_module pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory"
        ),
        **_refused(
            "stage3_gather_fp16_weights_on_model_save",
            "DeepSpeed has renamed this key",
            'use "stage3_gather_16bit_weights_on_model_save"',
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
        "a run saves its config, and a secret does not belong there",
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
    """true or false: whether DeepSpeed measures throughput, for which it waits for the GPU twice per micro-batch;
    false, because the recipe measures it without waiting (DeepSpeed's default is true)"""

    synchronized: bool = True


class Timers(Section):
    throughput: ThroughputTimer = ThroughputTimer()


class DeepSpeedConfig(Section):
    """The top level, without the section ``recipe``."""

    train_batch_size: BatchSize
    """the global batch size: images per optimizer step over all GPUs, a whole number from 1 to 1000000000. It equals
    ranks × accumulation steps × micro-batch; peak rate, warmup steps and accumulation follow from it. If
    recipe.schedule.batch_size changes it during the run, this is the initial one"""

    train_micro_batch_size_per_gpu: Count | Auto = "auto"
    """images per GPU and forward pass, a whole number >= 1, or "auto": the largest number up to
    recipe.max_micro_batch_size that divides a rank's share of the global batch"""

    gradient_accumulation_steps: Count | Auto = "auto"
    """forward passes per optimizer step, a whole number >= 1, or "auto": train_batch_size / (ranks × micro-batch)"""

    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    fp16: Fp16 = Fp16()
    """DeepSpeed's fp16 section, an object. "enabled": true trains in fp16 with fp32 master weights; the loss scale is
    dynamic unless loss_scale is set"""

    bf16: Bf16 = Bf16()
    """DeepSpeed's bf16 section, an object. "enabled": true trains in bf16 with fp32 master weights"""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    """DeepSpeed's ZeRO section, an object. Stages 0 to 3 work; offloading does not"""

    gradient_clipping: NonNegativeFloat = 0.0
    """the maximum gradient norm, a number >= 0; 0 disables clipping, as in the paper (DeepSpeed's default is 1)"""

    steps_per_print: Count = 10
    """optimizer steps between reports, a whole number >= 1 (DeepSpeed divides by it). Progress bar, log and
    metrics.jsonl are updated this often; on a GPU one step late, so that the host does not have to wait"""

    gradient_allreduce_op: Literal["mean"] = "mean"
    """ "mean": the scaling rules are for the mean gradient over the global batch"""

    prescale_gradients: bool = False
    """true or false: whether gradients are divided before they are summed over the GPUs"""

    gradient_predivide_factor: PositiveFloat = 1.0
    """the part of the division that is done before the sum over the GPUs, a number > 0"""

    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """the precision in which gradients are reduced: "fp32", "fp16", "bf16", or null for the training precision"""

    disable_allgather: bool = False
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    timers: Timers = Timers()
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
            "weight_quantization"
        ),
        **_refused("bfloat16", "DeepSpeed has renamed this key", 'use "bf16"'),
        **_refused("dataloader_drop_last", "the recipe's own sampler handles the last batch"),
        **_refused("elasticity", "the plan already keeps the global batch on any number of GPUs"),
        **_refused(
            "torch_autocast",
            "under fp16 its checkpoints lack the loss scale, and it does not count skipped steps",
            'use "fp16" or "bf16"',
        ),
    }

    @model_serializer(mode="wrap")
    def _without_empty_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value != {}}
