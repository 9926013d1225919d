"""Hardware independence: how the number of ranks, the micro-batch and loader workers affect training.

Real runs train the digits at a global batch of 512 for 50 steps, split in every way into 1, 2 and 4 ranks,
micro-batches of 16 to 128 and 0 or 2 loader processes per rank. The report has

1. ``"statistics": 32`` in double precision: every loss of every split, compared with the reference, one rank with
   micro-batches of 64. Training is chaotic and amplifies rounding, so only double precision can tell identical training
   from different training. One rank with micro-batches of 16 cannot hold 32 images, so it and a few other splits have
   ``"statistics": 16``;
2. the same in fp32, and "global" and "local" statistics in double precision, where the split decides what is trained;
3. fp32: one optimizer step from the same checkpoint, early and late in training, on several splits: how far the weights
   diverge, relative to how far the step moves them;
4. fp32: final accuracies of ten seeds, each on the reference and on a different split. The split matters no more than
   the seed if an F test does not find a larger variance within these pairs than between seeds.

    python -m benchmarks.hardware_independence --json benchmarks/results/hardware_independence_cpu.json
"""

import itertools
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
import torch

from benchmarks.launch import run_direct
from benchmarks.report import context, heading, new_parser, positive, publish, say
from recipe.commands.figure import new_figure, save_figure
from recipe.reporting import read_events

BATCH, EPOCHS, STEPS_PER_EPOCH = 512, 25, 2
N = 32
FP64 = {"recipe.precision": "fp64"}
LOSS_TOLERANCE = 1e-9
STEP_TOLERANCE = 1e-5
EARLY_STEP, LATE_STEP = 2, 46  # of 50: in the warmup, and at the lowest rate
SEEDS = 10
SIGNIFICANCE = 0.05


class Split(NamedTuple):
    """How a global batch is split into ranks and micro-batches."""

    ranks: int
    micro_batch: int
    workers: int = 0

    def __str__(self) -> str:
        workers = f", {self.workers} workers" if self.workers else ""
        return f"{self.ranks} × {BATCH // self.ranks // self.micro_batch} × {self.micro_batch}{workers}"


REFERENCE = Split(1, 64)
SPLITS = [Split(*split) for split in itertools.product((1, 2, 4), (16, 32, 64, 128), (0, 2))]
# For each n, the splits whose ranks can hold n images.
GRID = [(N, split) for split in SPLITS if split.ranks * split.micro_batch >= N]
GRID += [(16, split) for split in (Split(1, 16), Split(1, 16, 2), Split(2, 128, 2), Split(4, 32))]
OTHERS = [Split(1, 32), Split(1, 128), Split(2, 16), Split(2, 128), Split(4, 16), Split(4, 128)]
# "global" batch norm sees ranks × micro-batch images, 64 in the reference and in the first of these; "local" sees a
# micro-batch, 64 in the last.
DEPENDENT = [Split(2, 32), Split(1, 128), Split(4, 64)]


