"""Ranks are found in whatever language the launcher speaks; what is half said is refused, not guessed."""

import subprocess
import sys

import pytest

from recipe.distributed.placement import Placement, find_placement
from recipe.train import cores_per_rank
from tests.launch import DIGITS, ROOT, environment

ADDRESS = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0"}
SRUN = BATCH_SCRIPT | {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
    "SLURM_CPUS_PER_TASK": "6",
}
SRUN_ONCE_A_HOST = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_GTIDS": "1"}


@pytest.mark.parametrize(
    "environ",
    [TORCHRUN, DEEPSPEED, OPENMPI, MPICH, SRUN, OPENMPI | SRUN_ONCE_A_HOST, TORCHRUN | SRUN_ONCE_A_HOST],
    ids=["torchrun", "deepspeed", "openmpi", "mpich", "srun", "mpirun in a Slurm job", "srun torchrun"],
)
def test_one_rank_in_all_languages(environ: dict[str, str]) -> None:
    place = find_placement(environ)
    assert (place.rank, place.world_size, place.local_rank, place.ranks_here) == (3, 4, 1, 2)
    assert place.variables() == TORCHRUN | {"LOCAL_SIZE": "2"}
    place.check_address(environ | ADDRESS)


@pytest.mark.parametrize(
    "environ",
    [{}, {"RANK": "", "WORLD_SIZE": ""}, BATCH_SCRIPT, SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}],
    ids=["nothing", "empty", "batch script", "a single task"],
)
def test_a_process_that_is_alone(environ: dict[str, str]) -> None:
    place = find_placement(environ)
    assert (place.rank, place.world_size, place.ranks_here) == (0, 1, 1)
    assert place.variables() == {}
    place.check_address(environ)


def test_one_rank_a_host_needs_no_local_rank() -> None:
    place = find_placement({"RANK": "1", "WORLD_SIZE": "2"})
    assert (place.local_rank, place.ranks_here) == (0, 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not the number of a rank"),
        (TORCHRUN | {"LOCAL_RANK": "one"}, "LOCAL_RANK=one is not the number of a rank"),
    ],
)
def test_what_is_half_said_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_placement(environ)


@pytest.mark.parametrize("environ", [OPENMPI, SRUN, TORCHRUN | {"MASTER_PORT": "29500"}])
def test_ranks_that_know_no_meeting_place_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"started rank 3 of 4, but without MASTER_ADDR.*export"):
        find_placement(environ).check_address(environ)


def test_cores_that_slurm_has_set_apart_are_not_shared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(12))
    assert cores_per_rank(find_placement(SRUN)) == 6
    assert cores_per_rank(find_placement(OPENMPI)) == 6
    assert cores_per_rank(Placement()) == 12
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    assert cores_per_rank(find_placement(SRUN)) == 6  # bound to its own
    assert cores_per_rank(find_placement(OPENMPI)) == 3


@pytest.mark.parametrize("variables", [OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"}, {"RANK": "0"}])
def test_a_script_that_knows_half_does_not_start(variables: dict[str, str]) -> None:
    """On N hosts these would otherwise be N runs of one rank each."""
    command = [sys.executable, "recipe/train.py", "--deepspeed_config", DIGITS]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("recipe: ")
    assert len(done.stderr.splitlines()) == 1


def test_what_a_lone_rank_is_told_by_an_empty_environment() -> None:
    assert find_placement({"RANK": "", "WORLD_SIZE": ""}) == Placement()


@pytest.mark.parametrize(
    ("environ", "absent"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_LOCALID, SLURM_GTIDS"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "MPI_LOCALRANKID, MPI_LOCALNRANKS"),
    ],
)
def test_a_launcher_that_says_half_is_not_taken_for_none(environ: dict[str, str], absent: str) -> None:
    with pytest.raises(ValueError, match=f"is set, as .* does, but not {absent}; unset it, or set RANK"):
        find_placement(environ)


def test_slurms_pmi2_is_slurms() -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_GTIDS": "1"}
    assert find_placement(slurm | {"PMI_RANK": "1", "PMI_SIZE": "2"}).launcher == "Slurm"
