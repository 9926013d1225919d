"""A signal before training, or after it, ends the process at once; what a launch in training does stands in
test_polite_end.py.
"""

import subprocess
import sys

import pytest

from tests.launch import ROOT

PROGRAM = """
import atexit, os, signal, sys, time
from recipe.interruption import Interrupted, end_at_once
end_at_once()
signum = signal.Signals[sys.argv[1]]
# The launcher passes on what the whole group has got.
atexit.register(os.kill, os.getpid(), signum)
try:
    os.kill(os.getpid(), signum)
    time.sleep(10)
except Interrupted as end:
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_comes_again_while_the_process_ends_changes_nothing(name: str, exit_code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == exit_code
    assert done.stderr == f"recipe: {name}: ended at once; the same command goes on\n"
