from . import telemetry as telemetry, terminal as terminal
from .files import (
    make_folder as make_folder,
    remove_summary as remove_summary,
    replace_text as replace_text,
    set_former_run_aside as set_former_run_aside,
)
from .metrics import (
    METRICS as METRICS,
    accuracy_words as accuracy_words,
    has_diverged as has_diverged,
    parse_event as parse_event,
    parse_object as parse_object,
    read_events as read_events,
    steps_done as steps_done,
)
from .summary import (
    LAST_EPOCHS as LAST_EPOCHS,
    SUMMARY as SUMMARY,
    format_summary as format_summary,
    read_summary as read_summary,
    summarise as summarise,
)
from .telemetry import (
    LOG as LOG,
    OutputError as OutputError,
    Telemetry as Telemetry,
)
from .terminal import (
    Parser as Parser,
    Progress as Progress,
    table as table,
    within as within,
)
