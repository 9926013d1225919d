"""Invariant 3 over hosts: what several hosts train by the ``deepspeed`` CLI and pdsh is what one process trains."""

import signal
from pathlib import Path

import pytest

from recipe.checkpoints.manifest import find
from tests.launch import DIGITS, events, losses, train_ok, wait_until
from tests.multinode.cluster import Cluster, steps_written

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

RUN = (
    "--deepspeed_config",
    DIGITS,
    '--set=recipe.precision="fp64"',
    "--set=recipe.batchnorm.statistics=32",
    "--set=recipe.data.image_size=16",
    "--set=recipe.schedule.epochs=5",
    "--set=recipe.schedule.warmup_epochs=2",
    "--set=recipe.schedule.decay_epochs=[3,4]",
    "--set=recipe.max_micro_batch_size=64",
    "--set=steps_per_print=1",
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one_process")
    train_ok(*RUN, "--output", str(output))
    return output


def is_the_same_training(output: Path, reference: Path) -> None:
    assert losses(output) == pytest.approx(losses(reference), rel=1e-9)
    counts = [(line["top1"], line["top5"], line["count"]) for line in events(output, "validation")]
    assert counts == [(line["top1"], line["top5"], line["count"]) for line in events(reference, "validation")]


def test_hosts_train_what_one_process_trains(four_hosts: Cluster, tmp_path: Path, one_process: Path) -> None:
    """In float64 to 1e-9 at every step, which weights that differ from rank to rank would not be."""
    four_hosts.train(*RUN, "--output", str(tmp_path), hosts=four_hosts.names[:2], slots=2)
    is_the_same_training(tmp_path, one_process)


def test_a_run_goes_on_on_another_number_of_hosts(four_hosts: Cluster, tmp_path: Path, one_process: Path) -> None:
    with four_hosts.launched(*RUN, "--output", str(tmp_path), hosts=four_hosts.names[:2]) as process:
        wait_until(lambda: steps_written(tmp_path) >= 3)
        four_hosts.kill("node-1", "recipe/train.py --local_rank", signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert 3 <= find(tmp_path / "checkpoints")[0].step < 10
    printed = four_hosts.train(*RUN, "--output", str(tmp_path))
    assert "resumed from" in printed
    is_the_same_training(tmp_path, one_process)
