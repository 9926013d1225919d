"""Command line and environment of a real launch on this machine."""

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def deepspeed_command(ranks: int, script: str, *arguments: str) -> list[str]:
    """``deepspeed`` of this Python's environment, on a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--master_port", str(port), "--num_gpus", str(ranks), script, *arguments]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what an outer launch may have left, one thread a rank."""
    inherited = {name: os.environ[name] for name in os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    return inherited | {"OMP_NUM_THREADS": "1"} | variables
