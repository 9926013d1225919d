"""What would silently go wrong on several hosts ends on all of them, at once, with one message and exit code 2."""

import json
from pathlib import Path

import pytest

from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT
from tests.multinode.cluster import Cluster

pytestmark = [pytest.mark.multinode, pytest.mark.slow]


def refusal(cluster: Cluster, output: Path, *arguments: str) -> str:
    """The message of a launch that is refused, on every rank."""
    with cluster.launched("--deepspeed_config", DIGITS, "--output", str(output), *arguments) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    said = [line.partition("recipe: ")[2] for line in printed.splitlines() if "recipe: " in line]
    assert len(set(said)) == 1, printed
    assert "Traceback" not in printed
    assert [cluster.processes(name) for name in cluster.names] == [[], []]
    assert not (output / "metrics.jsonl").exists()
    return said[0]


def test_ranks_with_another_config(two_hosts: Cluster, tmp_path: Path) -> None:
    config, other = tmp_path / "run.json", tmp_path / "other.json"
    config.write_text((ROOT / DIGITS).read_text())
    other.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    with two_hosts.covered("node-1", config, by=other):
        message = refusal(two_hosts, tmp_path / "run", "--deepspeed_config", str(config))
    assert message.startswith("rank 1 on node-1 and rank 0 on node-0 read different configs; ")


def test_data_that_one_host_lacks(two_hosts: Cluster, tmp_path: Path) -> None:
    data, empty = write_folder(tmp_path / "images", images=300), tmp_path / "empty"
    empty.mkdir()
    source = {"source": "imagefolder", "path": str(data), "image_size": 32}
    source |= {"train_images": 600, "validation_images": 600}
    changes = (f"--set=recipe.data={json.dumps(source)}", "--set=recipe.model.num_classes=2")
    with two_hosts.covered("node-1", data, by=empty):
        message = refusal(two_hosts, tmp_path / "run", *changes)
    assert message.startswith(f"rank 1 on node-1: {DIGITS}"), message
    assert f"{data} has no " in message, message
