"""A signal before training, or after it, ends the process at once; what a launch in training does stands in
test_polite_end.py.
"""

import subprocess
import sys

import pytest

from tests.launch import ROOT

PROGRAM = """
import os, signal, sys, time
from recipe.distributed.signals import end_at_once
end_at_once()
try:
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    time.sleep(10)
except BaseException:  # as in the import of a library, which takes it for a failure of its own
    print("lived on", flush=True)
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_before_training_ends_the_process_whoever_catches_exceptions(name: str, exit_code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr == f"recipe: {name}: ended at once; the same command goes on\n"
