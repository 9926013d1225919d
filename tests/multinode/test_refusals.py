"""What would silently go wrong on several hosts ends on all of them, at once, with one message and exit code 2."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT
from tests.multinode.cluster import Cluster

pytestmark = [pytest.mark.multinode, pytest.mark.slow]


def refusal(cluster: Cluster, output: Path, *arguments: str, **launch: Sequence[str]) -> str:
    """The message of a launch that is refused, on every rank."""
    with cluster.launched("--deepspeed_config", DIGITS, "--output", str(output), *arguments, **launch) as process:
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


def test_ranks_with_other_code(two_hosts: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "scaling.py"
    other.write_text((ROOT / "recipe/plan/scaling.py").read_text() + "# changed\n")
    with two_hosts.covered("node-1", ROOT / "recipe/plan/scaling.py", by=other):
        message = refusal(two_hosts, tmp_path / "run")
    assert message.startswith("rank 1 on node-1 and rank 0 on node-0 run different code of recipe/; ")


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


def test_a_single_host_that_is_another_machine(two_hosts: Cluster, tmp_path: Path) -> None:
    """DeepSpeed would train here."""
    hostfile = two_hosts.hostfile(tmp_path / "elsewhere", ["node-1"])
    message = refusal(two_hosts, tmp_path / "run", options=["--hostfile", str(hostfile)])
    assert message.startswith(f"{hostfile}: its only host, node-1, is another machine than this one, node-0")


def test_a_filter_that_leaves_other_ranks(two_hosts: Cluster, tmp_path: Path) -> None:
    started = "2 slots on 2 hosts, but DeepSpeed started 4 ranks, by --num_gpus 2; "
    assert started in refusal(two_hosts, tmp_path / "run", options=["--num_gpus", "2"])
