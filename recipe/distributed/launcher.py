"""Compares the ranks that DeepSpeed's launcher started with what its command line and hostfile say.

DeepSpeed ignores a missing hostfile, starts the ranks of a single other host on this machine, and does not check
``--num_gpus`` against the slots. It passes its scripts neither the hostfile nor the filters, but its process is an
ancestor of the ranks on this machine, or the parent of the ``pdsh`` that starts them by ssh. Where no such process is
visible (rank 0 on another machine, another launcher), nothing is checked.
"""

import os
import socket
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import dropwhile
from pathlib import Path

import psutil

from recipe.config import ABSENT, ConfigError, read_text
from recipe.distributed.hostfile import count_slots, read_hostfile

FILTERS = ("include", "exclude", "num_nodes", "num_gpus")


@dataclass(frozen=True)
class Command:
    """A running ``deepspeed`` command: its process, its arguments, and the folder it was started in."""

    pid: int
    arguments: tuple[str, ...]
    folder: Path


def find_command() -> Command | None:
    """The ``deepspeed`` command that started this process, if it is visible on this machine."""
    world_info = ""
    for ancestor in psutil.Process().parents():
        if command := _command(ancestor):
            return command
        world_info = world_info or next((word for word in _words(ancestor) if word.startswith("--world_info=")), "")
    for process in psutil.process_iter() if world_info else ():
        words = _words(process)
        if world_info in words and Path(words[0]).name == "pdsh":
            return next(filter(None, map(_command, process.parents())), None)
    return None


def check_ranks(command: Command, world_size: int) -> None:
    """Refuse a launch that started other ranks than its hostfile promises. Imports DeepSpeed, to read its arguments.

    Raises:
        ConfigError: no such hostfile; a single host that is another machine; other ranks than slots; a bad line.
    """
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    try:
        with redirect_stderr(StringIO()):  # some other program may bear the name
            asked = parse_args(list(command.arguments))
    except SystemExit:
        return
    hostfile = command.folder / asked.hostfile
    refusal = partial(ConfigError, asked.hostfile, "", ABSENT)
    if not hostfile.is_file():
        if asked.hostfile == DLTS_HOSTFILE:
            return
        try:
            read_text(hostfile, "*")
        except ConfigError as error:
            problem = f"{error.problem}; DeepSpeed passes that over and trains on this machine alone"
            raise refusal(problem, error.remedy) from None
    hosts = read_hostfile(hostfile)
    slots = count_slots(hosts)
    if world_size != slots:
        given = {name: getattr(asked, name) for name in FILTERS}
        filters = " ".join(f"--{name} {value}" for name, value in given.items() if value not in ("", -1))
        raise refusal(
            f"{slots} slots on {len(hosts)} hosts, but DeepSpeed started {world_size} "
            f"rank{'' if world_size == 1 else 's'}{filters and f', by {filters}'}",
            "write into the hostfile what you mean, and launch without --num_gpus, --num_nodes, --include, --exclude",
        )
    (first, *others) = hosts
    if not others and not asked.force_multi and not is_this_machine(first.rpartition("@")[2]):
        raise refusal(
            f"its only host, {first}, is another machine than this one, {socket.gethostname()}, on which DeepSpeed "
            "starts the ranks of a single host",
            "start deepspeed there, or give it --force_multi",
        )


def open_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends, even before its parent has waited for it."""
    try:
        return os.pidfd_open(pid)
    except OSError:  # it is gone already, or Linux is older than 5.3
        return None


def kills_late_ranks(pid: int) -> bool:
    """Whether a process is DeepSpeed's launcher on one host, which kills ranks that outlive its SIGTERM by 30 s.

    So does torchrun's agent, but after a time that can be set, and it holds the store that the ranks need.
    """
    with suppress(psutil.Error):
        return "deepspeed.launcher.launch" in _words(psutil.Process(pid))
    return False


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address is one of this machine's."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return host in ("localhost", socket.gethostname())
    for family, kind, protocol, _, address in addresses:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _command(process: psutil.Process) -> Command | None:
    """A process, if its command line is that of ``deepspeed``."""
    words = _words(process)
    if words and Path(words[0]).name.startswith("python"):
        words = list(dropwhile(lambda word: word.startswith("-"), words[1:]))
    if words and (Path(words[0]).name in ("deepspeed", "ds") or words[0] == "deepspeed.launcher.runner"):
        with suppress(psutil.Error):
            return Command(process.pid, tuple(words[1:]), Path(process.cwd()))
    return None
