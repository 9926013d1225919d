"""A process's rank is found in its launcher's variables, and DeepSpeed's command line among its ancestors."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.config.reader import ConfigError
from recipe.distributed.launcher import (
    Command,
    Placement,
    check_ranks,
    find_command,
    find_placement,
    is_this_machine,
)
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
def test_rank_is_read_from_each_launchers_variables(environ: dict[str, str]) -> None:
    place = find_placement(environ)
    assert (place.rank, place.world_size, place.local_rank, place.ranks_here) == (3, 4, 1, 2)
    assert place.variables() == TORCHRUN | {"LOCAL_SIZE": "2"}
    place.check_address(environ | ADDRESS)


@pytest.mark.parametrize(
    "environ",
    [{}, {"RANK": "", "WORLD_SIZE": ""}, BATCH_SCRIPT, SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}],
    ids=["nothing", "empty", "batch script", "a single task"],
)
def test_single_process(environ: dict[str, str]) -> None:
    place = find_placement(environ)
    assert (place.rank, place.world_size, place.ranks_here) == (0, 1, 1)
    assert place.variables() == {}
    place.check_address(environ)
    assert place.launcher is None


def test_defaults_and_precedence() -> None:
    place = find_placement({"RANK": "1", "WORLD_SIZE": "2"})
    assert (place.local_rank, place.ranks_here) == (0, 1)  # one rank per host
    assert find_placement(SRUN_ONCE_A_HOST | {"PMI_RANK": "1", "PMI_SIZE": "2"}).launcher == "Slurm"  # Slurm's own PMI2


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is set, as by the launcher, but not WORLD_SIZE; unset it, or set RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, as by the launcher, but not RANK; unset"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "as by OpenMPI, but not OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "as by Slurm, but not SLURM_LOCALID, SLURM_GTIDS"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "as by MPICH, but not MPI_LOCALRANKID, MPI_LOCALNRANKS"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not a rank"),
        (TORCHRUN | {"LOCAL_RANK": "one"}, "LOCAL_RANK=one is not a rank"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: a host has at least one rank"),
    ],
)
def test_incomplete_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_placement(environ)


@pytest.mark.parametrize("environ", [OPENMPI, SRUN, TORCHRUN | {"MASTER_PORT": "29500"}])
def test_ranks_without_a_rendezvous_address_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"started rank 3 of 4, but without MASTER_ADDR.*export"):
        find_placement(environ).check_address(environ)


def test_cores_reserved_by_slurm_are_not_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(12))
    assert cores_per_rank(find_placement(SRUN)) == 6
    assert cores_per_rank(find_placement(OPENMPI)) == 6
    assert cores_per_rank(Placement()) == 12
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(6))
    assert cores_per_rank(find_placement(SRUN)) == 6  # bound to its own cores
    assert cores_per_rank(find_placement(OPENMPI)) == 3


def test_run_with_incomplete_variables_does_not_start() -> None:
    """Otherwise N hosts would start N runs of one rank each."""
    variables = OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"}
    command = [sys.executable, "recipe/train.py", "--deepspeed_config", DIGITS]
    done = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("recipe: ")
    assert len(done.stderr.splitlines()) == 1


CHILD = (
    "from recipe.distributed.launcher import find_command; command = find_command(); "
    "print((command.pid, command.arguments))"
)


def launch(folder: Path, *arguments: str) -> Command:
    return Command(1, (*arguments, "train.py"), folder)


def test_command_is_found_among_the_ancestors(tmp_path: Path) -> None:
    """Through a process in between; with Python's options before the command, and the script's own after it."""
    command = tmp_path / "deepspeed"
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    command.write_text(
        "import os, subprocess, sys\nprint(os.getpid(), flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {between!r}])"
    )
    arguments = ["--hostfile", "nodes", "--num_gpus", "3", "train.py", "--hostfile", "the script's own"]
    done = subprocess.run(
        [sys.executable, "-u", str(command), *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pid, *_, found = done.stdout.splitlines()
    assert found == f"({pid}, {tuple(arguments)})"


def test_no_command_is_found_without_the_launcher() -> None:
    assert find_command() is None


def test_missing_hostfile(tmp_path: Path) -> None:
    (tmp_path / "cluster").write_text("a slots=1\n")
    with pytest.raises(ConfigError) as caught:
        check_ranks(launch(tmp_path, "--hostfile", "clutser"), 1)
    message = str(caught.value)
    assert message.startswith("clutser: no such file or directory; DeepSpeed ignores that and trains on this machine")
    assert f"did you mean {tmp_path / 'cluster'}?" in message


@pytest.mark.parametrize("arguments", [(), ("--no such option",)])
def test_nothing_is_checked_without_a_hostfile_or_in_another_program(tmp_path: Path, arguments: tuple) -> None:
    check_ranks(launch(tmp_path, *arguments), 4)


@pytest.mark.parametrize(
    ("text", "filters", "world_size", "message"),
    [
        ("a slots=2\nb slots=2\n", "", 4, None),
        (
            "a slots=2\nb slots=2\n",
            "--num_gpus=1",
            2,
            "4 slots on 2 hosts, but DeepSpeed started 2 ranks, by --num_gpus 1",
        ),
        ("a slots=2\nb slots=2\n", "", 1, "4 slots on 2 hosts, but DeepSpeed started 1 rank; "),
        ("a slots=2\nb slots=2x\n", "", 4, 'line 2 = "b slots=2x": not a host and its slots'),
        ("localhost slots=2\n", "", 2, None),
        ("me@localhost slots=2\n", "", 2, None),
        ("192.0.2.7 slots=2\n", "", 2, "its only host, 192.0.2.7, is not this machine, "),
        ("192.0.2.7 slots=2\n", "--force_multi", 2, None),
    ],
)
def test_ranks_must_match_the_hostfile(
    tmp_path: Path, text: str, filters: str, world_size: int, message: str | None
) -> None:
    (tmp_path / "cluster").write_text(text)
    command = launch(tmp_path, "--hostfile=cluster", *filters.split())
    if message is None:
        check_ranks(command, world_size)
        return
    with pytest.raises(ConfigError) as caught:
        check_ranks(command, world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        (socket.gethostname(), True),
        ("192.0.2.7", False),
        ("a.invalid", False),
    ],
)
def test_this_machine(host: str, here: bool) -> None:
    assert is_this_machine(host) is here
