"""torchrun restarts the run on the hosts that remain, and it continues without anyone stepping in."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch import events, losses, train_ok, wait_until
from tests.multinode.cluster import TORCHRUN, Cluster, steps_written
from tests.multinode.test_training import RUN

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

# Both three and two ranks can share it.
BATCH = (*RUN, "--set=train_batch_size=384", "--set=recipe.checkpoint.every_steps=1")


def elastic(*arguments: str) -> list[str]:
    """torchrun's command line, the same on every host."""
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=node-0:29400", "--rdzv-id=run")
    launcher = [TORCHRUN, "--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=3", *rendezvous]
    waits = "--set=recipe.distributed.timeout_seconds=10"
    return [*launcher, "--rdzv-conf=last_call_timeout=5,keep_alive_interval=2", "recipe/train.py", *arguments, waits]


def test_run_continues_when_one_of_three_hosts_is_cut_off(four_hosts: Cluster, tmp_path: Path) -> None:
    output, reference = tmp_path / "run", tmp_path / "one_process"
    train_ok(*BATCH, "--output", str(reference))
    hosts = four_hosts.names[:3]
    with ExitStack() as stack:
        agents = [
            stack.enter_context(four_hosts.started(elastic(*BATCH, "--output", str(output)), on=host)) for host in hosts
        ]
        wait_until(lambda: steps_written(output) >= 4, seconds=150)
        with four_hosts.cut_off("node-2"):
            printed = [agent.communicate(timeout=240)[0] for agent in agents[:2]]
    print(*printed, sep="\n")
    assert [agent.returncode for agent in agents[:2]] == [0, 0]
    assert (output / "summary.json").exists()
    said = "".join(printed)
    assert "384 = 3 ranks × " in said
    assert "384 = 2 ranks × " in said
    assert re.search(r"recipe: rank \d on node-2 exited without reporting an error", said)
    assert [event["step"] for event in events(output, "step")] == list(range(15))
    assert losses(output) == pytest.approx(losses(reference), rel=1e-9)
