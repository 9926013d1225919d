from . import checkpoint as checkpoint, manifest as manifest
from .checkpoint import CheckpointError as CheckpointError
from .history import (
    History as History,
    load_run as load_run,
    save_run as save_run,
)
from .locking import (
    LOCK as LOCK,
    Lock as Lock,
    is_locked as is_locked,
    lock as lock,
    unlock as unlock,
)
from .manifest import (
    CHECKPOINTS as CHECKPOINTS,
    MANIFEST as MANIFEST,
    PLAN as PLAN,
    Checkpoint as Checkpoint,
    Data as Data,
    best_first as best_first,
    damage as damage,
    find as find,
    unreadable as unreadable,
)
from .resume import (
    NEVER_TO_CHANGE as NEVER_TO_CHANGE,
    Resume as Resume,
    Start as Start,
    batchnorm_images as batchnorm_images,
    check_data as check_data,
    choose_start as choose_start,
    differing_keys as differing_keys,
    is_same_training as is_same_training,
    leaves as leaves,
    stated as stated,
    unused_data as unused_data,
)
