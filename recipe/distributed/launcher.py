"""What started this process: its rank, by the environment, and the ``deepspeed`` command, by the processes above it.

torchrun and DeepSpeed's own launcher set torch's variables (RANK …). ``mpirun`` and ``srun``, which DeepSpeed's
``--launcher openmpi`` and ``slurm`` call, have their own: one that reads only torch's runs alone on each host.

DeepSpeed ignores a missing hostfile, starts the ranks of a single other host on this machine, and does not check
``--num_gpus`` against the slots. It passes its scripts neither the hostfile nor the filters, but its process is an
ancestor of the ranks on this machine, or the parent of the ``pdsh`` that starts them by ssh. Where no such process is
visible (rank 0 on another machine, another launcher), nothing is checked.
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
# The variables of rank, world size, local rank and local world size. mpirun may itself be started by srun, once per
# host, and comes first.
LAUNCHERS = {
    "the launcher": TORCH,
    "OpenMPI": tuple(f"OMPI_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH2": tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # A batch script, too, has SLURM_PROCID and SLURM_NTASKS, but is no rank: only a step has SLURM_STEP_NUM_TASKS.
    # SLURM_GTIDS lists the ranks on this host.
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_GTIDS"),
}
FILTERS = ("include", "exclude", "num_nodes", "num_gpus")


@dataclass(frozen=True)
class Placement:
    """Where a rank runs. ``launcher`` is None without one; ``cores`` is what it has reserved for each rank."""

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_here: int = 1
    cores: int | None = None

    def variables(self) -> dict[str, str]:
        """The variables in which torch and DeepSpeed look for the placement."""
        if self.launcher is None:
            return {}
        own = (self.rank, self.world_size, self.local_rank, self.ranks_here)
        # DeepSpeed reads LOCAL_SIZE; without it, it asks numactl for the cores, again and again.
        return dict(zip((*TORCH, "LOCAL_SIZE"), map(str, (*own, self.ranks_here)), strict=True))

    def check_address(self, environ: Mapping[str, str]) -> None:
        """Refuse ranks without the address of the rendezvous.

        Raises:
            ValueError: MASTER_ADDR or MASTER_PORT is missing.
        """
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if self.launcher is not None and absent:
            raise ValueError(
                f"{self.launcher} started rank {self.rank} of {self.world_size}, but without {' and '.join(absent)}; "
                "export the address of rank 0's host as MASTER_ADDR and a free port there as MASTER_PORT (with "
                "deepspeed --launcher write them into .deepspeed_env)"
            )


def find_placement(environ: Mapping[str, str]) -> Placement:
    """The placement of a process with this environment; torch's own variables win where several launchers set theirs.

    Raises:
        ValueError: a launcher's variables that are incomplete; a number that is none, or out of bounds.
    """
    # Torch's first two suffice, of one rank per host; DeepSpeed's launcher calls the last one LOCAL_SIZE.
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
            raise ValueError(f"{name}={text} is not the number of a rank or of ranks")
    rank, world_size, local_rank, ranks_here = map(int, texts)
    if rank >= world_size:
        raise ValueError(f"{names[0]}={rank} with {names[1]}={world_size}: ranks count from 0, up to the number less 1")
    cores = int(given["SLURM_CPUS_PER_TASK"]) if launcher == "Slurm" and "SLURM_CPUS_PER_TASK" in given else None
    if launcher != "the launcher" and world_size == 1:
        return Placement(cores=cores)  # a single task, as of an interactive srun, is a run of its own
    return Placement(launcher, rank, world_size, local_rank, ranks_here, cores)


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
        with redirect_stderr(StringIO()):  # it may be another program of that name
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
