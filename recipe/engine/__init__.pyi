from .gradient_norms import GradientNorms as GradientNorms
from .kernels import (
    choose_kernels as choose_kernels,
    compile_training as compile_training,
)
from .loop import (
    Batch as Batch,
    NoImageError as NoImageError,
    Step as Step,
    Validation as Validation,
    cross_entropy as cross_entropy,
    evaluate as evaluate,
    train_epoch as train_epoch,
)
from .micro_batch import (
    CPU_MICRO_BATCH as CPU_MICRO_BATCH,
    largest_on_cpu as largest_on_cpu,
    largest_on_gpu as largest_on_gpu,
)
from .precision import read_overflows as read_overflows
from .start import (
    join_process_group as join_process_group,
    set_loudness as set_loudness,
    start_engine as start_engine,
)
