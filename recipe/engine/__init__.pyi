from .averaging import average_of as average_of
from .device import (
    choose_device as choose_device,
    choose_kernels as choose_kernels,
    device_name as device_name,
    seed_generators as seed_generators,
    slow_precision as slow_precision,
)
from .gradient_norms import GradientNorms as GradientNorms, listen_to_gradients as listen_to_gradients
from .local_steps import LocalSteps as LocalSteps, local_steps_of as local_steps_of
from .loop import (
    Batch as Batch,
    NoImageError as NoImageError,
    Step as Step,
    Validation as Validation,
    evaluate as evaluate,
    train_epoch as train_epoch,
    training_loss as training_loss,
)
from .micro_batch import (
    MicroBatchError as MicroBatchError,
    explained_memory as explained_memory,
    settle_micro_batch as settle_micro_batch,
)
from .precision import read_overflows as read_overflows
from .start import (
    deepspeed_config as deepspeed_config,
    join_process_group as join_process_group,
    set_global_batch as set_global_batch,
    set_log_level as set_log_level,
    start_engine as start_engine,
    waiting_for_storage as waiting_for_storage,
)
