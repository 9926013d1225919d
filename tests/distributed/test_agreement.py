"""Requests by signals and by the clock. Runs that are signalled are tested in tests/checkpoints/test_kills.py."""

import ctypes
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from recipe.distributed import agreement
from recipe.distributed.agreement import SAME_REQUEST_SECONDS, Requests
from recipe.distributed.launcher import open_process
from recipe.distributed.signals import listen, outlive_readers
from recipe.engine.start import join_process_group
from tests.launch import ROOT, environment, wait_until
from tests.ranks import fork, run_ranks

TIMEOUT = timedelta(seconds=60)


def _clocked(rank: int, world_size: int) -> list[bool]:
    """Rank 1's clock always asks, rank 0's after a second, which does not pass while it waits for rank 1."""
    now = 0.0
    agreement.time = SimpleNamespace(monotonic=lambda: now)
    due = []
    with Requests(timedelta(seconds=0 if rank else 1), TIMEOUT) as requests:
        for seconds in (0.5, 1.5, 1.5):
            now = seconds
            due.append(requests.agree()[1])
        requests.saved()
        due.append(requests.agree()[1])
    return due


def test_rank_0s_clock_asks_for_checkpoints() -> None:
    assert run_ranks(2, _clocked) == [[False, True, True, False]] * 2


def _held(folder: Path, launcher: int | None) -> None:
    """A rank in a step that does not end; once ``folder``/again exists it signals itself, as the watch does."""
    listen()
    outlive_readers()
    agreement.LAUNCHER_LIVES_SECONDS = 1.0
    process = None if launcher is None else open_process(launcher)
    join_process_group(torch.device("cpu"), TIMEOUT)

    def signal_itself() -> None:
        wait_until((folder / "again").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_itself, daemon=True).start()
    with Requests(None, TIMEOUT, {} if launcher is None or process is None else {launcher: process}):
        (folder / "ready").touch()
        # As in a collective whose other ranks are gone, no signal makes this thread return from C.
        c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        c.pthread_mutex_lock(mutex)
        c.pthread_mutex_lock(mutex)


def start(folder: Path, function: Callable[..., Any], *arguments: Any) -> tuple[BaseProcess, int]:
    """A rank that is ready for signals, and its process id."""
    process = fork(folder / "rank", environment(), function, folder, *arguments)
    wait_until((folder / "ready").exists)
    assert process.pid is not None
    return process, process.pid


def ask(folder: Path, pid: int, signum: signal.Signals) -> None:
    """Send a rank its first signal, and wait until it has taken it, from when on it counts the time."""
    os.kill(pid, signum)
    wait_until(lambda: f"{signum.name}: finishing" in (folder / "rank.stderr").read_text())


def exit_code(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process, pid = start(tmp_path, _held, None)
    ask(tmp_path, pid, signal.SIGINT)
    os.kill(pid, signal.SIGINT)  # Ctrl-C comes twice: from the terminal and from the launcher
    time.sleep(SAME_REQUEST_SECONDS)
    assert process.is_alive()
    os.kill(pid, signal.SIGTERM)
    assert exit_code(process) == 143
    said = (tmp_path / "rank.stderr").read_text()
    assert "SIGINT: finishing this step, then saving; a second signal ends the run at once" in said
    assert "rank 0: a second signal, SIGTERM: ended at once" in said


def test_sigterm_from_the_launcher_or_the_watch_is_not_a_second_signal(tmp_path: Path) -> None:
    process, pid = start(tmp_path, _held, os.getpid())  # this test is the launcher
    ask(tmp_path, pid, signal.SIGINT)
    time.sleep(SAME_REQUEST_SECONDS + 0.5)
    os.kill(pid, signal.SIGTERM)
    (tmp_path / "again").touch()
    time.sleep(1)
    assert process.is_alive()
    subprocess.run(["bash", "-c", f"kill -TERM {pid}; true"], check=True)
    assert exit_code(process) == 143


def test_hangup_and_sigterm_count_as_one_request(tmp_path: Path) -> None:
    process, pid = start(tmp_path, _held, None)
    for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, signum)
        time.sleep(SAME_REQUEST_SECONDS + 0.5)
    assert process.is_alive()
    os.kill(pid, signal.SIGTERM)
    assert exit_code(process) == 143


LAUNCHER = "import os, time; os.kill(int(input()), 15); time.sleep(60)"


def test_rank_in_a_long_step_kills_its_launcher(tmp_path: Path) -> None:
    """Before the launcher kills the rank, as DeepSpeed's does 30 s after its SIGTERM."""
    words = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as launcher:
        process, pid = start(tmp_path, _held, launcher.pid)
        launcher.communicate(f"{pid}\n", timeout=60)
    assert launcher.returncode == -signal.SIGKILL
    assert process.is_alive()
    process.kill()
    process.join()


def _at_a_terminal(folder: Path, terminal: str) -> None:
    os.login_tty(os.open(terminal, os.O_RDWR))
    listen()
    outlive_readers()
    join_process_group(torch.device("cpu"), TIMEOUT)
    with Requests(None, TIMEOUT) as requests:
        (folder / "ready").touch()
        signum = 0
        while not signum:
            signum, _ = requests.agree()
            time.sleep(0.1)
        print("what a step prints, and a bar", flush=True)
        print("what the watch reports", file=sys.stderr, flush=True)
        (folder / "answer").write_text(str(signum))


def test_hangup_ends_the_run_although_its_screen_is_gone(tmp_path: Path) -> None:
    screen, side = pty.openpty()
    process, _ = start(tmp_path, _at_a_terminal, os.ttyname(side))
    os.close(side)
    os.close(screen)
    assert exit_code(process) == 0
    assert (tmp_path / "answer").read_text() == str(int(signal.SIGHUP))


NOHUP = """
import os, signal
from recipe.distributed.signals import heeded, listen
listen()
os.kill(os.getpid(), signal.SIGHUP)
print(*(s.name for s in heeded()))
"""


def test_hangup_is_ignored_under_nohup() -> None:
    done = subprocess.run(
        ["nohup", sys.executable, "-c", NOHUP], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "SIGINT SIGTERM\n"
