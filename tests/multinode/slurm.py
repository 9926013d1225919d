"""A Slurm of Debian's packages on the hosts of ``hosts.py``: slurmctld and munged on the first, slurmd on each."""

import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.launch import wait_until
from tests.multinode.cluster import Cluster

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"

# A job that was requeued waits until its credentials have expired; two minutes unless told. A user's cluster kills
# what has not ended 30 s (KillWait) after it was asked to.
CONFIG = """
ClusterName=test
SlurmctldHost=node-0({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The hosts pretend to have the cores and GPUs that the example asks for; nothing is bound to them.


def missing() -> str | None:
    """Why there can be no Slurm on this machine, or None."""
    absent = [name for name in NEEDED if shutil.which(name, path=SBIN) is None]
    return f"needs slurm-wlm (apt-get install): no {', '.join(absent)}" if absent else None


class Slurm:
    """Slurm on all hosts of ``cluster``, up while ``with`` lasts. ``folder`` is an empty one of its own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        folder, cluster = self.folder, self.cluster
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(b"a key for the tests' own hosts, no secret" * 4)
        (folder / "munge.key").chmod(0o600)
        nodes = (
            f"NodeName={name} NodeAddr={cluster.address(name)} CPUs=64 Gres=gpu:8 State=UNKNOWN"
            for name in cluster.names
        )
        config = CONFIG.format(folder=folder, controller=cluster.address("node-0"), nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(config)
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        # slurmd insists on a kind of cgroups, though nothing here uses them and the hosts have none.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        try:
            files = {
                name: f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
            }
            self._start(
                "node-0", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *files.values()
            )
            wait_until((folder / "munge.socket").exists, seconds=10)
            self._start("node-0", "slurmctld", "-D", "-f", f"{folder}/slurm.conf")
            for name in cluster.names:
                self._start(name, "slurmd", "-D", "-f", f"{folder}/slurm.conf", "-N", name)
            wait_until(lambda: self.call("sinfo", "-h", "-o", "%t %D").split() == ["idle", str(len(cluster.names))], 30)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def call(self, *command: str, **variables: str) -> str:
        """What a command of Slurm's prints on the first host; it must succeed."""
        with self.cluster.started(command, on="node-0", SLURM_CONF=f"{self.folder}/slurm.conf", **variables) as process:
            printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        return printed

    def job(self, number: str) -> dict[str, Any]:
        """What Slurm knows of a job, "JobState", "Restarts" and so on."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _start(self, host: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SBIN)
        assert path is not None
        with (self.folder / f"{program}-{host}.log").open("wb") as log:
            daemon = subprocess.Popen(
                self.cluster.inside(host, [path, *arguments]), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._daemons.append(daemon)

    def _stop(self) -> None:
        # nsenter's child goes with the host's first process; here the daemons are asked to end before that.
        for daemon in reversed(self._daemons):
            for child in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
                subprocess.run(["kill", child], check=False)
        for daemon in self._daemons:
            daemon.wait(timeout=30)
