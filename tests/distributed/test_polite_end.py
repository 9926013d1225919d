"""SIGTERM and SIGINT: the step is finished and saved, the exit code is the signal's, and the same command resumes.

The signals come at named moments, as the kills of test_kills.py do.
"""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from benchmarks.kill_resume import Kill, Setting, difference, kill_at, launch
from recipe.checkpoints.locking import is_locked
from recipe.checkpoints.manifest import damage, find
from tests.launch import DIGITS, ROOT, SHORT, command, environment, events, train, train_ok, wait_until

pytestmark = pytest.mark.slow


# Each with the exit code. Where the group is signalled, a launcher starts the ranks, and its outermost process goes by
# the signal; the ranks end politely all the same.
SIGNALS = {
    Kill("window", 5, "1", "TERM"): 143,
    Kill("validation", 2, "0", "INT"): 130,
    Kill("checkpoint", 1, "0", "TERM"): 143,
    Kill("step", 4, "group", "INT"): -signal.SIGINT,
}


def test_a_signal_ends_the_run_after_the_step_and_loses_nothing(tmp_path: Path) -> None:
    setting = Setting(2, "fp32", workers=1, image_size=8)
    reference, output = tmp_path / "undisturbed", tmp_path / "run"

    def start(folder: Path, kill: Kill | None) -> int:
        arguments = (*setting.arguments, "--output", str(folder))
        return train(*arguments, ranks=2, script="benchmarks/killed_train.py", KILL_AT=kill_at(kill)).returncode

    assert start(reference, None) == 0
    steps_done = 0
    for kill, exit_code in SIGNALS.items():
        assert (launch(setting, output, kill) if kill.who == "group" else start(output, kill)) == exit_code, kill
        assert not (output / "summary.json").exists()
        written = [event["step"] for event in events(output, "step")]
        newest = find(output / "checkpoints")[0]
        assert newest.step == written[-1] + 1, kill
        assert newest.step >= steps_done, kill
        steps_done = newest.step
        assert "ended by SIG" in (output / "train.log").read_text().splitlines()[-1]
    assert start(output, None) == 0
    assert difference(output, reference) is None


def test_one_ctrl_c_in_a_long_step_saves_it_whoever_goes_before_it_is_done(tmp_path: Path) -> None:
    """Of the group that gets SIGINT the launcher ends at once, and so does the reader of a pipe; a step lasts longer
    than the time in which two signals are one.
    """
    output = tmp_path / "run"
    long = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=recipe.data.image_size=112")
    words = shlex.join(["-q", *command(*long, "--set=recipe.max_micro_batch_size=4", launcher=True)[1:]])
    launch = f"cd {ROOT} && {command(launcher=True)[0]} {words} 2>&1 | tee {tmp_path}/printed"
    with subprocess.Popen(["bash", "-c", launch], env=environment(), start_new_session=True) as group:
        wait_until(lambda: (output / "metrics.jsonl").exists() and len(events(output, "step")) == 1)
        os.killpg(group.pid, signal.SIGINT)
        group.wait(timeout=60)
    wait_until(lambda: not is_locked(output))
    done = len(events(output, "step"))
    assert f"ended by SIGINT, saved after {done} of 6 steps" in (output / "train.log").read_text().splitlines()[-1]
    assert [(checkpoint.step, damage(checkpoint)) for checkpoint in find(output / "checkpoints")] == [(done, None)]


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    """Six thousandths of a second: every step is followed by one, those at the end of an epoch by the validation's."""
    arguments = ("--deepspeed_config", DIGITS, *SHORT, "--set=recipe.checkpoint.keep_last=100")
    train_ok(*arguments, "--output", str(tmp_path / "clock"), "--set=recipe.checkpoint.every_minutes=0.0001", ranks=2)
    train_ok(*arguments, "--output", str(tmp_path / "epochs"), ranks=2)
    assert [checkpoint.step for checkpoint in find(tmp_path / "clock/checkpoints")] == [6, 5, 4, 3, 2, 1]
    assert [checkpoint.step for checkpoint in find(tmp_path / "epochs/checkpoints")] == [6, 4, 2]


def test_a_run_outlives_who_reads_its_output(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any("top-1" in line for line in process.stdout)
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=300) == 0
    assert (tmp_path / "summary.json").exists()
    assert len(events(tmp_path, "validation")) == 3


def test_ranks_whose_launcher_goes_while_they_start_end_too(tmp_path: Path) -> None:
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
            # They have looked for their launcher by then, and import torch for many seconds more.
            wait_until(lambda: "Plan of" in Path(log.name).read_text())
            assert not list(tmp_path.glob("metrics.jsonl"))
            launcher.kill()
            launcher.wait()
            wait_until(lambda: not ranks())
        finally:
            for pid in ranks():
                os.kill(pid, signal.SIGKILL)
    assert "ended by SIGTERM, saved after" in (tmp_path / "train.log").read_text()
