"""Kills runs repeatedly, and checks that the resumed result matches that of an undisturbed run, bit for bit.

The real ``deepspeed`` launcher starts a run on the digits, and SIGKILL kills one rank or the whole launch at a random
moment: a place in the program, and how many times it has been reached. The same command resumes, is killed again, and
finally completes. Its ``metrics.jsonl``, except for timings, and its last checkpoint (weights, momentum, running
averages, loss scale) must then equal those of a run that was never killed. A kill is survived if its run matches.

    python -m benchmarks.kill_resume --kills 100 --json benchmarks/results/kill_resume_cpu.json
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.killed_train import MOMENTS
from benchmarks.launch import ROOT, deepspeed_command, environment
from benchmarks.report import context, heading, new_parser, positive, publish, say

TIMEOUT_SECONDS = 600
BATCH, MICRO_BATCH = 256, 64  # two or more micro-batches per step on each rank
EPOCHS, STEPS_PER_EPOCH, SAVE_EVERY = 4, 5, 2
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
# Only rank 0 reaches these; if another rank ended first, rank 0 would complete the run alone.
ON_RANK_0_ONLY = {"metrics", "checkpoint", "files", "publish", "published", "prune", "summary"}


class Setting(NamedTuple):
    """A run's ranks, precision and the settings that vary."""

    ranks: int
    precision: str
    workers: int = 0
    statistics: str = "global"
    image_size: int = 32

    @property
    def arguments(self) -> list[str]:
        """``recipe/train.py`` arguments: 20 steps on the digits, checkpoints every second step and after each epoch."""
        values: dict[str, Any] = {
            "train_batch_size": BATCH,
            "recipe.max_micro_batch_size": MICRO_BATCH,
            "recipe.data.workers": self.workers,
            "recipe.data.image_size": self.image_size,
            "recipe.batchnorm.statistics": self.statistics,
            "recipe.schedule.epochs": EPOCHS,
            "recipe.schedule.decay_epochs": [3],
            "recipe.checkpoint.every_steps": SAVE_EVERY,
            "steps_per_print": 3,
        }
        if self.precision == "fp16":
            # Makes the loss scale rise and fall within the run.
            values["fp16"] = {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 3, "hysteresis": 1}
        overrides = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
        return ["--deepspeed_config", "ds_configs/digits_b512.json", *overrides]


class Kill(NamedTuple):
    """A kill when ``who`` (a rank, or "group": rank 0 for all) reaches ``moment`` for the ``times``-th time."""

    moment: str
    times: int
    who: str
    signal_name: str = "KILL"

    def __str__(self) -> str:
        whom = "the whole launch" if self.who == "group" else f"rank {self.who}"
        counted = {"clock": f"after {self.times} ms", "last": f"the {self.times}th"}
        when = counted.get(self.moment, f"the {self.times}. time")
        return f"{whom}, {MOMENTS[self.moment]}, {when}"


class Outcome(NamedTuple):
    """A kill, and how its run differs from the undisturbed one, or None if it does not."""

    setting: Setting
    kill: Kill
    difference: str | None


def draw(dice: random.Random, setting: Setting, moment: str) -> Kill:
    """A random kill at ``moment`` that a launch of ``setting`` can reach."""
    micro_steps = BATCH // MICRO_BATCH // setting.ranks
    most = {
        "window": 4 * micro_steps,
        "step": 4 * micro_steps,
        "metrics": 6,
        "checkpoint": 3,
        "files": 3,
        "publish": 3,
        "published": 3,
        "prune": 2,
        "validation": 6,
        "last": 1,
        "summary": 1,
        "clock": 2500,  # less than the time of any whole run
    }[moment]
    ranks = ["0"] if moment in ON_RANK_0_ONLY else [str(rank) for rank in range(setting.ranks)]
    times = LAST_STEP if moment == "last" else dice.randint(1, most)
    return Kill(moment, times, dice.choice([*ranks, "group"]))


def kill_at(kill: Kill | None) -> str:
    """The value of ``KILL_AT`` for ``killed_train.py``."""
    return "" if kill is None else " ".join(map(str, kill))


def launch(setting: Setting, output: Path, kill: Kill | None) -> int:
    """Start or resume the run and wait until it ends or is killed; return the launcher's exit code.

    Raises:
        RuntimeError: It failed without having been killed.
        subprocess.TimeoutExpired: It neither ended nor was killed in time.
    """
    command = deepspeed_command(
        setting.ranks, "benchmarks/killed_train.py", *setting.arguments, "--output", str(output)
    )
    # A separate session, so that killing the process group does not kill this program.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(KILL_AT=kill_at(kill)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell makes background processes ignore SIGINT, and the launch would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if kill is None and process.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}:\n{printed}")
    return process.returncode


def is_complete(output: Path) -> bool:
    """Whether the run completed; the launcher's exit code does not reveal a kill."""
    return (output / "summary.json").exists()


def difference(output: Path, reference: Path) -> str | None:
    """The first difference between a run and the reference, or None if they are bit-identical."""
    ours, theirs = (_events(folder) for folder in (output, reference))
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return f"metrics.jsonl has {mine}, the undisturbed run {other}"
    if len(ours) != len(theirs):
        return f"metrics.jsonl has {len(ours)} lines, the undisturbed run {len(theirs)}"
    return _differing_leaf(_last_state(output), _last_state(reference))


