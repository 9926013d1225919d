"""Real launches that are signalled: the step is finished and saved, and the exit code is the signal's.

Signals at named moments are in tests/checkpoints/test_kills.py.
"""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from recipe.checkpoints.locking import is_locked
from recipe.checkpoints.manifest import damage, find
from tests.launch import DIGITS, ROOT, SHORT, command, environment, events, wait_until

pytestmark = pytest.mark.slow


def test_ctrl_c_in_a_long_step_saves_it(tmp_path: Path) -> None:
    """Of the process group that gets SIGINT, the launcher and the reader of the pipe end at once. The step takes longer
    than the time within which two signals count as one.
    """
    output = tmp_path / "run"
    long = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=recipe.data.image_size=112")
    words = shlex.join(["-q", *command(*long, "--set=recipe.max_micro_batch_size=4", launcher=True)[1:]])
    launch = f"cd {ROOT} && {command(launcher=True)[0]} {words} 2>&1 | tee {tmp_path}/printed"
    with subprocess.Popen(["bash", "-c", launch], env=environment(), start_new_session=True) as group:
        wait_until(lambda: (output / "metrics.jsonl").exists() and len(events(output, "step")) >= 1)
        os.killpg(group.pid, signal.SIGINT)
        group.wait(timeout=60)
    wait_until(lambda: not is_locked(output))
    done = len(events(output, "step"))
    assert f"ended by SIGINT, saved after {done} of 6 steps" in (output / "train.log").read_text().splitlines()[-1]
    assert [(checkpoint.step, damage(checkpoint)) for checkpoint in find(output / "checkpoints")] == [(done, None)]


def test_ranks_end_if_their_launcher_is_killed_while_they_start(tmp_path: Path) -> None:
    def ranks() -> list[int]:
        found = subprocess.run(
            ["pgrep", "-f", f"recipe/train.py --local_rank=. .*{tmp_path}"], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]

    long = ("--set=recipe.schedule.epochs=1000", "--set=recipe.data.image_size=8")
    words = command("--deepspeed_config", DIGITS, "--output", str(tmp_path), *long, ranks=2, launcher=True)
    log = tmp_path.with_suffix(".printed").open("w")
    with log, subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log) as launcher:
        try:
            # By then they have found their launcher, and are importing torch.
            wait_until(lambda: "Plan of" in Path(log.name).read_text())
            assert not list(tmp_path.glob("metrics.jsonl"))
            launcher.kill()
            launcher.wait()
            wait_until(lambda: not ranks(), seconds=600)  # those that import torch on a busy machine
        finally:
            for pid in ranks():
                os.kill(pid, signal.SIGKILL)
    assert "ended by SIGTERM, saved after" in (tmp_path / "train.log").read_text()