class Runs:
    """Launches runs in subfolders of a folder."""

    def __init__(
        self,
        folder: Path,
        epochs: int,
        jobs: int = 1,
        run: Callable[..., Any] = run_direct,
        model: str = "test_resnet",
    ) -> None:
        """``jobs`` is the number of parallel runs; ``run`` runs one to completion; ``model`` is a timm model's name."""
        self.folder = folder
        self.epochs = epochs
        self.model = model
        self.jobs = jobs
        self.run = run

    def train_all(self, cases: Sequence[tuple[Split, dict[str, Any]]]) -> list[Path]:
        """Train each split with its config changes to completion; return the output folders."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda case: self.train(*case), cases))

    def train(self, split: Split, changes: dict[str, Any]) -> Path:
        """Train to completion; return the output folder."""
        output = Path(tempfile.mkdtemp(dir=self.folder), "run")
        self._launch("recipe/train.py", split, output, changes, exit_code=0)
        return output

    def train_one_step(self, split: Split, output: Path) -> None:
        """Continue for a single step from the newest checkpoint in ``output``."""
        self._launch("benchmarks/killed_train.py", split, output, {}, exit_code=143, KILL_AT="window 1 0 TERM")

    def _launch(
        self, script: str, split: Split, output: Path, changes: dict[str, Any], exit_code: int, **variables: str
    ) -> None:
        values = {
            "train_batch_size": BATCH,
            "recipe.model.name": self.model,
            "recipe.batchnorm.statistics": N,
            "recipe.max_micro_batch_size": split.micro_batch,
            "recipe.data.workers": split.workers,
            "recipe.schedule.epochs": self.epochs,
            "recipe.schedule.decay_epochs": [round(0.6 * self.epochs, 1), round(0.8 * self.epochs, 1)],
            "recipe.schedule.warmup_epochs": min(5, self.epochs),
        } | changes
        overrides = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
        config = ("--deepspeed_config", "ds_configs/digits_b512.json")
        arguments = (*config, "--output", str(output), *overrides)
        done = self.run(*arguments, ranks=split.ranks, script=script, **variables)
        if done.returncode != exit_code:
            raise RuntimeError(f"{split} with {changes} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        say(f"  {split}{', one step' if variables else ''} {changes or ''}")


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    """The ``metrics.jsonl`` events of one kind."""
    return [event for event in read_events(output) if event["event"] == kind]


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """The relative difference of every step's loss, and whether all validation results are equal."""
    pairs = zip(events(ours, "step"), events(theirs, "step"), strict=True)
    hits = [
        [(line["top1"], line["top5"], line["count"]) for line in events(output, "validation")]
        for output in (ours, theirs)
    ]
    return {
        "differences": [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs],
        "same_validations": hits[0] == hits[1],
    }


def weights(output: Path, step: int) -> torch.Tensor:
    """All weights of a checkpoint as one vector, in double precision."""
    file = output / f"checkpoints/step-{step:08}/mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)["module"]
    return torch.cat([state[name].double().flatten() for name in sorted(state) if "running" not in name])


def run_with_all_checkpoints(runs: Runs) -> Path:
    """Train in fp32 on the reference split, keeping a checkpoint of every step."""
    every_step = {"recipe.checkpoint.every_steps": 1, "recipe.checkpoint.keep_last": runs.epochs * STEPS_PER_EPOCH}
    return runs.train(REFERENCE, every_step)


def one_step(runs: Runs, base: Path, start: int, splits: Sequence[Split]) -> dict[str, Any]:
    """How far the weights diverge between splits in one step from a checkpoint of ``base``, relative to its length."""
    before = weights(base, start)

    def stepped(split: Split) -> torch.Tensor:
        output = Path(tempfile.mkdtemp(dir=runs.folder), "run")
        shutil.copytree(base, output)
        (output / "summary.json").unlink()
        for checkpoint in (output / "checkpoints").glob("step-*"):
            if checkpoint.name != f"step-{start:08}":
                shutil.rmtree(checkpoint)
        runs.train_one_step(split, output)
        return weights(output, start + 1)

    with ThreadPoolExecutor(runs.jobs) as pool:
        reference, *others = pool.map(stepped, (REFERENCE, *splits))
    update = float((reference - before).norm())
    return {
        "from_step": start,
        "rate": events(base, "step")[start]["lr"],
        "update_norm": update,
        "weights_norm": float(before.norm()),
        "parts_by": {
            str(split): float((other - reference).norm()) / update for split, other in zip(splits, others, strict=True)
        },
    }


def main(words: Sequence[str]) -> int:
    """Run everything; return 1 if a split changed a result that must not change."""
    before = context("benchmarks.hardware_independence", words)
    parser = new_parser("benchmarks.hardware_independence", __doc__, "table and plots are written next to it")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), EPOCHS, arguments.jobs)
        results = same_training(runs) | fp32(runs) | other_trainings(runs)
    settings = {"batch": BATCH, "n": N, "steps": EPOCHS * STEPS_PER_EPOCH, "reference": str(REFERENCE)}
    report = before | {"settings": settings, "results": results}
    publish(report, format_report(report), arguments.json)
    if arguments.json is not None:
        plot(report, arguments.json.with_suffix(""))
    return 0 if holds(results) else 1


