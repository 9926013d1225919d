from . import telemetry as telemetry, terminal as terminal
from .code_state import (
    code_sha256 as code_sha256,
    versions as versions,
)
from .metrics import (
    METRICS as METRICS,
    has_diverged as has_diverged,
    parse_object as parse_object,
    read_events as read_events,
    steps_done as steps_done,
)
from .summary import (
    LAST_EPOCHS as LAST_EPOCHS,
    SUMMARY as SUMMARY,
    History as History,
    format_summary as format_summary,
    read_summary as read_summary,
    summarise as summarise,
)
from .telemetry import (
    LOG as LOG,
    OutputError as OutputError,
    Telemetry as Telemetry,
    cannot_write as cannot_write,
)
from .terminal import (
    Parser as Parser,
    Progress as Progress,
    table as table,
)
