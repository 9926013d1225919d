"""Starts runs on the hosts of ``hosts.py`` as a person does: by the ``deepspeed`` CLI on the first of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, environment
from tests.multinode.hosts import Hosts

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
KEEPALIVE = "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"


class Cluster(Hosts):
    """Hosts with a home folder of their own, in which ``.deepspeed_env`` lies, and a place for hostfiles."""

    def __init__(self, folder: Path, count: int) -> None:
        (folder / "home").mkdir(parents=True)
        (folder / "hosts").mkdir()
        super().__init__(folder / "hosts", count)
        self.home = folder / "home"
        # What all ranks get; the launcher's environment itself stays where it is.
        (self.home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")

    @contextmanager
    def launched(
        self,
        *arguments: str,
        hosts: Sequence[str] = (),
        slots: int = 1,
        options: Sequence[str] = (),
        script: str = "recipe/train.py",
        ssh: str = KEEPALIVE,
    ) -> Iterator[subprocess.Popen[str]]:
        """A run that has been started on some of the hosts, or on all; ended, if need be, when ``with`` ends."""
        hostfile = self.hostfile(self.home / "hostfile", hosts, slots)
        command = [DEEPSPEED, "--hostfile", str(hostfile), *options, script, *arguments]
        with self.started(command, on=(hosts or self.names)[0], PDSH_SSH_ARGS_APPEND=ssh) as process:
            yield process

    @contextmanager
    def started(self, command: Sequence[str], on: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """A command that has been started on a host; its stderr comes with its stdout."""
        process = subprocess.Popen(
            self.inside(on, command),
            cwd=ROOT,
            env=environment(HOME=str(self.home), **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def train(self, *arguments: str, **launch: Any) -> str:
        """Train to the end, launched as ``launched`` says; return what was printed."""
        with self.launched(*arguments, **launch) as process:
            printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        return printed


def steps_written(output: Path) -> int:
    """Lines of steps in ``metrics.jsonl`` so far."""
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count('"event": "step"') if metrics.exists() else 0
