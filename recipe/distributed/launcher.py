"""Finds this process's rank in the environment, and the ``deepspeed`` command among its ancestors.

torchrun and DeepSpeed's own launcher set torch's variables (RANK …). ``mpirun`` and ``srun``, which DeepSpeed's
``--launcher openmpi`` and ``slurm`` call, set their own; a script that ignores them would train alone on each host.

DeepSpeed ignores a missing hostfile, starts the ranks of a single remote host on this machine, and does not check
``--num_gpus`` against the slots. It passes neither hostfile nor filters to its scripts, but its process is an ancestor
of the ranks on this machine, or the parent of the ``pdsh`` that starts them by ssh. If no such process is visible
(rank 0 on another machine, another launcher), nothing is checked.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import dropwhile
from pathlib import Path

import psutil

from recipe.config import ABSENT, ConfigError, read_text
from recipe.distributed.hostfile import count_slots, read_hostfile

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The variables of rank, world size, local rank and local world size. OpenMPI comes before Slurm, because srun may start
# mpirun once per host.
LAUNCHERS = {
    "the launcher": TORCH,
    "OpenMPI": tuple(f"OMPI_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH2": tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # A batch script also has SLURM_PROCID and SLURM_NTASKS but is not a rank: only a step has SLURM_STEP_NUM_TASKS.
    # SLURM_GTIDS lists the ranks on this host.
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_GTIDS"),
}
FILTERS = ("include", "exclude", "num_nodes", "num_gpus")


@dataclass(frozen=True)
class Placement:
    """Where a rank runs. ``launcher`` is None without one; ``cores`` is the number it has reserved per rank."""

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_here: int = 1
    cores: int | None = None

    def variables(self) -> dict[str, str]:
        """The environment variables from which torch and DeepSpeed read the placement."""
        if self.launcher is None:
            return {}
        own = (self.rank, self.world_size, self.local_rank, self.ranks_here)
        # Without LOCAL_SIZE, DeepSpeed keeps asking numactl for the cores.
        return dict(zip((*TORCH, "LOCAL_SIZE"), map(str, (*own, self.ranks_here)), strict=True))

    def check_address(self, environ: Mapping[str, str]) -> None:
        """Refuse ranks that have no rendezvous address."""
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if self.launcher is not None and absent:
            raise ValueError(
                f"{self.launcher} started rank {self.rank} of {self.world_size}, but without {' and '.join(absent)}; "
                "export the address of rank 0's host as MASTER_ADDR and a free port there as MASTER_PORT (with "
                "deepspeed --launcher write them into .deepspeed_env)"
            )


def find_placement(environ: Mapping[str, str]) -> Placement:
    """The placement of a process with this environment; torch's own variables take precedence over a launcher's.

    A launcher's variables are refused if they are incomplete, not numbers, or out of bounds.
    """
    # With one rank per host, torch's first two are enough; DeepSpeed's launcher calls the last one LOCAL_SIZE.
    given = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": environ.get("LOCAL_SIZE") or "1"}
    given |= {name: value for name, value in environ.items() if value}
    incomplete = ""
    for launcher, names in LAUNCHERS.items():
        absent = [name for name in names if name not in given]
        if not absent:
            return _placement(launcher, names, given)
        partly = [name for name in names[:2] if name in given]
        if partly and (launcher == "the launcher" or given.get(names[1], "1") != "1"):
            incomplete = incomplete or (
                f"{', '.join(f'{name}={given[name]}' for name in partly)} is set, as by {launcher}, but not "
                f"{', '.join(absent)}; unset it, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )
    if incomplete:
        raise ValueError(incomplete)
    return Placement()


def _placement(launcher: str, names: tuple[str, ...], given: Mapping[str, str]) -> Placement:
    texts = [str(len(given[name].split(","))) if name == "SLURM_GTIDS" else given[name] for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.isdecimal():
            raise ValueError(f"{name}={text} is not a rank or a number of ranks")
    rank, world_size, local_rank, ranks_here = map(int, texts)
    if ranks_here == 0:
        raise ValueError(f"{names[3]}=0: a host has at least one rank; unset it, or set it to this host's ranks")
    if rank >= world_size:
        raise ValueError(f"{names[0]}={rank} with {names[1]}={world_size}: ranks count from 0 to {world_size - 1}")
    cores = int(given["SLURM_CPUS_PER_TASK"]) if launcher == "Slurm" and "SLURM_CPUS_PER_TASK" in given else None
    if launcher != "the launcher" and world_size == 1:
        return Placement(cores=cores)  # a single task, as in an interactive srun, runs alone
    return Placement(launcher, rank, world_size, local_rank, ranks_here, cores)


@dataclass(frozen=True)
class Command:
    """A running ``deepspeed`` command: its process, its arguments, and its working directory."""

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
    """Refuse a launch whose ranks do not match its hostfile. Imports DeepSpeed to parse its arguments."""
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    try:
        with redirect_stderr(StringIO()):  # it may be another program with that name
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
            problem = f"{error.problem}; DeepSpeed ignores that and trains on this machine alone"
            raise refusal(problem, error.remedy) from None
    hosts = read_hostfile(hostfile)
    slots = count_slots(hosts)
    if world_size != slots:
        given = {name: getattr(asked, name) for name in FILTERS}
        filters = " ".join(f"--{name} {value}" for name, value in given.items() if value not in ("", -1))
        raise refusal(
            f"{slots} slots on {len(hosts)} hosts, but DeepSpeed started {world_size} "
            f"rank{'' if world_size == 1 else 's'}{filters and f', by {filters}'}",
            "write the hosts and slots you want into the hostfile, and launch without --num_gpus, --num_nodes, "
            "--include, --exclude",
        )
    (first, *others) = hosts
    if not others and not asked.force_multi and not is_this_machine(first.rpartition("@")[2]):
        raise refusal(
            f"its only host, {first}, is not this machine, {socket.gethostname()}, but DeepSpeed starts the ranks of a "
            "single host on this machine",
            "start deepspeed there, or give it --force_multi",
        )


def open_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends, even before its parent has reaped it; None if gone."""
    try:
        return os.pidfd_open(pid)
    except OSError:  # the process is gone, or Linux is older than 5.3
        return None


def kills_late_ranks(pid: int) -> bool:
    """Whether a process is DeepSpeed's launcher on a host, which kills ranks 30 s after it has sent them SIGTERM.

    torchrun's agent does so too, but its delay can be configured, and it holds the store that the ranks need.
    """
    with suppress(psutil.Error):
        return "deepspeed.launcher.launch" in _words(psutil.Process(pid))
    return False


def is_this_machine(host: str) -> bool:
    """Whether a host name or address belongs to this machine."""
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
    """The ``deepspeed`` command that a process runs, if it runs one."""
    words = _words(process)
    if words and Path(words[0]).name.startswith("python"):
        words = list(dropwhile(lambda word: word.startswith("-"), words[1:]))
    if words and (Path(words[0]).name in ("deepspeed", "ds") or words[0] == "deepspeed.launcher.runner"):
        with suppress(psutil.Error):
            return Command(process.pid, tuple(words[1:]), Path(process.cwd()))
    return None
