"""Commands and environment variables for real launches on this machine."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


# The exit code is that of the last rank that failed.
START_RANKS = """
for ((rank = 0; rank < WORLD_SIZE; rank++)); do RANK=$rank LOCAL_RANK=$rank "$@" & ranks+=($!); done
for pid in "${ranks[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""


def deepspeed_command(ranks: int, script: str, *arguments: str) -> list[str]:
    """A ``deepspeed`` command from this Python environment, on a free port."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--master_port", str(_free_port()), "--num_gpus", str(ranks), script, *arguments]


def direct_command(ranks: int, script: str, *arguments: str) -> list[str]:
    """A command that starts the ranks without a launcher: ``deepspeed`` imports torch twice before it starts them."""
    python = [sys.executable, script, *arguments]
    if ranks == 1:
        return python
    return [
        "env",
        *(f"{name}={value}" for name, value in meeting_place(ranks).items()),
        "bash",
        "-c",
        START_RANKS,
        "ranks",
        *python,
    ]


def run(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to completion; return its exit code and output."""
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=False)


def run_ok(command: Sequence[str], **variables: str) -> None:
    """Run a command to completion.

    Raises:
        RuntimeError: It failed.
    """
    done = run(command, **variables)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def run_direct(*arguments: str, ranks: int, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a ``direct_command`` to completion; return its exit code and output."""
    return run(direct_command(ranks, script, *arguments), **variables)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without variables of an outer launch or pytest-xdist, and with one thread per rank."""
    inherited = {
        name: os.environ[name] for name in os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE", "COLUMNS", "LINES"}
    }
    return inherited | {"OMP_NUM_THREADS": "1"} | variables


def meeting_place(ranks: int) -> dict[str, str]:
    """Environment variables shared by all ranks on this machine: the sizes and the rendezvous address."""
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    return sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
