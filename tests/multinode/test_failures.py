"""What ends a run on several hosts ends all of it, soon, and the first cause is the last that the recipe says."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from recipe.checkpoints.manifest import find
from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT, events, wait_until
from tests.multinode.cluster import Cluster, steps_written

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

TIMEOUT_SECONDS = 10
MARGIN_SECONDS = 60  # a guard against hanging: who ended, and why, is what the tests read
LONG = (
    "--deepspeed_config",
    DIGITS,
    "--set=recipe.data.image_size=8",
    "--set=recipe.schedule.epochs=400",
    "--set=recipe.checkpoint.every_steps=4",
    "--set=steps_per_print=1",
    f"--set=recipe.distributed.timeout_seconds={TIMEOUT_SECONDS}",
)


def the_end(process: subprocess.Popen[str], since: float) -> str:
    """What a launch printed that must end by itself within the timeout plus the margin, and not well."""
    printed, _ = process.communicate(timeout=TIMEOUT_SECONDS + MARGIN_SECONDS - (time.monotonic() - since))
    assert process.returncode > 0, printed
    return printed


def last_word(printed: str) -> str:
    """The last line that is the recipe's own, without the name of its host."""
    said = [line.partition("recipe: ")[2] for line in printed.splitlines() if "recipe: " in line]
    return said[-1]


def nothing_is_left(cluster: Cluster, since: float) -> None:
    """By then; a host that is cut off ends its ranks by itself."""
    for name in cluster.names:
        left = TIMEOUT_SECONDS + MARGIN_SECONDS - (time.monotonic() - since)
        wait_until(lambda name=name: not cluster.processes(name), seconds=max(1, left))


def test_a_rank_that_is_killed(two_hosts: Cluster, tmp_path: Path) -> None:
    """Rank 0, which holds the store; that the others name another one shows the host that goes away."""
    with two_hosts.launched(*LONG, "--output", str(tmp_path)) as process:
        wait_until(lambda: steps_written(tmp_path) > 6)
        killed = time.monotonic()
        two_hosts.kill("node-0", "recipe/train.py --local_rank=0 ")
        printed = the_end(process, killed)
    assert re.match(
        r"rank 0 on node-0 ended without a word at step \d+: killed \(out of memory\?\), or the host is gone",
        last_word(printed),
    ), printed
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith(last_word(printed))
    nothing_is_left(two_hosts, killed)


@pytest.fixture
def image_config(tmp_path: Path) -> Path:
    """A config of 64 images in two classes, read by one loader process a rank, 16 a step."""
    folder = write_folder(tmp_path / "images", images=32)
    config = json.loads((ROOT / DIGITS).read_text())
    config |= {"train_batch_size": 16, "steps_per_print": 1}
    config["recipe"] |= {
        "model": {"name": "test_resnet", "num_classes": 2},
        "max_micro_batch_size": 4,
        "data": {
            "source": "imagefolder",
            "path": str(folder),
            "image_size": 32,
            "train_images": 64,
            "validation_images": 64,
            "workers": 1,
        },
        "checkpoint": {"every_steps": 1},
        "distributed": {"timeout_seconds": TIMEOUT_SECONDS},
    }
    path = tmp_path / "images.json"
    path.write_text(json.dumps(config))
    return path


def test_a_rank_that_raises(two_hosts: Cluster, tmp_path: Path, image_config: Path) -> None:
    """An image that only one of them comes to cannot be read; once it is replaced, the same command resumes."""
    output, bad = tmp_path / "run", tmp_path / "images/train/c1/7.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    arguments = ("--deepspeed_config", str(image_config), "--output", str(output), "--set=recipe.schedule.epochs=2")
    arguments += ("--set=recipe.schedule.decay_epochs=[1]", "--set=recipe.schedule.warmup_epochs=0")
    with two_hosts.launched(*arguments) as process:
        wait_until(lambda: (output / "train.log").exists())
        started = time.monotonic()
        printed = the_end(process, started)
    word = re.fullmatch(r"rank (\d) on node-(\d) failed at step \d: BadImageError: (.*)", last_word(printed))
    assert word is not None, printed
    assert word[1] == word[2]
    assert str(bad) in word[3]
    assert "Traceback" not in printed
    nothing_is_left(two_hosts, started)
    bad.write_bytes(good)
    two_hosts.train(*arguments)
    assert [event["step"] for event in events(output, "step")] == list(range(8))


def test_data_that_does_not_come(two_hosts: Cluster, tmp_path: Path, image_config: Path) -> None:
    """A pipe that nobody writes to, in the place of an image: as a file on a server that hangs."""
    output, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    with two_hosts.launched("--deepspeed_config", str(image_config), "--output", str(output)) as process:
        wait_until(lambda: (output / "train.log").exists())
        pipe.replace(tmp_path / "images/train/c1/7.jpg")  # to list a folder with a pipe is refused
        started = time.monotonic()
        printed = the_end(process, started)
    assert re.fullmatch(
        r"rank (\d) on node-\1 failed at step \d+: TimeoutError: no images from the data loader for [89] s",
        last_word(printed),
    ), printed
    nothing_is_left(two_hosts, started)


def test_a_host_that_goes_away(two_hosts: Cluster, tmp_path: Path) -> None:
    with two_hosts.launched(*LONG, "--output", str(tmp_path)) as process:
        wait_until(lambda: steps_written(tmp_path) > 6)
        cut = time.monotonic()
        with two_hosts.cut_off("node-1"):
            printed = the_end(process, cut)
    assert "rank 1 on node-1 ended without a word at step" in last_word(printed), printed
    nothing_is_left(two_hosts, cut)


def test_a_launcher_that_is_killed(two_hosts: Cluster, tmp_path: Path) -> None:
    with two_hosts.launched(*LONG, "--output", str(tmp_path), ssh="-tt") as process:
        wait_until(lambda: steps_written(tmp_path) > 6)
        killed = time.monotonic()
        two_hosts.kill("node-0", "bin/deepspeed")
        process.communicate(timeout=60)
    nothing_is_left(two_hosts, killed)
    # The ranks hear of it by a hangup of their terminals, or by the watch.
    last = (tmp_path / "train.log").read_text().splitlines()[-1]
    assert re.search(r"ended by SIG(HUP|TERM), saved after", last), last
    assert find(tmp_path / "checkpoints")[0].step == steps_written(tmp_path)
