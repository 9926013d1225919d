from .batchnorm import BatchNorm as BatchNorm, join_neighbours as join_neighbours
from .build import (
    DTYPES as DTYPES,
    build_model as build_model,
    cast_parameters as cast_parameters,
    check_image_size as check_image_size,
    check_image_sizes as check_image_sizes,
    parameter_counts as parameter_counts,
    parameter_groups as parameter_groups,
)
from .running_averages import (
    average_running_statistics as average_running_statistics,
    gather_running_averages as gather_running_averages,
    restore_running_averages as restore_running_averages,
    update_running_averages as update_running_averages,
)
