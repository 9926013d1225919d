"""Runs the trainings of a study, each by the command that a person would type, until all are over or a signal comes.

What has become of a training is told by its folder alone: a launcher's exit code proves nothing.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from recipe.commands.study_file import Study, Training
from recipe.commands.study_progress import Progress
from recipe.interruption import heeded
from recipe.lock import is_locked
from recipe.manifest import PLAN
from recipe.metrics import has_diverged, read_events, steps_done
from recipe.plan_text import plan_json
from recipe.resume import differing_keys
from recipe.strict_json import printable
from recipe.summary import read_summary

LAUNCH_LOG, LAUNCHES = "launch.log", "launches.jsonl"
SCRIPT = Path(__file__).parents[1] / "train.py"
POLL_SECONDS = 0.5
INSISTS_AFTER_SECONDS = 2.0  # what comes sooner is the same Ctrl-C, passed on by someone else
SAVES_WITHIN_SECONDS = 120.0

State = Literal["complete", "diverged", "open"]


@dataclass(frozen=True)
class Where:
    """What the launcher is told: a hostfile, or a number of ranks on this machine; ``jobs`` runs side by side."""

    hostfile: Path | None
    ranks: int
    jobs: int = 1

    def words(self) -> list[str]:
        """The launcher's arguments. A port of its own keeps runs on one machine apart."""
        if self.hostfile is not None:
            return ["--hostfile", str(self.hostfile)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        return ["--master_port", str(port), "--num_gpus", str(self.ranks)]

    def environment(self) -> dict[str, str]:
        """This process's environment without what an outer launch may have left; for each rank its share of cores."""
        names = os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
        variables = {name: os.environ[name] for name in names}
        if self.jobs > 1:
            cores = len(os.sched_getaffinity(0)) // (self.jobs * self.ranks)
            variables.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        return variables


@dataclass(frozen=True)
class Launch:
    """A launch that has ended: a line of ``launches.jsonl``. Times in seconds, ``started`` since 1970.

    ``cpu_seconds`` are those of all processes on this machine, ``load_before`` the machine's load average before it.
    """

    case: str
    seed: int
    date: str
    started: float
    wall_seconds: float
    cpu_seconds: float
    load_before: float


@dataclass
class _Running:
    training: Training
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.time)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])
    cpu_seconds: float = 0.0
    was_told_to_end: bool = False


def state(training: Training, output: Path) -> State:
    """What has become of a training: "open" is what another launch may still complete."""
    folder = output / training.folder
    if read_summary(folder) is not None:
        return "complete"
    steps = [event for event in read_events(folder) if event["event"] == "step"]
    last: dict[str, Any] = steps[-1] if steps else {"loss": 0.0, "skipped": False, "loss_scale": 1.0}
    return "diverged" if has_diverged(last["loss"], last["skipped"], last["loss_scale"]) else "open"


def check_output(study: Study, output: Path) -> None:
    """Refuse an output in which a folder holds another training than the study's.

    Raises:
        ValueError: it names the folder and the keys that differ.
    """
    for training in study.trainings:
        file = output / training.folder / PLAN
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # it has not begun, or the run itself has a word to say
        differences = differing_keys(before, json.loads(plan_json(training.plan)))
        if differences:
            raise ValueError(
                f"{study.path}: {output / training.folder} holds another training: {', '.join(differences)}; name "
                "another --output, or remove the folder"
            )


def command(study: Study, training: Training, output: Path, where: Where) -> list[str]:
    """The command line of a run."""
    overrides = [word for override in training.overrides for word in ("--set", override)]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *where.words(),
        str(SCRIPT),
        *("--deepspeed_config", str(study.config), "--output", str(output / training.folder)),
        *overrides,
    ]


