"""A signal before or after training ends the process at once; printing survives the loss of its reader.

Signals during training are in test_polite_end.py and tests/checkpoints/test_kills.py.
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
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # in case the tests run under nohup
listen()
try:
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    time.sleep(10)
except BaseException:  # as a library may do during its import
    print("survived", flush=True)
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signal_before_training_ends_the_process_even_if_exceptions_are_caught(name: str, exit_code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr == f"recipe: {name}: ended at once; the same command resumes\n"


def test_message_replaces_a_progress_bar_and_is_wrapped_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_printing_survives_the_loss_of_its_reader(tmp_path: Path) -> None:
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
