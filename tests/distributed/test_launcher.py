"""The launcher's command line is found among the processes above, and compared with what it started."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.config.reader import ConfigError
from recipe.distributed.launcher import Command, check_ranks, find_command, is_this_machine
from tests.launch import DIGITS, ROOT, environment

CHILD = (
    "from recipe.distributed.launcher import find_command; command = find_command(); "
    "print((command.pid, command.arguments))"
)


def launch(folder: Path, *arguments: str) -> Command:
    return Command(1, (*arguments, "train.py"), folder)


def test_the_command_is_found_above(tmp_path: Path) -> None:
    """Through the process between, and with what comes before the launcher's name and behind the script's."""
    command = tmp_path / "deepspeed"
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
    command.write_text(
        "import os, subprocess, sys\nprint(os.getpid(), flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {between!r}])"
    )
    arguments = ["--hostfile", "nodes", "--num_gpus", "3", "train.py", "--hostfile", "the script's own"]
    done = subprocess.run(
        [sys.executable, "-u", str(command), *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pid, *_, found = done.stdout.splitlines()
    assert found == f"({pid}, {tuple(arguments)})"


def test_without_the_launcher_nothing_is_known() -> None:
    assert find_command() is None


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "cluster").write_text("a slots=1\n")
    with pytest.raises(ConfigError) as caught:
        check_ranks(launch(tmp_path, "--hostfile", "clutser"), 1)
    message = str(caught.value)
    assert message.startswith(
        "clutser: no such file or directory; DeepSpeed passes that over and trains on this machine"
    )
    assert f"did you mean {tmp_path / 'cluster'}?" in message


@pytest.mark.parametrize("arguments", [(), ("--no such option",)])
def test_without_a_hostfile_and_in_another_program_nothing_is_checked(tmp_path: Path, arguments: tuple) -> None:
    check_ranks(launch(tmp_path, *arguments), 4)


@pytest.mark.parametrize(
    ("text", "filters", "world_size", "message"),
    [
        ("a slots=2\nb slots=2\n", "", 4, None),
        (
            "a slots=2\nb slots=2\n",
            "--num_gpus=1",
            2,
            "4 slots on 2 hosts, but DeepSpeed started 2 ranks, by --num_gpus 1",
        ),
        ("a slots=2\nb slots=2\n", "", 1, "4 slots on 2 hosts, but DeepSpeed started 1 rank; "),
        ("a slots=2\nb slots=2x\n", "", 4, 'line 2 = "b slots=2x": not a host and its slots'),
        ("localhost slots=2\n", "", 2, None),
        ("me@localhost slots=2\n", "", 2, None),
        ("192.0.2.7 slots=2\n", "", 2, "its only host, 192.0.2.7, is another machine than this one"),
        ("192.0.2.7 slots=2\n", "--force_multi", 2, None),
    ],
)
def test_ranks_are_those_of_the_hostfile(
    tmp_path: Path, text: str, filters: str, world_size: int, message: str | None
) -> None:
    (tmp_path / "cluster").write_text(text)
    command = launch(tmp_path, "--hostfile=cluster", *filters.split())
    if message is None:
        check_ranks(command, world_size)
        return
    with pytest.raises(ConfigError) as caught:
        check_ranks(command, world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        (socket.gethostname(), True),
        ("192.0.2.7", False),
        ("a.invalid", False),
    ],
)
def test_this_machine(host: str, here: bool) -> None:
    assert is_this_machine(host) is here


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--hostfile", "hostfiles/nowhere"],
            "recipe: hostfiles/nowhere: no such file or directory; DeepSpeed passes that",
        ),
        (
            ["--hostfile", "hostfiles/localhost", "--num_gpus", "2"],
            "recipe: hostfiles/localhost: 1 slots on 1 hosts, but",
        ),
    ],
)
def test_a_launch_that_is_not_what_the_hostfile_says(tmp_path: Path, options: list[str], message: str) -> None:
    # There may be no sshd here.
    without_ssh = ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    command = [str(Path(sys.executable).with_name("deepspeed")), *options, *without_ssh, "recipe/train.py"]
    done = subprocess.run(
        [*command, "--deepspeed_config", DIGITS, "--output", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
