"""A failure on one host ends the whole run soon, and the last line of the recipe names what failed first."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from recipe.checkpoints.manifest import find
from tests.data.images import write_folder
from tests.launch import DIGITS, wait_until
from tests.multinode.cluster import Cluster, steps_written

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

TIMEOUT_SECONDS = 10
MARGIN_SECONDS = 60  # only a guard against hanging
LONG = (
    "--deepspeed_config",
    DIGITS,
    "--set=recipe.data.image_size=8",
    "--set=recipe.schedule.epochs=400",
    "--set=recipe.checkpoint.every_steps=4",
    "--set=steps_per_print=1",
    f"--set=recipe.distributed.timeout_seconds={TIMEOUT_SECONDS}",
)


def output_of_failed(process: subprocess.Popen[str], since: float) -> str:
    """Wait for a launch to fail, within the timeout plus the margin, and return what it printed."""
    printed, _ = process.communicate(timeout=TIMEOUT_SECONDS + MARGIN_SECONDS - (time.monotonic() - since))
    assert process.returncode > 0, printed
    return printed


def last_message(printed: str) -> str:
    """The recipe's own last line, without its prefix."""
    said = [line.partition("recipe: ")[2] for line in printed.splitlines() if "recipe: " in line]
    return said[-1]


def wait_until_no_process_is_left(cluster: Cluster, since: float) -> None:
    """Within the timeout plus the margin, even on a host that is cut off."""
    for name in cluster.names:
        left = TIMEOUT_SECONDS + MARGIN_SECONDS - (time.monotonic() - since)
        wait_until(lambda name=name: not cluster.processes(name), seconds=max(1, left))


def test_killed_rank_0_is_named(two_hosts: Cluster, tmp_path: Path) -> None:
    """Rank 0 holds the store. That any other rank is named, too, is seen where a host is cut off."""
    with two_hosts.launched(*LONG, "--output", str(tmp_path)) as process:
        wait_until(lambda: steps_written(tmp_path) > 6)
        killed = time.monotonic()
        two_hosts.kill("node-0", "recipe/train.py --local_rank=0 ")
        printed = output_of_failed(process, killed)
    assert re.match(
        r"rank 0 on node-0 exited without reporting an error at step \d+: killed \(out of memory\?\), or the host is",
        last_message(printed),
    ), printed
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith(last_message(printed))
    wait_until_no_process_is_left(two_hosts, killed)


def test_host_that_is_cut_off_is_named(two_hosts: Cluster, tmp_path: Path) -> None:
    with two_hosts.launched(*LONG, "--output", str(tmp_path)) as process:
        wait_until(lambda: steps_written(tmp_path) > 6)
        cut = time.monotonic()
        with two_hosts.cut_off("node-1"):
            printed = output_of_failed(process, cut)
    assert "rank 1 on node-1 exited without reporting an error at step" in last_message(printed), printed
    wait_until_no_process_is_left(two_hosts, cut)


def test_ranks_save_and_end_when_the_launcher_is_killed(two_hosts: Cluster, tmp_path: Path) -> None:
    with two_hosts.launched(*LONG, "--output", str(tmp_path), ssh="-tt") as process:
        wait_until(lambda: steps_written(tmp_path) > 6)
        killed = time.monotonic()
        two_hosts.kill("node-0", "bin/deepspeed")
        process.communicate(timeout=60)
    wait_until_no_process_is_left(two_hosts, killed)
    # Either their terminals hang up, or the watch notices.
    last = (tmp_path / "train.log").read_text().splitlines()[-1]
    assert re.search(r"ended by SIG(HUP|TERM), saved after", last), last
    assert find(tmp_path / "checkpoints")[0].step == steps_written(tmp_path)


def test_data_that_one_host_lacks_is_refused_on_all(two_hosts: Cluster, tmp_path: Path) -> None:
    data, empty, output = write_folder(tmp_path / "images", images=300), tmp_path / "empty", tmp_path / "run"
    empty.mkdir()
    source = {"source": "imagefolder", "path": str(data), "image_size": 32}
    source |= {"train_images": 600, "validation_images": 600}
    changes = (f"--set=recipe.data={json.dumps(source)}", "--set=recipe.model.num_classes=2")
    with (
        two_hosts.covered("node-1", data, by=empty),
        two_hosts.launched("--deepspeed_config", DIGITS, "--output", str(output), *changes) as process,
    ):
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    said = {line.partition("recipe: ")[2] for line in printed.splitlines() if "recipe: " in line}
    (message,) = said
    assert message.startswith(f"rank 1 on node-1: {DIGITS}"), message
    assert f"{data} has no " in message, message
    assert "Traceback" not in printed
    assert [two_hosts.processes(name) for name in two_hosts.names] == [[], []]
    assert not (output / "metrics.jsonl").exists()
