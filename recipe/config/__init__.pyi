from .contents import Contents as Contents
from .deepspeed_sections import (
    Count as Count,
    PassedOn as PassedOn,
    Section as Section,
    Size as Size,
)
from .model_names import trains_no_batchnorm as trains_no_batchnorm
from .reader import (
    ABSENT as ABSENT,
    ConfigError as ConfigError,
    apply_override as apply_override,
    parse_json as parse_json,
    printable as printable,
    read_text as read_text,
)
from .schema import (
    FOLDERS as FOLDERS,
    Config as Config,
    Distributed as Distributed,
    NoiseScale as NoiseScale,
    parse_config as parse_config,
    read_config as read_config,
)
from .validation import validate as validate
