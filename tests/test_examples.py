"""The examples for schedulers, as far as they can be tried without one; ``multinode/`` runs them on hosts."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.config.schema import read_config
from recipe.plan.plan import make_plan
from recipe.train import parse_arguments

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SBATCH = EXAMPLES / "slurm.sbatch"


@pytest.mark.parametrize("name", ["slurm.sbatch", "k8s-pytorchjob.yaml"])
def test_the_head_says_where_it_has_not_run(name: str) -> None:
    head = re.match(r"(#.*\n)+", (EXAMPLES / name).read_text())
    assert head is not None
    assert "Not run on a cluster" in head[0]


# Slurm


@pytest.mark.parametrize("lint", [["bash", "-n"], ["shellcheck"]], ids=["bash", "shellcheck"])
def test_the_batch_script_is_clean(lint: list[str]) -> None:
    if shutil.which(lint[0]) is None:
        pytest.skip(f"needs {lint[0]} (apt-get install)")
    done = subprocess.run([*lint, str(SBATCH)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_batch_script_asks_for_a_task_a_gpu_before_its_first_command() -> None:
    head, _, rest = SBATCH.read_text().partition("\nset -u\n")
    assert "#SBATCH" not in rest, "Slurm reads no options behind the first command"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert {"requeue", "open-mode", "signal"} <= asked.keys()
    config = re.search(r"ds_configs/\S+", head)
    assert config is not None
    make_plan(read_config(ROOT / config[0]), int(asked["nodes"]) * int(asked["ntasks-per-node"]))


@pytest.mark.parametrize(
    ("srun_code", "output_argument", "is_complete", "is_requeued"),
    [
        (143, "--output {}", False, True),
        (143, "--output={}", False, True),
        (143, "--output {}", True, False),
        (143, "--output={}", True, False),
        (143, "", False, True),
        (1, "--output {}", False, False),
        (2, "--output {}", False, False),
        (0, "--output {}", True, False),
    ],
)
def test_the_batch_script_requeues_what_was_told_to_end(
    tmp_path: Path, srun_code: int, output_argument: str, is_complete: bool, is_requeued: bool
) -> None:
    """With programs in the place of Slurm's that note what they are called with."""
    for name, code in (("srun", srun_code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*"\nexit {code}\n')
        program.chmod(0o755)
    output = tmp_path / "out put"
    if is_complete:
        output.mkdir()
        (output / "summary.json").touch()
    words = [word.format(output) for word in output_argument.split()]
    done = subprocess.run(
        ["bash", str(SBATCH), "ds_configs/c.json", "--data", "d", *words],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12345", "SLURMD_NODENAME": "node-0"},
        capture_output=True,
        text=True,
        check=False,
    )
    called = done.stdout.splitlines()
    passed_on = " ".join(["recipe/train.py --deepspeed_config ds_configs/c.json --data d", *words])
    assert called[0].startswith("srun ")
    assert called[0].endswith(passed_on)
    assert called[1:] == (["scontrol requeue 12345"] if is_requeued else [])
    assert done.returncode == (0 if is_requeued else srun_code)
    assert done.stderr == ""


# Kubernetes


@pytest.fixture
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / "k8s-pytorchjob.yaml").read_text())
    assert (loaded["apiVersion"], loaded["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    return loaded["spec"]


@pytest.fixture
def pod(job: dict[str, Any]) -> dict[str, Any]:
    assert list(job["pytorchReplicaSpecs"]) == ["Worker"], "with an elastic policy there is no master"
    return job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    assert only["name"] == "pytorch", "the operator knows its container by this name"
    return only


def test_the_pods_run_a_command_that_the_recipe_takes(job: dict[str, Any], container: dict[str, Any]) -> None:
    assert container["command"] == ["torchrun"], "the first process, which gets SIGTERM, must pass it on"
    script, *rest = container["args"]
    assert (ROOT / script).is_file()
    arguments = parse_arguments(rest)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["nprocPerNode"] == str(gpus)
    replicas = job["pytorchReplicaSpecs"]["Worker"]["replicas"]
    elastic = job["elasticPolicy"]
    assert elastic["minReplicas"] <= replicas <= elastic["maxReplicas"]
    for pods in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        make_plan(read_config(ROOT / arguments.deepspeed_config), pods * gpus)


def test_data_runs_and_shared_memory_are_mounted(pod: dict[str, Any], container: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    arguments = parse_arguments(container["args"][1:])
    assert mounts[f"/{Path(arguments.data).parts[1]}"]["readOnly"]
    runs = mounts[f"/{arguments.output.parts[1]}"]
    assert "readOnly" not in runs
    assert "persistentVolumeClaim" in volumes[runs["name"]], "what is to be resumed outlives the pods"


def test_the_ranks_are_killed_neither_early_nor_by_the_kubelet(
    job: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]
) -> None:
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert all(isinstance(value, str) for value in variables.values()), "Kubernetes takes no numbers"
    patience = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 < patience < pod["terminationGracePeriodSeconds"]
    assert job["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "OnFailure"
    assert job["runPolicy"]["backoffLimit"] > 0


# DeepSpeed's environment file


def test_deepspeed_reads_each_line_of_the_environment_file() -> None:
    from deepspeed.launcher.multinode_runner import OpenMPIRunner
    from deepspeed.launcher.runner import parse_args

    runner = OpenMPIRunner(parse_args(["script.py"]), "", {"node-0": 1})
    runner.exports.clear()
    with (EXAMPLES / "deepspeed_env").open() as file:
        for line in file.readlines():  # as deepspeed.launcher.runner.main does
            key, value = line.split("=", maxsplit=1)
            runner.add_export(key, value)
    assert runner.exports == {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