def _events(output: Path) -> list[dict[str, Any]]:
    timings = ("images_per_second", "data_wait")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in timings} for line in lines]


def _last_state(output: Path) -> dict[str, Any]:
    """DeepSpeed's saved state of the last step, without the wall time."""
    (file,) = (output / f"checkpoints/step-{LAST_STEP:08}").glob("mp_rank_00_model_states.pt")
    state: dict[str, Any] = torch.load(file, weights_only=True)
    del state["seconds"]
    return state


def _differing_leaf(ours: Any, theirs: Any, name: str = "") -> str | None:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return None if same else f"{name} is another tensor"
    if isinstance(ours, dict) and isinstance(theirs, dict) and list(ours) == list(theirs):
        found = (_differing_leaf(ours[key], theirs[key], f"{name}/{key}") for key in ours)
        return next(filter(None, found), None)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        found = (_differing_leaf(*pair, f"{name}/{i}") for i, pair in enumerate(zip(ours, theirs, strict=True)))
        return next(filter(None, found), None)
    return None if ours == theirs else f"{name} is {ours!r}, undisturbed {theirs!r}"


def run_killed(
    setting: Setting,
    kills: Sequence[Kill],
    folder: Path,
    reference: Path,
    start: Callable[[Setting, Path, Kill | None], int] = launch,
) -> list[Outcome]:
    """Train in ``folder``, killed by each of ``kills`` in turn, until the run is complete; compare the result.

    If a run completes before all kills have happened, a new run takes the rest. Every kill has an outcome.

    Raises:
        RuntimeError: A whole run does not reach a kill.
    """
    outcomes: list[Outcome] = []
    of_this_run: list[Kill] = []
    waiting, runs = list(kills), 0
    while waiting or of_this_run:
        output = folder / f"run-{runs}"
        kill = waiting.pop(0) if waiting else None
        start(setting, output, kill)
        if kill is not None and not is_complete(output):
            of_this_run.append(kill)
            say(f"  killed: {kill}")
            continue
        if kill is not None:
            if not of_this_run:
                raise RuntimeError(f"a whole run does not reach this kill: {kill}")
            say(f"  the run ended before: {kill}")
            waiting.append(kill)
        found = difference(output, reference)
        say(f"  complete, {found or 'equal'}, after {len(of_this_run)} kills")
        outcomes += [Outcome(setting, kill, found) for kill in of_this_run]
        of_this_run, runs = [], runs + 1
    return outcomes


def main(words: Sequence[str]) -> int:
    """Kill as often as requested; return 1 if a run differs from the undisturbed one."""
    before = context("benchmarks.kill_resume", words)
    parser = new_parser("benchmarks.kill_resume", __doc__)
    parser.add_argument("--kills", type=positive, default=100, help="total number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the moments (default: %(default)s)")
    arguments = parser.parse_args(words)
    dice = random.Random(arguments.seed)
    settings = [Setting(1, "fp32"), Setting(2, "fp32"), Setting(1, "fp16", image_size=8)]  # CPUs are slow at fp16
    moments = list(MOMENTS)
    plans: dict[Setting, list[Kill]] = {setting: [] for setting in settings}
    for number in range(arguments.kills):
        # Covers every moment in every setting, if there are enough kills.
        setting = settings[number % len(settings)]
        plans[setting].append(draw(dice, setting, moments[number // len(settings) % len(moments)]))
    outcomes = []
    for setting, kills in plans.items():
        if not kills:
            continue
        say(f"{setting.ranks} ranks, {setting.precision}: {len(kills)} kills, seed {arguments.seed}")
        dice.shuffle(kills)
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder, "undisturbed")
            launch(setting, reference, None)
            outcomes += run_killed(setting, kills, Path(folder), reference)
    report = before | {
        "settings": {"seed": arguments.seed},
        "kills": len(outcomes),
        "survived": sum(outcome.difference is None for outcome in outcomes),
        "results": [
            {"ranks": o.setting.ranks, "precision": o.setting.precision, **o.kill._asdict(), "difference": o.difference}
            for o in outcomes
        ],
    }
    publish(report, format_report(report), arguments.json)
    return 0 if report["survived"] == report["kills"] else 1


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown: kills survived, for each moment and setting."""
    settings = list(dict.fromkeys((result["ranks"], result["precision"]) for result in report["results"]))
    lines = [
        *heading(f"{report['survived']} of {report['kills']} kills survived, bit for bit", report),
        "| killed | "
        + " | ".join(f"{ranks} rank{'s' * (ranks > 1)}, {precision}" for ranks, precision in settings)
        + " |",
        "|---" * (1 + len(settings)) + "|",
    ]
    for moment, meaning in MOMENTS.items():
        cells = []
        for setting in settings:
            here = [r for r in report["results"] if (r["ranks"], r["precision"]) == setting and r["moment"] == moment]
            cells.append(f"{sum(result['difference'] is None for result in here)} of {len(here)}" if here else "")
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    lost = [result for result in report["results"] if result["difference"] is not None]
    lines += ["", *(f"- lost: {result}" for result in lost)]
    lines.append(
        "Each kill is a SIGKILL of one rank or of the whole launch, at a random moment (seed "
        f"{report['settings']['seed']}). The same command resumes, is killed again, and finally completes. A kill is "
        "survived if its run then has the undisturbed run's metrics.jsonl, apart from timings, and its last "
        "checkpoint: weights, momentum, running averages, loss scale."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