def same_training(runs: Runs) -> dict[str, Any]:
    """Part 1: double precision, batch norm over n images."""
    found = {}
    for n, cases in itertools.groupby(GRID, key=lambda case: case[0]):
        say(f"fp64, batch norm over {n} images")
        splits = [split for _, split in cases]
        changes = FP64 | {"recipe.batchnorm.statistics": n}
        reference, *others = runs.train_all([(split, changes) for split in (REFERENCE, *splits)])
        for split, other in zip(splits, others, strict=True):
            found[f"n = {n}: {split}"] = compare(other, reference)
    return {"fp64": found}


def other_trainings(runs: Runs) -> dict[str, Any]:
    """Part 2, double precision: statistics that depend on the split."""
    results = {}
    for kind in ("global", "local"):
        say(f'fp64, "{kind}" batch norm')
        changes = FP64 | {"recipe.batchnorm.statistics": kind}
        reference, *others = runs.train_all([(split, changes) for split in (REFERENCE, *DEPENDENT)])
        results[kind] = {str(split): compare(other, reference) for split, other in zip(DEPENDENT, others, strict=True)}
    return results


def fp32(runs: Runs) -> dict[str, Any]:
    """Parts 2 to 4 in fp32: losses, single steps, and the final top-1, in per cent, of pairs of splits."""
    say(f"fp32, batch norm over {N} images")
    reference = run_with_all_checkpoints(runs)
    outputs = dict(zip(OTHERS, runs.train_all([(split, {}) for split in OTHERS]), strict=True))
    return {
        "fp32": {str(split): compare(output, reference) for split, output in outputs.items()},
        "one_step": [one_step(runs, reference, step, OTHERS) for step in (EARLY_STEP, LATE_STEP)],
        "accuracies": accuracies(runs),
    }


def accuracies(runs: Runs) -> list[dict[str, Any]]:
    """Part 4: for each seed, the final top-1 in per cent on the reference and on a different split."""
    pairs = [(REFERENCE, OTHERS[seed % len(OTHERS)]) for seed in range(SEEDS)]
    cases = [(split, {"recipe.seed": seed}) for seed, pair in enumerate(pairs) for split in pair]
    final = [float(events(output, "validation")[-1]["top1"]) for output in runs.train_all(cases)]
    return [
        {"seed": seed, "split": str(split), "reference": final[2 * seed], "other": final[2 * seed + 1]}
        for seed, (_, split) in enumerate(pairs)
    ]


def holds(results: dict[str, Any]) -> bool:
    """Whether all results that must not depend on the split agree."""
    same = all(
        max(found["differences"]) <= LOSS_TOLERANCE and found["same_validations"] for found in results["fp64"].values()
    )
    # Of a split's steps the closest: rounding that takes one activation across ReLU's kink moves a step by up to 1e-3,
    # now and then; a dependence on the split moves every step.
    of_splits = zip(*(found["parts_by"].values() for found in results["one_step"]), strict=True)
    step = all(min(parts) <= STEP_TOLERANCE for parts in of_splits)
    return same and step and p_value(results["accuracies"]) >= SIGNIFICANCE


def scatter(pairs: list[dict[str, Any]]) -> tuple[float, float]:
    """Standard deviations of the final top-1: between two splits of a seed, and between seeds on the reference."""
    within = statistics.mean((pair["other"] - pair["reference"]) ** 2 / 2 for pair in pairs)
    return within**0.5, statistics.stdev(pair["reference"] for pair in pairs)


