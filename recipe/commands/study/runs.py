"""Launches the runs of a study, each with the command that a person would type, until all are over or a signal arrives.

How a run ended is read from its folder: a launcher's exit code proves nothing.
"""

import contextlib
import fcntl
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

from recipe.checkpoints import PLAN, batchnorm_images, differing_keys, is_locked
from recipe.commands.study.file import LAUNCH_LOG, Run, Study
from recipe.commands.study.results import read_result
from recipe.config import printable
from recipe.distributed import heeded
from recipe.plan import plan_json
from recipe.reporting import Progress, parse_object, steps_done

SCRIPT = Path(__file__).parents[2] / "train.py"
REFUSED = 2  # the exit code of a run whose input was refused
OVER = ("complete", "diverged")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Resources:
    """Where the runs take place: on the slots of a hostfile, or on this machine with its ``gpus``, ``jobs`` at a time.

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

    def cores_per_rank(self) -> int | None:
        """A rank's share of this machine's cores if several runs share them; a run alone takes them all."""
        return max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.ranks)) if self.jobs > 1 else None


def check_output(study: Study, output: Path) -> None:
    """Refuse an output folder that is a run's own, or in which a run's folder has a different configuration.

    Raises:
        ValueError: names the folder and the keys that differ.
    """
    if (output / PLAN).exists():
        raise ValueError(f"{study.path}: {output} is the folder of a run; name another --output")
    for run in study.runs:
        folder = output / run.folder
        before = parse_object((folder / PLAN).read_bytes()) if (folder / PLAN).exists() else None
        if before is None:
            continue
        now = json.loads(plan_json(run.plan))
        differences = differing_keys(before, now)
        images_before, images = batchnorm_images(before), batchnorm_images(now)
        if images_before != images and not differences and not run.plan.assumes_micro_batch:
            differences = [f"images in recipe.batchnorm.statistics were {images_before}, are {images}"]
        if differences:
            raise ValueError(
                f"{study.path}: {folder} belongs to a different run: {', '.join(differences)}; name another --output, "
                "or remove the folder"
            )


def command(study: Study, run: Run, output: Path, resources: Resources, slot: int = 0) -> list[str]:
    """The command line of a run; the runs of different slots have different ports and GPUs."""
    if resources.hostfile is not None:
        placement = ["--hostfile", str(resources.hostfile)]
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        placement = ["--master_port", port, "--num_gpus", str(resources.ranks)]
        if resources.jobs > 1 and resources.gpus:  # with --num_gpus every launch would take the first GPUs
            own = range(slot * resources.ranks, (slot + 1) * resources.ranks)
            placement = ["--master_port", port, "--include", f"localhost:{','.join(map(str, own))}"]
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *placement,
        str(SCRIPT),
        *("--deepspeed_config", str(study.config), "--output", str(output / run.folder)),
        *(word for override in run.overrides for word in ("--set", override)),
    ]


class Runner:
    """Launches the runs that are not over yet, ``resources.jobs`` at a time.

    Afterwards ``failures`` has the reason for each run that failed, and ``stopped_by`` the signal that ended the study.
    """

    _progress: Progress

    def __init__(self, study: Study, output: Path, resources: Resources) -> None:
        self.study, self.output, self.resources = study, output, resources
        self.failures: dict[Run, str] = {}
        self.stopped_by: int | None = None
        self._must_forward = False
        self._pending = [run for run in study.runs if read_result(run, output).state not in OVER]
        self._running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
        """by slot"""

    @property
    def over(self) -> int:
        """The number of runs that are neither pending nor running."""
        return len(self.study.runs) - len(self._pending) - len(self._running)

    def run(self) -> None:
        """Launch until no run is left or a signal arrives; no process of a run is left behind."""
        handlers = {signum: signal.signal(signum, self._stop) for signum in heeded()}
        try:
            with Progress(sum(run.images for run in self.study.runs), done=self._images_done()) as self._progress:
                for folder in (self.output / run.folder for run in self._pending):
                    if _is_busy(folder):
                        self._progress.say(f"another process is writing to {folder}: waiting for it")
                while self._running or (self._pending and self.stopped_by is None):
                    self._start_what_fits()
                    time.sleep(POLL_SECONDS)
                    if self._must_forward:
                        self._must_forward = False
                        self._signal_all(signal.SIGTERM)
                    for slot in list(self._running):
                        self._check(slot)
                    self._progress.update(self._images_done(), f"{self.over} of {len(self.study.runs)} runs")
        finally:
            self._signal_all(signal.SIGKILL)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _images_done(self) -> int:
        """Images trained on so far, by which the remaining time is estimated whatever the batch sizes."""
        running = [run for run, _ in self._running.values()]
        over = sum(run.images for run in self.study.runs if run not in (*self._pending, *running))
        return over + sum(run.plan.timeline.images(steps_done(self.output / run.folder)) for run in running)

    def _start_what_fits(self) -> None:
        for slot in sorted(set(range(self.resources.jobs)) - self._running.keys()):
            # A run that outlived a killed study may still complete.
            free = [run for run in self._pending if not _is_busy(self.output / run.folder)]
            if not free or self.stopped_by is not None:
                return
            self._pending.remove(free[0])
            if read_result(free[0], self.output).state in OVER:
                self._report(free[0], 0)
            else:
                self._start(free[0], slot)

    def _start(self, run: Run, slot: int) -> None:
        folder = self.output / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        words = command(self.study, run, self.output, self.resources, slot)
        cores = self.resources.cores_per_rank()
        threads = {} if cores is None else {"OMP_NUM_THREADS": str(cores)}
        with (folder / LAUNCH_LOG).open("wb") as log:
            # Until the launcher and its ranks, which inherit it, have ended; some file systems have no locks.
            with contextlib.suppress(OSError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                env=threads | os.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C must not reach the run twice
            )
        self._running[slot] = run, process
        self._progress.say(f"started {self.over + len(self._running)} of {len(self.study.runs)}: {run}")

    def _check(self, slot: int) -> None:
        """Report the run in a slot, and free the slot, if the run has ended."""
        run, process = self._running[slot]
        exit_code = process.poll()
        # After a signal a launcher can exit before its ranks have saved.
        is_saving = self.stopped_by is not None and is_locked(self.output / run.folder)
        if exit_code is not None and not is_saving:
            _signal(process, signal.SIGKILL)  # processes that the launcher has left behind
            del self._running[slot]
            self._report(run, exit_code)

    def _report(self, run: Run, exit_code: int) -> None:
        log = self.output / run.folder / LAUNCH_LOG
        result = read_result(run, self.output)
        if result.state not in OVER and self.stopped_by is not None:
            return
        outcome = "diverged"
        if result.state == "complete":
            outcome = f"median error {result.errors['median']:.2f} %"
        elif result.state != "diverged":
            reason = _last_message(log, exit_code)
            self.failures[run] = f"{reason} ({log})"
            outcome = f"failed: {self.failures[run]}"
            if exit_code == REFUSED and str(log.parent) not in reason:
                # The other seeds of the case would be refused, too, unless the run's folder is at fault.
                self._pending = [pending for pending in self._pending if pending.case is not run.case]
        self._progress.say(f"[{self.over}/{len(self.study.runs)}] {run}: {outcome}")

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        # Each signal is forwarded: a run takes the first as a request to save, and a later one to end at once.
        self.stopped_by, self._must_forward = self.stopped_by or signum, True

    def _signal_all(self, signum: int) -> None:
        for _, process in self._running.values():
            _signal(process, signum)


def _is_busy(folder: Path) -> bool:
    """Whether a launch is under way in a run's folder; it has the log open for seconds before the run has its lock."""
    try:
        with (folder / LAUNCH_LOG).open("rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # there is no log yet
    return is_locked(folder)


def _signal(process: subprocess.Popen[bytes], signum: int) -> None:
    """Send a signal to a launcher and to the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def _last_message(log: Path, exit_code: int) -> str:
    """The last message of a launch that explains why it ended."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if line.strip()]
    messages = [line for line in lines if line.startswith(("recipe:", "ended by SIG"))]
    *_, last = (f"exit code {exit_code}", *(messages or lines))
    # The overrides are left out: the case's name stands for them.
    return printable(re.sub(r" \(with --set .*?\): ", ": ", last.removeprefix("recipe:").strip()))
