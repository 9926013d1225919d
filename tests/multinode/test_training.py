"""Invariant 3 across hosts: launched by ``deepspeed`` and pdsh, several hosts train as one process does."""

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


def test_run_moves_from_two_hosts_to_four_and_trains_as_one_process(four_hosts: Cluster, tmp_path: Path) -> None:
    """Two ranks on each of two hosts, then one on each of four; in float64 every loss is the same to 1e-9."""
    output, reference = tmp_path / "hosts", tmp_path / "one_process"
    train_ok(*RUN, "--output", str(reference))
    with four_hosts.launched(*RUN, "--output", str(output), hosts=four_hosts.names[:2], slots=2) as process:
        wait_until(lambda: steps_written(output) >= 3)
        four_hosts.kill("node-1", "recipe/train.py --local_rank=1 ", signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert 3 <= find(output / "checkpoints")[0].step < 10
    printed = four_hosts.train(*RUN, "--output", str(output))
    assert "resumed from" in printed
    assert losses(output) == pytest.approx(losses(reference), rel=1e-9)
    counts = [(line["top1"], line["top5"], line["count"]) for line in events(output, "validation")]
    assert counts == [(line["top1"], line["top5"], line["count"]) for line in events(reference, "validation")]