class Runner:
    """Has runs started and ended, ``where.jobs`` at a time."""

    def __init__(self, study: Study, output: Path, where: Where, progress: Progress) -> None:
        self.study, self.output, self.where, self.progress = study, output, where, progress
        self.stopped_by: int | None = None
        self.failures: dict[Training, str] = {}
        self._running: list[_Running] = []
        self._stopped_at = 0.0
        self._insists = False

    def run(self) -> None:
        """Run what is open; afterwards ``failures`` says what failed and ``stopped_by`` which signal came, if any.

        Whatever way it ends, no process of a run is left.
        """
        pending = [training for training in self.study.trainings if state(training, self.output) == "open"]
        handlers = {signum: signal.signal(signum, self._stop) for signum in heeded()}
        try:
            while self._running or (pending and self.stopped_by is None):
                while pending and len(self._running) < self.where.jobs and self.stopped_by is None:
                    training = self._next(pending)
                    if training is None:
                        break
                    self._start(training)
                time.sleep(POLL_SECONDS)
                self._look()
        finally:
            for running in self._running:
                _signal_group(running.process, signal.SIGKILL)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _next(self, pending: list[Training]) -> Training | None:
        """Take the next training that is still open and in whose folder nobody writes.

        A run may have outlived a study that was killed: it is waited for.
        """
        for training in list(pending):
            folder = self.output / training.folder
            if is_locked(folder):
                self.progress.wait_for(folder)
                continue
            pending.remove(training)
            if state(training, self.output) == "open":
                return training
            self._judge(training, 0)
        return None

    def _start(self, training: Training) -> None:
        folder = self.output / training.folder
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LAUNCH_LOG).open("ab") as log:
            process = subprocess.Popen(
                command(self.study, training, self.output, self.where),
                env=self.where.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is the study's to pass on
            )
        self._running.append(_Running(training, process))

    def _look(self) -> None:
        """Take note of the runs that have ended, and of how far the others are."""
        for running in list(self._running):
            cpu_before = _cpu_seconds()
            exit_code = running.process.poll()
            running.cpu_seconds += _cpu_seconds() - cpu_before
            images = steps_done(self.output / running.training.folder) * running.training.plan.global_batch
            self.progress.images(running.training, images)
            if self.stopped_by is not None and not running.was_told_to_end:
                _signal_group(running.process, signal.SIGTERM)
                running.was_told_to_end = True
            # A launcher that a signal has ended leaves ranks that still save.
            saves = self.stopped_by is not None and is_locked(self.output / running.training.folder)
            if exit_code is not None and not saves:
                _signal_group(running.process, signal.SIGKILL)  # what it left
                self._running.remove(running)
                self._record(running)
                self._judge(running.training, exit_code)
            elif self._insists or (self.stopped_by and time.monotonic() - self._stopped_at > SAVES_WITHIN_SECONDS):
                _signal_group(running.process, signal.SIGKILL)

    def _record(self, running: _Running) -> None:
        launch = Launch(
            running.training.case.name,
            running.training.seed,
            date.today().isoformat(),
            round(running.started, 1),
            round(time.time() - running.started, 1),
            round(running.cpu_seconds, 1),
            round(running.load_before, 2),
        )
        with (self.output / LAUNCHES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(launch)) + "\n")

    def _judge(self, training: Training, exit_code: int) -> None:
        folder, became = self.output / training.folder, state(training, self.output)
        summary = read_summary(folder)
        if became == "complete" and summary is not None:
            self.progress.over(training, f"median error {summary['median_error_last_epochs']:.2f} %")
        elif became == "diverged":
            self.progress.over(training, "diverged")
        elif self.stopped_by is None:
            self.failures[training] = f"{_last_word(folder / LAUNCH_LOG, exit_code)} ({folder / LAUNCH_LOG})"
            self.progress.over(training, f"failed: {self.failures[training]}")

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Have the runs save and end; on a second signal, have them killed."""
        if self.stopped_by is not None:
            self._insists = self._insists or time.monotonic() - self._stopped_at > INSISTS_AFTER_SECONDS
            return
        self.stopped_by, self._stopped_at = signum, time.monotonic()


def read_launches(output: Path) -> list[Launch]:
    """All launches of a study that it has seen the end of."""
    try:
        lines = (output / LAUNCHES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    launches = []
    for line in lines:
        try:
            launches.append(Launch(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # half written
    return launches


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return


def _cpu_seconds() -> float:
    """CPU time of all descendants that have ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _last_word(log: Path, exit_code: int) -> str:
    """What a run said last of why it failed."""
    lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("recipe:")] or [line for line in lines if line.strip()]
    return printable(said[-1].removeprefix("recipe:").strip()) if said else f"exit code {exit_code}"
