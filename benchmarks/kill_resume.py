"""Kills runs again and again, and looks whether what comes out is what an undisturbed run gives, bit for bit.

A run of the digits is started by the real ``deepspeed`` launcher and killed with SIGKILL at a moment that is drawn: a
place in the program, and how many times it has been come to; one rank, or the whole launch. The same command goes on,
is killed again, and at last comes to its end. Then its ``metrics.jsonl``, but for the timings, and its last checkpoint
(weights, momentum, running averages, loss scale) must equal those of a run that nobody killed. A kill survived if the
run that it belongs to came out equal.

    python -m benchmarks.kill_resume --kills 100 --json benchmarks/results/kill_resume_cpu.json
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.killed_train import MOMENTS
from benchmarks.launch import ROOT, deepspeed_command, environment
from benchmarks.report import add_json, context, heading, positive, write

TIMEOUT_SECONDS = 600
EPOCHS, STEPS_PER_EPOCH, SAVE_EVERY = 4, 5, 2
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
# What rank 0 alone does; and where another rank ends without it, it completes the run by itself.
ON_RANK_0_ONLY = {"metrics", "checkpoint", "files", "publish", "published", "prune", "summary"}


class Setting(NamedTuple):
    """Ranks and precision of a run, and its micro-batches of 256 images a step."""

    ranks: int
    precision: str
    workers: int = 0
    statistics: str = "global"
    model: str = "test_resnet"
    image_size: int = 32

    @property
    def micro_batch(self) -> int:
        """Two or more micro-batches a step on each rank."""
        return 64

    @property
    def arguments(self) -> list[str]:
        """Of ``recipe/train.py``: 20 steps of the digits, a checkpoint every second and at the end of each epoch."""
        values: dict[str, Any] = {
            "train_batch_size": 256,
            "recipe.max_micro_batch_size": self.micro_batch,
            "recipe.data.workers": self.workers,
            "recipe.data.image_size": self.image_size,
            "recipe.batchnorm.statistics": self.statistics,
            "recipe.model.name": self.model,
            "recipe.schedule.epochs": EPOCHS,
            "recipe.schedule.decay_epochs": [3],
            "recipe.checkpoint.every_steps": SAVE_EVERY,
            "steps_per_print": 3,
        }
        if self.precision == "fp16":
            # So that the loss scale rises and falls within the run.
            values["fp16"] = {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 3, "hysteresis": 1}
        overrides = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
        return ["--deepspeed_config", "ds_configs/digits_b512.json", *overrides]


class Kill(NamedTuple):
    """The ``times``-th time that ``who`` – a rank, or "group": rank 0 for all – comes to ``moment`` in a launch."""

    moment: str
    times: int
    who: str
    signal_name: str = "KILL"

    def __str__(self) -> str:
        whom = "the whole launch" if self.who == "group" else f"rank {self.who}"
        counted = {"clock": f"after {self.times} ms", "last": f"the {self.times}th"}
        when = counted.get(self.moment, f"the {self.times}. time")
        return f"{whom}, {MOMENTS[self.moment]}, {when}"


@dataclass
class Outcome:
    """What became of the runs that a kill belongs to."""

    setting: Setting
    kill: Kill
    difference: str | None = None


def draw(dice: random.Random, setting: Setting, moment: str) -> Kill:
    """A kill at ``moment`` that a launch of ``setting`` can come to."""
    micro_steps = 256 // setting.micro_batch // setting.ranks
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
        "clock": 2500,  # less than any whole run takes
    }[moment]
    ranks = ["0"] if moment in ON_RANK_0_ONLY else [str(rank) for rank in range(setting.ranks)]
    times = LAST_STEP if moment == "last" else dice.randint(1, most)
    return Kill(moment, times, dice.choice([*ranks, "group"]))


def kill_at(kill: Kill | None) -> str:
    """``killed_train.py``'s variable."""
    return "" if kill is None else " ".join(map(str, kill))


def launch(setting: Setting, output: Path, kill: Kill | None) -> int:
    """Start the run, or go on with it, and wait for its end, whichever; return the launcher's exit code.

    Raises:
        RuntimeError: it failed without having been killed.
        subprocess.TimeoutExpired: it neither ended nor was ended.
    """
    command = deepspeed_command(
        setting.ranks, "benchmarks/killed_train.py", *setting.arguments, "--output", str(output)
    )
    # A session of its own: a group that is killed must not be ours.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(KILL_AT=kill_at(kill)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore SIGINT, and the launch would inherit that.
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
    """Whether the run came to its end; the launcher's exit code does not tell a kill."""
    return (output / "summary.json").exists()


def difference(output: Path, reference: Path) -> str | None:
    """In what a run is not the reference bit for bit, or None."""
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
    """All that DeepSpeed saved of the last step, but for the wall time."""
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
    """Train below ``folder``, killed by each of ``kills`` in turn, until the run is complete; compare it.

    A run that is complete before all kills have come makes room for another. Every kill is answered for.

    Raises:
        RuntimeError: a kill does not come in a whole run.
    """
    outcomes: list[Outcome] = []
    belonging: list[Outcome] = []
    waiting, runs = list(kills), 0
    while waiting or belonging:
        output = folder / f"run-{runs}"
        kill = waiting.pop(0) if waiting else None
        start(setting, output, kill)
        if kill is not None and not is_complete(output):
            belonging.append(Outcome(setting, kill))
            print(f"  killed: {kill}", flush=True)
            continue
        if kill is not None:
            if not belonging:
                raise RuntimeError(f"a whole run does not come to this: {kill}")
            print(f"  the run ended before: {kill}", flush=True)
            waiting.append(kill)
        found = difference(output, reference)
        print(f"  complete, {found or 'equal'}, after {len(belonging)} kills", flush=True)
        for outcome in belonging:
            outcome.difference = found
        outcomes, belonging, runs = [*outcomes, *belonging], [], runs + 1
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Kill as often as asked; return 1 if a run came out another."""
    words = list(sys.argv[1:] if argv is None else argv)
    before = context("benchmarks.kill_resume", words)
    parser = argparse.ArgumentParser(prog="benchmarks.kill_resume", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=positive, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    add_json(parser)
    arguments = parser.parse_args(words)
    dice = random.Random(arguments.seed)
    settings = [Setting(1, "fp32"), Setting(2, "fp32"), Setting(1, "fp16", image_size=8)]  # CPUs are slow at fp16
    moments = list(MOMENTS)
    plans: dict[Setting, list[Kill]] = {setting: [] for setting in settings}
    for number in range(arguments.kills):
        # Every moment in every setting, as far as the kills go.
        setting = settings[number % len(settings)]
        plans[setting].append(draw(dice, setting, moments[number // len(settings) % len(moments)]))
    outcomes = []
    for setting, kills in plans.items():
        if not kills:
            continue
        print(f"{setting.ranks} ranks, {setting.precision}: {len(kills)} kills, seed {arguments.seed}", flush=True)
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
    table = format_report(report)
    print("\n" + table, end="")
    if arguments.json is not None:
        write(arguments.json, report, table)
    return 0 if report["survived"] == report["kills"] else 1


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown: survived of killed, for each moment and setting."""
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
        "Each kill is SIGKILL, of one rank or of the whole launch, at a moment that is drawn (seed "
        f"{report['settings']['seed']}). The same command goes on, is killed again, and at last completes. A kill "
        "survived if the run that it belongs to then has the undisturbed run's metrics.jsonl, timings aside, and its "
        "last checkpoint: weights, momentum, running averages, loss scale."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
