"""Starts real training runs, with the ``deepspeed`` CLI or as bare ranks, and reads their output."""

import atexit
import fcntl
import functools
import json
import os
import pty
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, deepspeed_command, direct_command, environment, meeting_place
from tests.ranks import fork

__all__ = ["ROOT", "environment"]

DIGITS = "ds_configs/digits_b512.json"
SIX_STEPS = (
    "--set=recipe.schedule.epochs=3",
    "--set=recipe.schedule.warmup_epochs=1",
    "--set=recipe.schedule.decay_epochs=[2]",
    # With seed 0, two maxima of the first max-pooling are different pixels in fp32 and fp64.
    "--set=recipe.seed=1",
)  # of the digits config
SHORT = (*SIX_STEPS, "--set=recipe.data.image_size=16")


def command(*arguments: str, ranks: int = 1, launcher: bool = False, script: str = "recipe/train.py") -> list[str]:
    """The command line of a run on ``ranks`` ranks, with ``deepspeed`` or without a launcher."""
    return (deepspeed_command if launcher else direct_command)(ranks, script, *arguments)


def train(
    *arguments: str, ranks: int = 1, launcher: bool = False, script: str = "recipe/train.py", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; return exit code and output. Without the launcher, ranks are forks that have torch imported."""
    if launcher:
        words = command(*arguments, ranks=ranks, launcher=True, script=script)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(
            words, cwd=ROOT, env=environment(**variables), start_new_session=True, **pipes
        ) as process:
            try:
                output, errors = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks, too, or they would slow the tests that follow
                raise
        return subprocess.CompletedProcess(words, process.returncode, output, errors)
    return forked(run_script, [script, *arguments], ranks, variables)


def module(
    name: str, *arguments: str, ranks: int = 1, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m name`` to the end, in forks that have torch imported."""
    return forked(functools.partial(_run_module, cwd), [name, *arguments], ranks, variables)


recipe = functools.partial(module, "recipe")


def forked(
    function: Callable[[list[str]], object],
    words: list[str],
    ranks: int = 1,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``function(words)`` on every rank to the end; return exit code and output as for a program."""
    of_all = environment(**(meeting_place(ranks) if ranks > 1 else {}) | dict(variables or {}))
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(fork(Path(folder, str(rank)), of_all | own, function, words))
        try:
            for process in processes:
                process.join(300)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        stdout, stderr = (
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{stream}")))
            for stream in ("stdout", "stderr")
        )
    return subprocess.CompletedProcess(words, failed[-1] if failed else 0, stdout, stderr)


def run_script(words: list[str]) -> None:
    """Run the script ``words[0]`` with these arguments, as Python would."""
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _run_module(cwd: Path, words: list[str]) -> None:
    os.chdir(cwd)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def train_ok(
    *arguments: str, ranks: int = 1, launcher: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``train``, asserting that the run completes."""
    done = train(*arguments, ranks=ranks, launcher=launcher, **variables)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for a condition that other processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.1)


def open_terminal(columns: int) -> tuple[int, int]:
    """A terminal of that width: the descriptor to read its screen from, and the one that programs write to."""
    screen, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    return screen, side


def shown_on(screen: int) -> str:
    """Everything written to a terminal until the last program has closed it."""
    shown = b""
    with suppress(OSError):  # how Linux reports that the other side is closed
        while chunk := os.read(screen, 65536):
            shown += chunk
    os.close(screen)
    return shown.decode()


def complete_run(output: Path) -> str:
    """Copy a complete run of ``SHORT``, with its newest two checkpoints and the best; return what it printed."""
    run, printed = _short_run()
    shutil.copytree(run, output, dirs_exist_ok=True)
    return printed


@functools.cache
def _short_run() -> tuple[Path, str]:
    output = Path(tempfile.mkdtemp(), "run")
    atexit.register(shutil.rmtree, output.parent)
    return output, train_ok("--deepspeed_config", DIGITS, "--output", str(output), *SHORT).stdout


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, "step" or "validation", in ``metrics.jsonl``."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(output: Path) -> list[float]:
    """The training loss of every step."""
    return [event["loss"] for event in events(output, "step")]
