from . import rendezvous as rendezvous
from .agreement import Requests as Requests
from .code_state import (
    code_sha256 as code_sha256,
    versions as versions,
)
from .heartbeat import (
    FAILED as FAILED,
    Watch as Watch,
)
from .hostfile import (
    count_slots as count_slots,
    deepspeed_env_files as deepspeed_env_files,
    read_deepspeed_env as read_deepspeed_env,
    read_hostfile as read_hostfile,
)
from .launcher import (
    Placement as Placement,
    check_ranks as check_ranks,
    find_command as find_command,
    find_placement as find_placement,
    is_this_machine as is_this_machine,
    open_process as open_process,
)
from .rendezvous import (
    DisagreementError as DisagreementError,
    Meeting as Meeting,
    MeetingError as MeetingError,
    meet as meet,
    own_facts as own_facts,
)
from .signals import (
    SIGNALS as SIGNALS,
    Interrupted as Interrupted,
    heeded as heeded,
    ignore as ignore,
    listen as listen,
    outlive_readers as outlive_readers,
    say as say,
    take_by as take_by,
)
