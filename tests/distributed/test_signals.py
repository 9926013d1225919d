"""A signal before training, or after it, ends the process at once; what prints outlives who reads it.

What a launch does in training stands in test_polite_end.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.distributed import say
from tests.launch import ROOT, open_terminal, shown_on

PROGRAM = """
import os, signal, sys, time
from recipe.distributed.signals import listen
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
listen()
try:
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    time.sleep(10)
except BaseException:  # as in the import of a library, which takes it for a failure of its own
    print("lived on", flush=True)
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_before_training_ends_the_process_whoever_catches_exceptions(name: str, exit_code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr == f"recipe: {name}: ended at once; the same command resumes\n"


def test_on_a_terminal_a_message_takes_the_place_of_a_bar_and_fits_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, side = open_terminal(columns=30)
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(side, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        print("━━━━ 0:01:00 left", end="", file=terminal, flush=True)
        say("SIGINT: finishing this step, then saving")
    shown = shown_on(screen).replace("\r\n", "\n")
    assert shown == "━━━━ 0:01:00 left\r\x1b[2Krecipe: SIGINT: finishing this\nstep, then saving\n"


PRINTING = """
from recipe.distributed.signals import outlive_readers
outlive_readers()
import logging, sys, traceback, warnings
from pathlib import Path
print("\\udce9", flush=True)
sys.stdin.read()
for _ in range(2):
    print("x" * 100_000, end="")
    for stream in (sys.stdout, sys.stderr):
        print("x", file=stream, flush=True)
        logging.StreamHandler(stream).emit(logging.makeLogRecord({"msg": "x"}))
    warnings.warn("x")
    traceback.print_exception(ValueError("x"))
Path(sys.argv[1]).write_text("saved")
"""


def test_whatever_prints_outlives_who_reads_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTING, str(tmp_path / "answer")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"\\udce9\n"
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "answer").read_text() == "saved"