def p_value(pairs: list[dict[str, Any]]) -> float:
    """The p-value of a one-sided F test that splits vary more than seeds."""
    within, over_seeds = scatter(pairs)
    return float(scipy.stats.f.sf((within / over_seeds) ** 2, len(pairs), len(pairs) - 1))


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, results = report["settings"], report["results"]
    lines = [
        *heading(f"Identical training on {len(results['fp64'])} splits of a batch of {settings['batch']}", report),
        f"Ranks × accumulation × micro-batch, {settings['steps']} steps on the digits (test_resnet), compared with the "
        f"reference, {settings['reference']}.",
        "",
        "| batch norm over n images, fp64 | largest relative loss difference | validations |",
        "|---|---|---|",
    ]
    for split, found in results["fp64"].items():
        same = "same top-1, top-5 and count" if found["same_validations"] else "**different**"
        lines.append(f"| {split} | {max(found['differences']):.1e} | {same} |")
    lines += ["", "| | relative loss difference at step 1 | 10 | last |", "|---|---|---|---|"]
    names = {
        "fp32": f"batch norm over {settings['n']} images, fp32",
        "global": '"global", fp64',
        "local": '"local", fp64',
    }
    for kind, name in names.items():
        for split, found in results[kind].items():
            at = [found["differences"][step] for step in (1, 10, -1)]
            lines.append(f"| {name}: {split} | {' | '.join(f'{difference:.1e}' for difference in at)} |")
    lines += ["", "| one fp32 step from the same checkpoint | weight difference ÷ update norm |", "|---|---|"]
    for found in results["one_step"]:
        worst = max(found["parts_by"], key=found["parts_by"].__getitem__)
        lines.append(
            f"| from step {found['from_step']}, rate {found['rate']:.4g}, ‖update‖ {found['update_norm']:.3g}, "
            f"‖weights‖ {found['weights_norm']:.3g} | at most {found['parts_by'][worst]:.1e} ({worst}) |"
        )
    lines += ["", f"| final top-1, fp32: seed | {settings['reference']} | different split | |", "|---|---|---|---|"]
    for pair in results["accuracies"]:
        lines.append(f"| {pair['seed']} | {pair['reference']:.2f} % | {pair['other']:.2f} % | {pair['split']} |")
    within, over_seeds = scatter(results["accuracies"])
    lines += [
        "",
        f"Standard deviation between two splits of a seed: {within:.2f}; between seeds: {over_seeds:.2f}. F test "
        f"that splits vary more: p = {p_value(results['accuracies']):.2f}.",
        "",
        f"Results that must not depend on the split {'agree' if holds(results) else '**differ**'}.",
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], file: Path) -> None:
    """Plot the differences by step, as PNG and SVG."""
    results, settings = report["results"], report["settings"]
    n, count = settings["n"], len(results["fp64"])
    curves = {  # colours from Okabe and Ito's colour-blind-safe palette
        "local": ('"local", fp64: different training, unless the micro-batch is 64', "#D55E00"),
        "global": ('"global" (SyncBN), fp64: different training, unless ranks × micro-batch is 64', "#E69F00"),
        "fp32": (f"n = {n} images, fp32: the same, until chaos amplifies rounding", "#56B4E9"),
        "fp64": (f"n images, fp64: the same on all {count} splits", "#0072B2"),
    }
    figure, axes = new_figure(size=(10, 6))
    for kind, (label, colour) in curves.items():
        for number, found in enumerate(results[kind].values()):
            shown = [max(difference, 1e-17) for difference in found["differences"]]
            axes.plot(shown, color=colour, linewidth=1.2, label=label if number == 0 else None)
    axes.axhline(LOSS_TOLERANCE, color="black", linestyle="--", linewidth=1)
    axes.text(settings["steps"] - 1, LOSS_TOLERANCE * 1.6, "tolerance of the tests, 1e-9", ha="right")
    axes.set(
        yscale="log",
        xlabel="optimizer step",
        ylabel=f"relative loss difference from {settings['reference']}",
        title="The same config on 1, 2 and 4 ranks, in micro-batches of 16 to 128 (ranks × accumulation × micro-batch)",
        ylim=(5e-18, 30),
        xlim=(0, settings["steps"] - 1),
    )
    axes.yaxis.set_major_formatter("{x:g}")  # 1e-16: new_figure draws no formulas, such as matplotlib's powers of ten
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))
    save_figure(figure, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
