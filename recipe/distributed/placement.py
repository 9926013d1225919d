"""This process's rank, world size and local rank, from the environment variables of whatever launched it.

torchrun and DeepSpeed's own launcher set torch's variables (RANK …). ``mpirun`` and ``srun``, which DeepSpeed's
``--launcher openmpi`` and ``slurm`` call, have their own: one that reads only torch's runs alone on each host.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The same four of others. mpirun may itself be started by srun, once per host, and is asked first.
OTHERS = {
    "OpenMPI": tuple(f"OMPI_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH2": tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # A batch script, too, has SLURM_PROCID and SLURM_NTASKS, but is no rank: only a step has SLURM_STEP_NUM_TASKS.
    # SLURM_GTIDS lists the ranks on this host.
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_GTIDS"),
}


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
        # LOCAL_SIZE is DeepSpeed's word; without it, it asks numactl for the cores, again and again.
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
    """The placement of a process with this environment; torch's own variables, where they are set, win.

    Raises:
        ValueError: a launcher's variables that are half set; a number that is none, or out of bounds.
    """
    given = [name for name in TORCH[:2] if environ.get(name)]
    if len(given) == 1:
        (other,) = set(TORCH[:2]) - set(given)
        raise ValueError(
            f"{given[0]}={environ[given[0]]} is set, but {other} is not; unset it, or set both, as launchers do"
        )
    if given:
        # DeepSpeed's launcher calls the last one LOCAL_SIZE.
        return _placement("the launcher", TORCH, {"LOCAL_WORLD_SIZE": environ.get("LOCAL_SIZE", ""), **environ})
    incomplete = ""
    for launcher, names in OTHERS.items():
        absent = [name for name in names if not environ.get(name)]
        if not absent:
            place = _placement(launcher, names, environ)
            # A single task, as of an interactive srun, is a run of its own.
            return place if place.world_size > 1 else Placement(cores=place.cores)
        if environ.get(names[1], "1") != "1":
            incomplete = (
                f"{names[1]}={environ[names[1]]} is set, as {launcher} does, but not {', '.join(absent)}; unset it, or "
                "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )
    if incomplete:
        raise ValueError(incomplete)
    return Placement()


def _placement(launcher: str, names: tuple[str, ...], environ: Mapping[str, str]) -> Placement:
    rank, world_size = _number(names[0], environ), _number(names[1], environ)
    # A launcher that sets no more than these two starts one rank per host.
    local_rank, ranks_here = _number(names[2], environ, 0), _number(names[3], environ, 1)
    if rank >= world_size:
        raise ValueError(
            f"{names[0]}={rank} with {names[1]}={world_size}: ranks count from 0 and end below their number"
        )
    cores = environ.get("SLURM_CPUS_PER_TASK", "") if launcher == "Slurm" else ""
    return Placement(launcher, rank, world_size, local_rank, ranks_here, int(cores) if cores else None)


def _number(name: str, environ: Mapping[str, str], default: int | None = None) -> int:
    text = environ.get(name, "")
    if name == "SLURM_GTIDS":
        return len(text.split(","))
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name}={text} is not the number of a rank or of ranks")
    return int(text)
