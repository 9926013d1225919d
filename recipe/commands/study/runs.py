"""Runs the trainings of a study, each by the command that a person would type, until all are over or a signal comes.

What has become of a training is told by its folder alone: a launcher's exit code proves nothing.
"""

import contextlib
import fcntl
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from recipe.checkpoints import PLAN, batchnorm_images, differing_keys, is_locked
from recipe.commands.study.file import LAUNCHES, REPORT, Case, Study, Training
from recipe.commands.study.progress import Progress
from recipe.config import printable
from recipe.distributed import heeded
from recipe.plan import plan_json
from recipe.reporting import has_diverged, parse_object, read_events, read_summary, steps_done

LAUNCH_LOG = "launch.log"
PROMPT = "$ "  # before the command, with which the log of each launch begins
SCRIPT = Path(__file__).parents[2] / "train.py"
REFUSED = 2  # the exit code of a run whose input was refused
POLL_SECONDS = 0.5
INSISTS_AFTER_SECONDS = 2.0  # what comes sooner is the same Ctrl-C, passed on by someone else
SAVES_WITHIN_SECONDS = 120.0

State = Literal["complete", "diverged", "failed", "interrupted", "not started"]


@dataclass(frozen=True)
class Where:
    """What the launcher is told: a hostfile, or a number of ranks on this machine, which has ``gpus``; ``jobs`` runs
    side by side.

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

    def words(self, slot: int = 0) -> list[str]:
        """The launcher's arguments for the run in place ``slot`` of ``jobs``, from 0. A port of its own keeps runs on
        one machine apart, and GPUs of its own: with --num_gpus each launch would take the first ones.
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
        """A rank's share of this machine's cores where runs are side by side; else the run itself finds it."""
        return max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.ranks)) if self.jobs > 1 else None

    def environment(self) -> dict[str, str]:
        """This process's environment without what an outer launch may have left; for each rank its share of cores."""
        names = os.environ.keys() - {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
        variables = {name: os.environ[name] for name in names}
        cores = self.cores_per_rank()
        if cores is not None:
            variables.setdefault("OMP_NUM_THREADS", str(cores))
        return variables


@dataclass(frozen=True)
class Launch:
    """A launch: a line of ``launches.jsonl`` when it starts, another when it ends. Times in seconds, ``started`` since
    1970.

    ``cpu_seconds`` are those of all processes on this machine, ``load_before`` the machine's load average before it.
    ``wall_seconds`` is None while the end has not been seen, ``cpu_seconds`` also after a signal, which may end the
    launcher before its ranks: nobody counts theirs then. ``failure`` is why the run failed, if it did.
    """

    case: str
    seed: int
    date: str
    started: float
    wall_seconds: float | None
    cpu_seconds: float | None
    load_before: float
    failure: str | None = None


_LAUNCH = TypeAdapter(Launch)


@dataclass
class _Running:
    training: Training
    slot: int
    process: subprocess.Popen[bytes]
    launch: Launch
    cpu_seconds: float = 0.0
    was_told_to_end: bool = False


def ending(training: Training, output: Path) -> Literal["complete", "diverged"] | None:
    """How a training has ended; None is what another launch may still complete."""
    folder = output / training.folder
    if read_summary(folder) is not None:
        return "complete"
    return None if diverged_at(folder) is None else "diverged"


def diverged_at(folder: Path) -> int | None:
    """The step whose loss ended the run in this folder, if one did."""
    steps = [event for event in read_events(folder) if event["event"] == "step"]
    if steps and has_diverged(steps[-1]["loss"], steps[-1]["skipped"], steps[-1]["loss_scale"]):
        return int(steps[-1]["step"])
    return None


def read_plan(training: Training, output: Path) -> dict[str, Any] | None:
    """The plan by which a training has begun; None if there is none that can be read."""
    try:
        return parse_object((output / training.folder / PLAN).read_bytes())
    except OSError:
        return None


def check_output(study: Study, output: Path) -> None:
    """Refuse an output that holds another study's report, or in which a folder holds another training than this one's.

    Raises:
        ValueError: it names the report, or the folder and the keys that differ.
    """
    report = output / REPORT
    if report.is_file():
        title, *_ = report.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if title and title != study.heading:
            raise ValueError(
                f'{study.path}: {report} is of another study, "{printable(title.removeprefix("# "))}"; name another '
                "--output, or, if only the title has changed, remove that file"
            )
    for training in study.trainings:
        before, now = read_plan(training, output), json.loads(plan_json(training.plan))
        if before is None:
            continue  # it has not begun, or the run itself has a word to say
        differences = differing_keys(before, now)
        if not differences and not training.plan.assumes_micro_batch:
            images = [batchnorm_images(plan) for plan in (before, now)]
            if images[0] != images[1]:
                differences = [f"images in recipe.batchnorm.statistics were {images[0]}, are {images[1]}"]
        if differences:
            raise ValueError(
                f"{study.path}: {output / training.folder} holds another training: {', '.join(differences)}; name "
                "another --output, or remove the folder"
            )


def command(study: Study, training: Training, output: Path, where: Where, slot: int = 0) -> list[str]:
    """The command line of a run in place ``slot`` of those side by side."""
    overrides = [word for override in _overrides(training, where) for word in ("--set", override)]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *where.words(slot),
        str(SCRIPT),
        *("--deepspeed_config", str(study.config), "--output", str(output / training.folder)),
        *overrides,
    ]


