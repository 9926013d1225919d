from .cost import (
    CONTEXT_BYTES as CONTEXT_BYTES,
    RAW_SHORT_SIDE as RAW_SHORT_SIDE,
    SHIPPED as SHIPPED,
    Link as Link,
    ModelFacts as ModelFacts,
    activation_bytes as activation_bytes,
    all_reduce_bytes as all_reduce_bytes,
    all_reduce_seconds as all_reduce_seconds,
    batchnorm_traffic as batchnorm_traffic,
    cores_to_load as cores_to_load,
    efficiency as efficiency,
    exposed_seconds as exposed_seconds,
    gradient_bytes as gradient_bytes,
    hidden_bandwidth as hidden_bandwidth,
    largest_micro_batch as largest_micro_batch,
    local_bytes as local_bytes,
    memory as memory,
    overlaps_reduction as overlaps_reduction,
    reduced_bytes as reduced_bytes,
    reduction_precision as reduction_precision,
    shipped_facts as shipped_facts,
    speed as speed,
)
from .layout import (
    LABEL_WIDTH as LABEL_WIDTH,
    NO_BREAK as NO_BREAK,
    columns as columns,
    counted as counted,
    fields as fields,
    is_terminal as is_terminal,
    wrap as wrap,
)
from .noise_scale import (
    NoiseScale as NoiseScale,
    estimate as estimate,
    in_words as in_words,
)
from .plan import (
    DIGITS_IMAGES as DIGITS_IMAGES,
    PIXEL_MEAN_STD as PIXEL_MEAN_STD,
    Plan as Plan,
    make_plan as make_plan,
    with_micro_batch as with_micro_batch,
)
from .scaling import (
    RateSchedule as RateSchedule,
    scaled_rate as scaled_rate,
)
from .text import (
    format_fields as format_fields,
    format_plan as format_plan,
    notes as notes,
    plan_fields as plan_fields,
    plan_json as plan_json,
    rates as rates,
)
