"""What DeepSpeed's launcher was asked for, as the processes above this one tell, beside what it started.

DeepSpeed passes over a hostfile that is not there, starts the ranks of a single other host on this machine, and does
not check ``--num_gpus`` against the slots. It tells its scripts neither the hostfile nor the filters, but its command
line can be read: it is an ancestor of the ranks that it starts on this machine, or the parent of the ``pdsh`` that
starts them here, too, by ssh. Where it is not to be seen – rank 0 on another machine, a launcher of another kind –
nothing is known, and nothing is checked.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import dropwhile
from pathlib import Path

from recipe.config import ABSENT, ConfigError, read_text
from recipe.distributed.hostfile import count_slots, read_hostfile

PROCESSES = Path("/proc")
FILTERS = ("include", "exclude", "num_nodes", "num_gpus")


@dataclass(frozen=True)
class Launch:
    """What the ``deepspeed`` command line says of hosts: ``hostfile`` as it was typed, ``folder`` where."""

    pid: int
    folder: Path
    hostfile: str
    is_default: bool
    filters: tuple[str, ...]
    forces_ssh: bool


def check_ranks(launch: Launch, world_size: int) -> None:
    """Refuse a launch that started other ranks than its hostfile promises.

    Raises:
        ConfigError: no such hostfile; a single host that is another machine; other ranks than slots; a bad line.
    """
    hostfile = launch.folder / launch.hostfile
    if not hostfile.is_file():
        if launch.is_default:
            return
        try:
            read_text(hostfile, "*")
        except ConfigError as error:
            problem = f"{error.problem}; DeepSpeed passes that over and trains on this machine alone"
            raise ConfigError(launch.hostfile, "", ABSENT, problem, error.remedy) from None
    hosts = read_hostfile(hostfile)
    slots = count_slots(hosts)
    if world_size != slots:
        ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
        cause = f", by {' '.join(launch.filters)}" if launch.filters else ""
        raise ConfigError(
            launch.hostfile,
            "",
            ABSENT,
            f"{slots} slots on {len(hosts)} hosts, but DeepSpeed started {ranks}{cause}",
            "write into the hostfile what you mean, and launch without --num_gpus, --num_nodes, --include, --exclude",
        )
    (first, *others) = hosts
    if not others and not launch.forces_ssh and not is_this_machine(first.rpartition("@")[2]):
        raise ConfigError(
            launch.hostfile,
            "",
            ABSENT,
            f"its only host, {first}, is another machine than this one, {socket.gethostname()}, on which DeepSpeed "
            "starts the ranks of a single host",
            "start deepspeed there, or give it --force_multi",
        )


@dataclass(frozen=True)
class Command:
    """A running ``deepspeed`` command: its process, what was typed behind its name, and the folder where."""

    pid: int
    words: tuple[str, ...]
    folder: Path


def find_command(pid: int | str = "self") -> Command | None:
    """The ``deepspeed`` command that started a process, this one unless told, if it is to be seen on this machine."""
    world_info = ""
    for above in _ancestors(pid):
        arguments = _arguments(above)
        command = _command(above, arguments)
        if command is not None:
            return command
        world_info = world_info or next((word for word in arguments if word.startswith("--world_info=")), "")
    if world_info:
        for process in PROCESSES.glob("[0-9]*"):
            arguments = _arguments(process.name)
            if world_info in arguments and Path(arguments[0]).name == "pdsh":
                return next(filter(None, (_command(p, _arguments(p)) for p in _ancestors(process.name))), None)
    return None


def read_command(command: Command) -> Launch | None:
    """What a command's words say of hosts; None where DeepSpeed does not understand them. Imports DeepSpeed."""
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    try:
        with redirect_stderr(StringIO()):  # where it is something else of that name
            asked = parse_args(list(command.words))
    except SystemExit:
        return None
    given = {name: getattr(asked, name) for name in FILTERS}
    filters = tuple(f"--{name} {value}" for name, value in given.items() if value not in ("", -1))
    is_default = asked.hostfile == DLTS_HOSTFILE
    return Launch(command.pid, command.folder, asked.hostfile, is_default, filters, asked.force_multi)


def open_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends, even while nobody has taken note of its end."""
    try:
        return os.pidfd_open(pid)
    except OSError:  # it is gone already, or Linux is older than 5.3
        return None


def kills_late_ranks(pid: int) -> bool:
    """Whether a process is DeepSpeed's launcher on one host, which kills what has not ended 30 s after its SIGTERM.

    torchrun's agent does so, too, but after a time that can be set, and it holds the store that the ranks need.
    """
    return "deepspeed.launcher.launch" in _arguments(str(pid))


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address leads here."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return host in ("localhost", socket.gethostname())
    return any(_is_own_address(str(address).partition("%")[0]) for address in found)


def _is_own_address(address: str) -> bool:
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _ancestors(pid: int | str) -> Iterator[str]:
    while True:
        try:
            status = (PROCESSES / str(pid) / "status").read_text()
        except OSError:
            return
        pid = next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:"))
        if pid == "0":
            return
        yield pid


def _arguments(pid: str) -> list[str]:
    try:
        return (PROCESSES / pid / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _command(pid: str, arguments: list[str]) -> Command | None:
    """A process, if by its arguments it is the ``deepspeed`` command."""
    words = arguments
    if words and Path(words[0]).name.startswith("python"):
        words = list(dropwhile(lambda word: word.startswith("-"), words[1:]))
    if not words or (Path(words[0]).name not in ("deepspeed", "ds") and words[0] != "deepspeed.launcher.runner"):
        return None
    try:
        folder = (PROCESSES / pid / "cwd").readlink()
    except OSError:
        return None
    return Command(int(pid), tuple(words[1:]), folder)
