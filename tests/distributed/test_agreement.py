"""Signals and clocks, on real ranks: what one of them gets, all know after the step; a second signal ends at once."""

import os
import pty
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from recipe.distributed.agreement import SAME_REQUEST_SECONDS, Requests
from recipe.distributed.signals import Interrupted
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TIMEOUT = timedelta(seconds=60)


def _signalled(rank: int, world_size: int, signum: int) -> list[tuple[int, bool]]:
    agreed = []
    with Requests(None, TIMEOUT) as requests:
        loader = os.fork()  # it holds a copy of all that is open here
        if loader == 0:
            time.sleep(600)
            os._exit(0)
        for step in range(4):
            if (rank, step) == (1, 2):
                os.kill(os.getpid(), signum)
                time.sleep(0.5)  # the signal is another thread's to take
            agreed.append(requests.agree())
    os.kill(loader, signal.SIGKILL)
    os.waitpid(loader, 0)
    return agreed


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_all_ranks_learn_of_a_signal_to_one_after_the_same_step(signum: int) -> None:
    assert run_ranks(2, _signalled, signum) == [[(0, False), (0, False), (signum, False), (signum, False)]] * 2


def _clocked(rank: int, world_size: int) -> list[bool]:
    """Rank 1's clock asks at once and always, rank 0's when it has slept."""
    due = []
    with Requests(timedelta(seconds=0 if rank else 1), TIMEOUT) as requests:
        for pause in (0, 1.1, 0):
            time.sleep(pause)
            due.append(requests.agree()[1])
        requests.saved()
        due.append(requests.agree()[1])
    return due


def test_rank_0s_clock_asks_for_checkpoints() -> None:
    assert run_ranks(2, _clocked) == [[False, True, True, False]] * 2


def _watched(rank: int, world_size: int) -> list[int]:
    seen: list[int] = []
    with Requests(None, TIMEOUT) as requests:
        try:
            for item in requests.watched(range(5)):
                seen.append(item)
                if (rank, item) == (0, 1):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.5)
        except Interrupted as end:
            seen.append(end.exit_code)
    return seen


def test_a_signal_ends_a_validation_between_the_same_batches_on_all_ranks() -> None:
    assert run_ranks(2, _watched) == [[0, 1, 143]] * 2


PROGRAM = """
from recipe.distributed.signals import listen, outlive_readers
listen()
outlive_readers()
import ctypes, os, sys, threading
import torch
from datetime import timedelta
from recipe.distributed import agreement
from recipe.distributed.agreement import Requests
from recipe.engine.start import join_process_group
agreement.LAUNCHER_LIVES_SECONDS = 1.0
launchers = {os.getppid(): os.pidfd_open(os.getppid())} if "launched" in sys.argv else {}
threading.Thread(target=lambda: [os.kill(os.getpid(), 15) for _ in sys.stdin], daemon=True).start()
join_process_group(torch.device("cpu"), timedelta(seconds=60))
with Requests(None, timedelta(seconds=60), launchers) as requests:
    print("ready", flush=True)
    # As in a collective whose other ranks are gone: this thread comes back from C for no signal.
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_the_process_at_once_wherever_it_is() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        for _ in range(2):  # Ctrl-C comes twice: from the terminal and from the launcher
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        ended_early = process.poll() is not None
        time.sleep(SAME_REQUEST_SECONDS)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert not ended_early
    assert process.returncode == 143
    assert "SIGINT: finishing this step, then saving; a second signal ends the run at once" in stderr
    assert "rank 0: a second signal, SIGTERM: ended at once" in stderr


@pytest.mark.parametrize(("again", "exit_code"), [("INT", 130), ("TERM", 143)])
def test_what_the_launcher_passes_on_and_the_watch_says_is_no_second_signal(again: str, exit_code: int) -> None:
    words = [sys.executable, "-c", PROGRAM, "launched"]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        time.sleep(SAME_REQUEST_SECONDS + 0.5)
        process.send_signal(signal.SIGTERM)  # this test is the launcher
        process.stdin.write("the program sends one to itself\n")
        process.stdin.flush()
        time.sleep(1)
        assert process.poll() is None
        subprocess.run(["bash", "-c", f"kill -{again} {process.pid}; true"], check=True)
        assert process.wait(timeout=60) == exit_code


LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], "launched"], stdout=subprocess.PIPE, text=True)
while rank.stdout.readline() != "ready\\n":
    pass
print(rank.pid, flush=True)
rank.terminate()
time.sleep(20)
rank.kill()
"""


def test_a_step_that_takes_longer_than_the_launcher_waits_outlives_it() -> None:
    """DeepSpeed's launcher kills after 30 s what has not ended by its SIGTERM; here both are faster."""
    words = [sys.executable, "-c", LAUNCHER, PROGRAM, "deepspeed.launcher.launch"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        try:
            assert launcher.wait(timeout=60) == -signal.SIGKILL
            os.kill(rank, 0)  # it is there
        finally:
            os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_end_by_a_signal_is_no_failure(signum: signal.Signals, exit_code: int) -> None:
    assert Interrupted(signum).exit_code == exit_code
    assert not isinstance(Interrupted(signum), Exception)


AT_A_TERMINAL = """
from recipe.distributed.signals import listen, outlive_readers
listen()
outlive_readers()
import os, sys, time
import torch
from datetime import timedelta
from pathlib import Path
from recipe.distributed.agreement import Requests
from recipe.engine.start import join_process_group
join_process_group(torch.device("cpu"), timedelta(seconds=60))
with Requests(None, timedelta(seconds=60)) as requests:
    print("ready", flush=True)
    for _ in range(100):
        signum, _ = requests.agree()
        if signum:
            break
        time.sleep(0.1)
    print("what a step prints, and a bar", flush=True)
    print("what the watch says", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(str(signum))
"""


def ended_with_the_terminal(answer: Path) -> str:
    """What the program answers when its terminal goes away."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL, str(answer)])
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        shown = b""
        # To the end of the line: the kernel may pass on "ready" first, and a terminal that goes away within a write
        # makes that write fail.
        while b"ready\r\n" not in shown:
            shown += screen.read(1000)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
    return answer.read_text()


def test_a_hangup_asks_for_the_end_and_takes_the_screen_along(tmp_path: Path) -> None:
    assert ended_with_the_terminal(tmp_path / "answer") == str(int(signal.SIGHUP))


def test_who_is_told_of_a_hangup_and_then_to_end_has_been_told_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        for signum in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(signum)
            time.sleep(SAME_REQUEST_SECONDS + 0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143


NOHUP = """
import os, signal
from recipe.distributed.signals import heeded, listen
listen()
os.kill(os.getpid(), signal.SIGHUP)
print(*(s.name for s in heeded()))
"""


def test_under_nohup_a_hangup_asks_for_nothing() -> None:
    done = subprocess.run(
        ["nohup", sys.executable, "-c", NOHUP], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "SIGINT SIGTERM\n"
