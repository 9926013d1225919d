"""Other launchers than pdsh start the same run: each rank knows its place, and the losses are those of pdsh's."""

import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.launch import DIGITS, ROOT, SHORT, losses
from tests.multinode.cluster import DEEPSPEED, Cluster

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

TRAINING = (f"--deepspeed_config={DIGITS}", *SHORT)
OPENMPI = ("--launcher", "openmpi", "--launcher_args=--allow-run-as-root --bind-to none")
needs_openmpi = pytest.mark.skipif(shutil.which("ompi_info") is None, reason="needs openmpi-bin (apt-get install)")


@pytest.fixture(scope="module")
def expected(two_hosts: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    output = tmp_path_factory.mktemp("pdsh")
    printed = two_hosts.train(*TRAINING, "--output", str(output))
    assert "2 ranks of 2 hosts on CPU" in printed
    return losses(output)


def run(cluster: Cluster, *command: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of a command on the first host."""
    with cluster.started(command, on="node-0", **variables) as process:
        printed, _ = process.communicate(timeout=120)
    return process.returncode, printed


@needs_openmpi
def test_openmpi(two_hosts: Cluster, tmp_path: Path, expected: list[float]) -> None:
    """With the example's environment file, and in it where the ranks meet."""
    variables = tmp_path / "deepspeed_env"
    example = (ROOT / "examples/deepspeed_env").read_text()
    variables.write_text(example + f"MASTER_ADDR={two_hosts.address('node-0')}\nMASTER_PORT=29511\n")
    hostfile = two_hosts.hostfile(tmp_path / "hostfile")
    output = tmp_path / "run"
    command = (DEEPSPEED, "--hostfile", str(hostfile), *OPENMPI, "recipe/train.py", *TRAINING, "--output", str(output))
    code, printed = run(two_hosts, *command, DS_ENV_FILE=str(variables))
    assert code == 0, printed
    assert "2 ranks of 2 hosts on CPU" in printed
    assert losses(output) == expected


def test_the_command_of_the_kubernetes_example(two_hosts: Cluster, tmp_path: Path, expected: list[float]) -> None:
    """Its arguments but config, data and output; the variables as Kubeflow's operator derives them from the example."""
    spec = yaml.safe_load((ROOT / "examples/k8s-pytorchjob.yaml").read_text())["spec"]
    (container,) = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    (program,) = container["command"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]} | {
        "PET_RDZV_BACKEND": spec["elasticPolicy"]["rdzvBackend"],
        "PET_RDZV_ENDPOINT": "node-0:23456",
        "PET_MAX_RESTARTS": str(spec["elasticPolicy"]["maxRestarts"]),
        "PET_NNODES": "2:2",
        "PET_NPROC_PER_NODE": "1",
    }
    torchrun = str(Path(sys.executable).with_name(program))
    command = (torchrun, container["args"][0], *TRAINING, f"--output={tmp_path}")
    with ExitStack() as pods:
        processes: list[subprocess.Popen[str]] = [
            pods.enter_context(two_hosts.started(command, on=name, **variables)) for name in two_hosts.names
        ]
        printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    # Which host has rank 0 is torchrun's choice.
    assert sum("2 ranks of 2 hosts on CPU" in text for text in printed) == 1
    assert losses(tmp_path) == expected
