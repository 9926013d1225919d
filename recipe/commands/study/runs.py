"""Runs the trainings of a study, each by the command that a person would type, until all are over or a signal comes.

How a run ended is read from its folder: a launcher's exit code proves nothing.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from recipe.checkpoints import PLAN, batchnorm_images, differing_keys, is_locked
from recipe.commands.study.file import Study, Training
from recipe.config import printable
from recipe.distributed import heeded
from recipe.plan import plan_json
from recipe.reporting import Progress, has_diverged, parse_object, read_events, read_summary, steps_done

LAUNCH_LOG = "launch.log"  # of the last launch of a run
SCRIPT = Path(__file__).parents[2] / "train.py"
REFUSED = 2  # the exit code of a run whose input was refused
POLL_SECONDS = 0.5
INSISTS_AFTER_SECONDS = 2.0  # an earlier second signal is the same Ctrl-C, passed on by another process


@dataclass(frozen=True)
class Where:
    """Where the runs take place: on a hostfile's slots, or on ``ranks`` ranks of this machine, which has ``gpus``;
    ``jobs`` runs side by side.

    Raises:
        ValueError: the jobs would have to share GPUs.
    """

    hostfile: Path | None
    ranks: int
    jobs: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.jobs > 1 and 0 < self.gpus < self.jobs * self.ranks:
            raise ValueError(
                f"--jobs {self.jobs} with --num_gpus {self.ranks} takes {self.jobs * self.ranks} GPUs, and this "
                f"machine has {self.gpus}; at most --jobs {max(1, self.gpus // self.ranks)} fits"
            )

    def launcher_arguments(self, slot: int = 0) -> list[str]:
        """Those of the run in place ``slot`` of ``jobs``, with a port and GPUs of its own: with --num_gpus each launch
        would take the first ones.
        """
        if self.hostfile is not None:
            return ["--hostfile", str(self.hostfile)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        devices = ["--num_gpus", str(self.ranks)]
        if self.jobs > 1 and self.gpus:
            own = range(slot * self.ranks, (slot + 1) * self.ranks)
            devices = ["--include", f"localhost:{','.join(map(str, own))}"]
        return ["--master_port", str(port), *devices]

    def cores_per_rank(self) -> int | None:
        """A rank's share of this machine's cores where runs are side by side; a run by itself takes them all."""
        return max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.ranks)) if self.jobs > 1 else None


def ending(folder: Path) -> Literal["complete", "diverged"] | None:
    """How the run in this folder has ended; None if it has not, so that another launch may complete it."""
    if read_summary(folder) is not None:
        return "complete"
    return None if diverged_at(folder) is None else "diverged"


def diverged_at(folder: Path) -> int | None:
    """The step whose loss ended the run in this folder, if one did."""
    steps = [event for event in read_events(folder) if event["event"] == "step"]
    if steps and has_diverged(steps[-1]["loss"], steps[-1]["skipped"], steps[-1]["loss_scale"]):
        return int(steps[-1]["step"])
    return None


def check_output(study: Study, output: Path) -> None:
    """Refuse an output folder that holds another training in the folder of a run.

    Raises:
        ValueError: it names the folder and the keys that differ.
    """
    for training in study.trainings:
        folder = output / training.folder
        before = parse_object((folder / PLAN).read_bytes()) if (folder / PLAN).exists() else None
        if before is None:
            continue
        now = json.loads(plan_json(training.plan))
        differences = differing_keys(before, now)
        images_before, images = batchnorm_images(before), batchnorm_images(now)
        if images_before != images and not differences and not training.plan.assumes_micro_batch:
            differences = [f"images in recipe.batchnorm.statistics were {images_before}, are {images}"]
        if differences:
            raise ValueError(
                f"{study.path}: {folder} holds another training: {', '.join(differences)}; name another --output, or "
                "remove the folder"
            )


def command(study: Study, training: Training, output: Path, where: Where, slot: int = 0) -> list[str]:
    """The command line of a run in place ``slot`` of those side by side."""
    # By itself a run would take all cores for its loader.
    workers = [] if where.cores_per_rank() is None else [f"recipe.data.workers={training.plan.workers}"]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *where.launcher_arguments(slot),
        str(SCRIPT),
        *("--deepspeed_config", str(study.config), "--output", str(output / training.folder)),
        *(word for override in (*training.overrides, *workers) for word in ("--set", override)),
    ]


class Runner:
    """Runs what is not over yet, ``where.jobs`` at a time.

    Afterwards ``failures`` has the reason of each run that failed, ``stopped_by`` the signal that ended the study.
    """

    _progress: Progress

    def __init__(self, study: Study, output: Path, where: Where) -> None:
        self.study, self.output, self.where = study, output, where
        self.failures: dict[Training, str] = {}
        self.stopped_by: int | None = None
        self._stopped_at = 0.0
        self._pending = [training for training in study.trainings if ending(output / training.folder) is None]
        self._running: dict[int, tuple[Training, subprocess.Popen[bytes]]] = {}
        """by slot"""

    @property
    def over(self) -> int:
        """The number of runs that need not be waited for."""
        return len(self.study.trainings) - len(self._pending) - len(self._running)

    def run(self) -> None:
        """Run until nothing is left or a signal comes; no process of a run outlives it."""
        images = sum(training.images for training in self.study.trainings)
        handlers = {signum: signal.signal(signum, self._stop) for signum in heeded()}
        has_passed_it_on = False
        try:
            with Progress(images, done=self._images_done()) as self._progress:
                for folder in (self.output / training.folder for training in self._pending):
                    if is_locked(folder):
                        self._progress.say(f"another process is writing to {folder}: waiting for it to end")
                while self._running or (self._pending and self.stopped_by is None):
                    self._start_what_fits()
                    time.sleep(POLL_SECONDS)
                    if self.stopped_by is not None and not has_passed_it_on:
                        has_passed_it_on = True
                        self._signal_all(signal.SIGTERM)
                    for slot in list(self._running):
                        self._look(slot)
                    self._progress.update(self._images_done(), f"{self.over} of {len(self.study.trainings)} runs")
        finally:
            self._signal_all(signal.SIGKILL)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _images_done(self) -> int:
        """Images trained on so far: a measure of the time left, whatever the batch size."""
        running = [training for training, _ in self._running.values()]
        over = sum(training.images for training in self.study.trainings if training not in (*self._pending, *running))
        return over + sum(one.plan.timeline.images(steps_done(self.output / one.folder)) for one in running)

    def _start_what_fits(self) -> None:
        for slot in sorted(set(range(self.where.jobs)) - set(self._running)):
            if self.stopped_by is not None or not self._pending:
                return
            folder = self.output / self._pending[0].folder
            if is_locked(folder):  # by a run that has outlived a study that was killed: it may yet complete
                return
            training = self._pending.pop(0)
            if ending(folder) is None:
                self._start(training, slot)
            else:
                self._report(training, 0)

    def _start(self, training: Training, slot: int) -> None:
        folder = self.output / training.folder
        folder.mkdir(parents=True, exist_ok=True)
        words = command(self.study, training, self.output, self.where, slot)
        cores = self.where.cores_per_rank()
        threads = {} if cores is None else {"OMP_NUM_THREADS": str(cores)}
        with (folder / LAUNCH_LOG).open("wb") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                env=threads | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is the study's to pass on
            )
        self._running[slot] = training, process
        self._progress.say(f"{self.over + len(self._running)} of {len(self.study.trainings)}: {training} …")

    def _look(self, slot: int) -> None:
        """Take note of a run that has ended."""
        training, process = self._running[slot]
        exit_code = process.poll()
        # A launcher that a signal has ended leaves ranks that still save.
        saves = self.stopped_by is not None and is_locked(self.output / training.folder)
        if exit_code is not None and not saves:
            _signal(process, signal.SIGKILL)  # what the launcher has left
            del self._running[slot]
            self._report(training, exit_code)

    def _report(self, training: Training, exit_code: int) -> None:
        """Report how a run ended."""
        folder = self.output / training.folder
        became, summary = ending(folder), read_summary(folder)
        if became is None and self.stopped_by is not None:
            return
        if summary is not None:
            result = f"median error {summary['median_error_last_epochs']:.2f} %"
        elif became == "diverged":
            result = "diverged"
        else:
            reason = _last_word(folder / LAUNCH_LOG, exit_code)
            self.failures[training] = f"{reason} ({folder / LAUNCH_LOG})"
            result = f"failed: {self.failures[training]}"
            if exit_code == REFUSED and str(folder) not in reason:
                # Its other seeds would be refused, too, unless the folder is what is wrong.
                self._pending = [pending for pending in self._pending if pending.case is not training.case]
        self._progress.say(f"[{self.over}/{len(self.study.trainings)}] {training}: {result}")

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Have the runs save and end; on a second signal, kill them."""
        if self.stopped_by is None:
            self.stopped_by, self._stopped_at = signum, time.monotonic()
        elif time.monotonic() - self._stopped_at > INSISTS_AFTER_SECONDS:
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, signum: int) -> None:
        for _, process in list(self._running.values()):
            _signal(process, signum)


def _signal(process: subprocess.Popen[bytes], signum: int) -> None:
    """Send a signal to a launcher and to what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _last_word(log: Path, exit_code: int) -> str:
    """What a launch said last about why it ended."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if line.strip()]
    said = [line for line in lines if line.startswith(("recipe:", "ended by SIG"))]
    *_, last = (f"exit code {exit_code}", *(said or lines))
    # The case's name says what it changes.
    return printable(re.sub(r" \(with --set .*?\): ", ": ", last.removeprefix("recipe:").strip()))