def _overrides(training: Training, where: Where) -> list[str]:
    # By itself a run would take all cores for its loader.
    workers = [] if where.cores_per_rank() is None else [f"recipe.data.workers={training.plan.workers}"]
    return [*training.overrides, *workers]


class Runner:
    """Has runs started and ended, ``where.jobs`` at a time."""

    def __init__(self, study: Study, output: Path, where: Where, progress: Progress) -> None:
        self.study, self.output, self.where, self.progress = study, output, where, progress
        self.stopped_by: int | None = None
        self.failures: dict[Training, str] = {}
        self.refusal: str | None = None
        self._pending: list[Training] = []
        self._refusals: dict[str, str | None] = {}
        self._running: list[_Running] = []
        self._stopped_at = 0.0
        self._insists = False

    def run(self) -> None:
        """Run what is open; afterwards ``failures`` says what failed, ``refusal`` what all cases were refused for, and
        ``stopped_by`` which signal came, if any.

        Whatever way it ends, no process of a run is left.
        """
        self._pending = [training for training in self.study.trainings if ending(training, self.output) is None]
        handlers = {signum: signal.signal(signum, self._stop) for signum in heeded()}
        try:
            while self._running or (self._pending and self.stopped_by is None):
                while self._pending and len(self._running) < self.where.jobs and self.stopped_by is None:
                    training = self._next()
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

    def _next(self) -> Training | None:
        """Take the next training that is still open and in whose folder nobody writes.

        A run may have outlived a study that was killed: it is waited for.
        """
        for training in list(self._pending):
            folder = self.output / training.folder
            if _is_under_way(folder):
                self.progress.wait_for(folder)
                continue
            self._pending.remove(training)
            if ending(training, self.output) is None:
                return training
            self._judge(training, 0)
        return None

    def _start(self, training: Training) -> None:
        folder = self.output / training.folder
        folder.mkdir(parents=True, exist_ok=True)
        slot = min(set(range(self.where.jobs)) - {running.slot for running in self._running})
        words = command(self.study, training, self.output, self.where, slot)
        today, now, load = date.today().isoformat(), round(time.time(), 1), round(os.getloadavg()[0], 2)
        launch = Launch(training.case.name, training.seed, today, now, None, None, load)
        self._write_down(launch)
        with (folder / LAUNCH_LOG).open("ab") as log:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever inherits the file holds it, too
            log.write(f"{PROMPT}{shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                env=self.where.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is the study's to pass on
            )
        self._running.append(_Running(training, slot, process, launch))
        self.progress.starts(training)

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
                wall_seconds = round(time.time() - running.launch.started, 1)
                cpu_seconds = None if running.was_told_to_end else round(running.cpu_seconds, 1)
                failure = self._judge(running.training, exit_code)
                self._write_down(
                    replace(running.launch, wall_seconds=wall_seconds, cpu_seconds=cpu_seconds, failure=failure)
                )
            elif self._insists or (self.stopped_by and time.monotonic() - self._stopped_at > SAVES_WITHIN_SECONDS):
                _signal_group(running.process, signal.SIGKILL)

    def _write_down(self, launch: Launch) -> None:
        with (self.output / LAUNCHES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(launch)) + "\n")

    def _judge(self, training: Training, exit_code: int) -> str | None:
        """Say what has become of a run; return why it failed, if it did."""
        folder, became = self.output / training.folder, ending(training, self.output)
        summary = read_summary(folder)
        if became is None and self.stopped_by is not None:
            return None
        failure = _last_word(folder / LAUNCH_LOG, exit_code) if became is None else None
        if failure is not None:
            # The study has told what is common to all cases, and the case's name tells the rest.
            changed = " ".join(f"--set {override}" for override in _overrides(training, self.where))
            failure = failure.replace(printable(f"{self.study.config} (with {changed})"), str(self.study.config))
            self.failures[training] = f"{failure} ({folder / LAUNCH_LOG})"
            self.progress.over(training, f"failed: {self.failures[training]}")
        elif summary is not None:
            self.progress.over(training, f"median error {summary['median_error_last_epochs']:.2f} %")
        else:
            self.progress.over(training, "diverged")
        # What is wrong with its folder is a single run's affair.
        is_refused = exit_code == REFUSED and failure is not None and str(folder) not in failure
        self._refusals[training.case.name] = failure if is_refused else None
        if is_refused:
            self._do_without(training.case)
        return failure

    def _do_without(self, refused: Case) -> None:
        """Start no run that would be refused, too: none of this case, and none at all if all cases so far, two at
        least, have been refused for the same reason, which then hardly lies in them.
        """
        self._pending = [training for training in self._pending if training.case is not refused]
        reasons = set(self._refusals.values())
        if len(reasons) == 1 and len(self._refusals) >= min(2, len(self.study.file.cases)):
            self._pending, self.refusal = [], reasons.pop()

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Have the runs save and end; on a second signal, have them killed."""
        if self.stopped_by is not None:
            self._insists = self._insists or time.monotonic() - self._stopped_at > INSISTS_AFTER_SECONDS
            return
        self.stopped_by, self._stopped_at = signum, time.monotonic()


def read_launches(output: Path) -> list[Launch]:
    """All launches of a study, the earliest first."""
    try:
        lines = (output / LAUNCHES).read_bytes().splitlines()
    except OSError:
        return []
    launches = {}
    for line in lines:
        try:
            launch = _LAUNCH.validate_json(line)
        except ValidationError:
            continue  # half written, or damaged
        launches[launch.case, launch.seed, launch.started] = launch  # its end stands for its start
    return list(launches.values())


def _is_under_way(folder: Path) -> bool:
    """Whether a run writes to its folder, or is a launch that has not got that far: it holds the log it was given."""
    try:
        with (folder / LAUNCH_LOG).open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # it has never been launched, or a file system without locks
    return is_locked(folder)


def _signal_group(process: subprocess.Popen[bytes], signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return


def _cpu_seconds() -> float:
    """CPU time of all descendants that have ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def was_interrupted(last_word: str) -> bool:
    """Whether a run ended because a signal told it to, by what it said last."""
    return re.match(r"ended by SIG|SIG\w+: ended at once", last_word) is not None


def _last_word(log: Path, exit_code: int) -> str:
    """What the last launch of a run said last of why it ended."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = text[text.rfind(f"\n{PROMPT}") + 1 :].splitlines()[1:]
    said = [line for line in lines if line.startswith(("recipe:", "ended by SIG"))]
    said = said or [line for line in lines if line.strip()]
    return printable(said[-1].removeprefix("recipe:").strip()) if said else f"exit code {exit_code}"
