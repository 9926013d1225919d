"""``examples/slurm.sbatch`` on a real Slurm of two hosts: what it is told to end is saved, requeued and goes on."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import DIGITS, SHORT, losses, train_ok, wait_until
from tests.multinode.cluster import DEEPSPEED, Cluster, steps_written
from tests.multinode.slurm import Slurm, missing

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

# One rank on each of the two hosts; all else is as the example says.
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1")
STEPS = 60
TRAINING = (
    DIGITS,
    "--set=recipe.data.image_size=8",
    f"--set=recipe.schedule.epochs={STEPS // 2}",
    "--set=steps_per_print=1",
)


@pytest.fixture(scope="module")
def slurm(two_hosts: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(two_hosts, tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def submit(slurm: Slurm, output: Path) -> str:
    """Submit the example; give the job's number."""
    log = f"--output={output}.log"
    command = ("sbatch", "--parsable", *SIZE, log, "examples/slurm.sbatch", *TRAINING, "--output", str(output))
    return slurm.call(*command, PYTHON=sys.executable).strip()


def wait_for(slurm: Slurm, job: str, log: Path, state: str, seconds: float = 120.0) -> dict[str, str]:
    """Wait until the job is in a state; give what Slurm knows of it."""
    try:
        wait_until(lambda: slurm.job(job)["JobState"] == state, seconds)
    except TimeoutError as error:
        raise AssertionError(f"job is {slurm.job(job)['JobState']}: {log.read_text()}") from error
    return slurm.job(job)


def test_what_slurm_ends_goes_on_by_itself_and_is_the_same_training(slurm: Slurm, tmp_path: Path) -> None:
    """First its steps are signalled, as before the end of the time; then Slurm requeues it, as when it preempts."""
    undisturbed, output, log = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "run.log"
    job = submit(slurm, output)
    wait_until(lambda: steps_written(output) > 6)
    slurm.call("scancel", "--signal=TERM", job)
    wait_until(lambda: "resumed from" in log.read_text(), seconds=60)
    first = steps_written(output)
    wait_until(lambda: steps_written(output) > first + 6)
    slurm.call("scontrol", "requeue", job)
    known = wait_for(slurm, job, log, "COMPLETED")
    printed = log.read_text()
    assert known["Restarts"] == "2", printed
    assert printed.count("ended by SIGTERM, saved after") == 2, printed
    assert printed.count("resumed from") == 2, printed
    assert (output / "summary.json").exists()
    assert steps_written(output) == STEPS

    config, *settings = TRAINING
    train_ok("--deepspeed_config", config, *settings, "--output", str(undisturbed), ranks=2)
    assert losses(output) == losses(undisturbed)


def test_a_job_that_a_person_cancels_is_saved_and_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "run.log"
    job = submit(slurm, output)
    wait_until(lambda: steps_written(output) > 6)
    slurm.call("scancel", job)
    wait_until(lambda: slurm.call("squeue", "--noheader").strip() == "", seconds=60)
    known = slurm.job(job)
    assert (known["JobState"], known["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    assert "ended by SIGTERM, saved after" in log.read_text()
    assert not (output / "summary.json").exists()


def test_the_slurm_launcher_of_deepspeed(slurm: Slurm, tmp_path: Path) -> None:
    """It needs a hostfile to count ranks, and in .deepspeed_env where they meet; Slurm chooses the hosts."""
    variables = tmp_path / "deepspeed_env"
    variables.write_text(f"MASTER_ADDR={slurm.cluster.address('node-0')}\nMASTER_PORT=29512\n")
    hostfile = slurm.cluster.hostfile(tmp_path / "hostfile")
    launch = (DEEPSPEED, "--hostfile", str(hostfile), "--launcher", "slurm", "--launcher_args=--nodes=2")
    arguments = ("--deepspeed_config", DIGITS, *SHORT, "--output", str(tmp_path / "run"))
    printed = slurm.call(*launch, "recipe/train.py", *arguments, DS_ENV_FILE=str(variables))
    assert "2 ranks of 2 hosts on CPU" in printed
    assert (tmp_path / "run/summary.json").exists()


def test_slurm_takes_the_example_as_it_stands(slurm: Slurm) -> None:
    """All its options but the number of nodes, of which there are two here."""
    answer = slurm.call("sbatch", "--test-only", "--nodes=2", "examples/slurm.sbatch", DIGITS)
    assert "using 128 processors on nodes node-[0-1]" in answer
