"""The mathematics behind linear scaling, measured on a model of the recipe and real handwritten digits.

1. How far the weights move: from the same weights, k steps of plain SGD at rate η on batches of n = 32 images, versus
   one step at kη on the same k · n images (Goyal et al. 2017, §2.1), at several points of a training run. η is the
   run's rate at that point, scaled to n images and divided by 1 - momentum, its effective rate over many steps.
2. How the gradient falls: |∇L|² over all training images, in runs at several batch sizes under the linear rule, with
   momentum and warmup as in the recipe, and without decay.

Batch norm always covers n images, so that a larger batch is more of the same samples. Images are not augmented, so that
L is a fixed function. The output is a table, the numbers and two figures.

    python -m benchmarks.update_magnitude --json benchmarks/results/update_magnitude_cpu.json
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.report import context, heading, new_parser, positive, publish
from recipe.commands.figure import new_figure, save_figure
from recipe.data import Keys, epoch_permutation, open_digits
from recipe.model import build_model, parameter_groups, update_running_averages
from recipe.plan import PIXEL_MEAN_STD, RateSchedule, scaled_rate
from recipe.train import set_up_torch

IMAGE_SIZE, CLASSES = 16, 10
N = 32
REFERENCE_RATE, REFERENCE_BATCH, MOMENTUM, WEIGHT_DECAY = 0.1, 256, 0.9, 1e-4
KS = (2, 4, 8, 16, 32)
POINTS = {0: "the start", 1: "epoch 1", 8: "epoch 8", 20: "epoch 20, after the decay"}
DECAY_EPOCH, DECAY_FACTOR, WARMUP_EPOCHS = 16, 0.1, 5
BATCHES = (64, 128, 256, 512)
MEASURED_EPOCHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
CLOSE = 0.1  # relative difference up to which two lengths count as equal

Gradient = Callable[[Tensor, Tensor], Tensor]
"""The gradient (P,) of the mean loss, from weights (P,) and image indices (m,)."""


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write it, the JSON and the figures."""
    arguments, before = parse_arguments(words), context("benchmarks.update_magnitude", words)
    set_up_torch()
    problem = Digits()
    results = {
        "moves": measure_moves(problem, arguments.draws),
        "convergence": measure_convergence(problem, arguments.seeds),
    }
    report = before | {"settings": {"draws": arguments.draws, "seeds": arguments.seeds}, "results": results}
    publish(report, format_report(report), arguments.json)
    if arguments.json is not None:
        draw_moves(results["moves"], arguments.json.with_suffix(""))
        draw_convergence(results["convergence"], arguments.json.with_name(f"{arguments.json.stem}_convergence"))
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("benchmarks.update_magnitude", __doc__, "table and figures are written next to it")
    parser.add_argument("--draws", type=positive, default=4, help="draws of images for each k (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=2, help="runs per batch size (default: %(default)s)")
    return parser.parse_args(words)


class Digits:
    """The training images and the recipe's model for them, with its loss as a function of a weight vector."""

    def __init__(self) -> None:
        training, _ = open_digits(image_size=IMAGE_SIZE, crop="none", flip=False, seed=0)
        batch = training[Keys(0, np.arange(len(training)))]
        (mean_, *_), (std, *_) = PIXEL_MEAN_STD["digits"]
        self.images = (batch.images.movedim(-1, 1).float() / 255 - mean_) / std
        self.labels = batch.labels
        self.model = build_model("test_resnet", CLASSES, seed=0, statistics=N).train()

    def new_weights(self, seed: int) -> Tensor:
        """The initial weights for a seed."""
        return parameters_to_vector(build_model("test_resnet", CLASSES, seed, statistics=N).parameters()).detach()

    def gradient(self, weights: Tensor, indices: Tensor) -> Tensor:
        """See ``Gradient``."""
        vector_to_parameters(weights, self.model.parameters())
        loss = F.cross_entropy(self.model(self.images[indices]), self.labels[indices])
        parts = torch.autograd.grad(loss, list(self.model.parameters()))
        update_running_averages(self.model, discard=torch.tensor(True))
        return parameters_to_vector(parts)

    def full_norm_squared(self, weights: Tensor) -> float:
        """|∇L|² over all full groups of n images, always the same groups."""
        groups = epoch_permutation(0, 0, len(self.labels))[: len(self.labels) // N * N].split(N)
        return float(torch.stack([self.gradient(weights, group) for group in groups]).mean(0).square().sum())

    def train(
        self, seed: int, batch: int, rate: RateSchedule, epochs: int, at_epoch: Callable[[int, Tensor], None]
    ) -> None:
        """Train like the recipe; call ``at_epoch`` with the weights (P,) before the first epoch (0) and after each."""
        model = self.model
        weights = self.new_weights(seed)
        optimizer = torch.optim.SGD(parameter_groups(model, WEIGHT_DECAY), lr=0.1, momentum=MOMENTUM, nesterov=True)
        step = 0
        for epoch in range(epochs + 1):
            at_epoch(epoch, weights.clone())
            if epoch == epochs:
                break
            vector_to_parameters(weights, model.parameters())
            order = epoch_permutation(seed, epoch, len(self.labels))
            for indices in order[: len(order) // batch * batch].split(batch):
                for group in optimizer.param_groups:
                    group["lr"] = rate.rate(step)
                optimizer.zero_grad()
                F.cross_entropy(model(self.images[indices]), self.labels[indices]).backward()
                update_running_averages(model, discard=torch.tensor(True))
                optimizer.step()
                step += 1
            weights = parameters_to_vector(model.parameters()).detach()


def many_steps(weights: Tensor, batches: Sequence[Tensor], rate: float, gradient: Gradient) -> Tensor:
    """The weights after one step of plain SGD on each batch."""
    for batch in batches:
        weights = weights - rate * gradient(weights, batch)
    return weights


def one_step(weights: Tensor, batches: Sequence[Tensor], rate: float, gradient: Gradient) -> Tensor:
    """The weights after one step on all k batches, of equal size, at k times the rate."""
    return weights - rate * torch.stack([gradient(weights, batch) for batch in batches]).sum(0)


def compare(many: Tensor, one: Tensor) -> dict[str, float]:
    """Compare two moves (P,): length ratio, cosine, and distance, relative to the length of ``one``."""
    return {
        "length_ratio": float(many.norm() / one.norm()),
        "cosine": float(F.cosine_similarity(many, one, dim=0)),
        "apart": float((many - one).norm() / one.norm()),
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of a power law: the slope of a least-squares line on logarithmic axes."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure_moves(problem: Digits, draws: int) -> list[dict[str, Any]]:
    """Part 1: for each point of a run at the reference batch and each k, one comparison per draw of images."""
    steps = len(problem.labels) // REFERENCE_BATCH
    decay = RateSchedule(REFERENCE_RATE, REFERENCE_RATE, "none", 0, "linear", (DECAY_EPOCH * steps,), DECAY_FACTOR)
    generator = torch.Generator().manual_seed(0)
    found = []

    def at_epoch(epoch: int, weights: Tensor) -> None:
        if epoch not in POINTS:
            return
        rate = decay.rate(epoch * steps) * N / REFERENCE_BATCH / (1 - MOMENTUM)
        for k in KS:
            comparisons = []
            for _ in range(draws):
                batches = torch.randperm(len(problem.labels), generator=generator)[: k * N].split(N)
                ends = [way(weights, batches, rate, problem.gradient) for way in (many_steps, one_step)]
                comparisons.append(compare(*(end - weights for end in ends)))
            found.append({"epoch": epoch, "rate": rate, "k": k, "draws": comparisons})

    problem.train(0, REFERENCE_BATCH, decay, max(POINTS), at_epoch)
    return found


def measure_convergence(problem: Digits, seeds: int) -> list[dict[str, Any]]:
    """Part 2: for each batch size, |∇L|² after some epochs, one list per seed."""
    found = []
    for batch in BATCHES:
        steps = len(problem.labels) // batch
        peak = scaled_rate(REFERENCE_RATE, REFERENCE_BATCH, batch, "linear")
        warms_up = batch > REFERENCE_BATCH
        rate = RateSchedule(
            REFERENCE_RATE if warms_up else peak,
            peak,
            "gradual" if warms_up else "none",
            WARMUP_EPOCHS * steps if warms_up else 0,
            "linear",
            (),
            DECAY_FACTOR,
        )
        runs = []
        for seed in range(seeds):
            norms: list[float] = []

            def at_epoch(epoch: int, weights: Tensor, norms: list[float] = norms) -> None:
                if epoch in MEASURED_EPOCHS:
                    norms.append(problem.full_norm_squared(weights))

            problem.train(seed, batch, rate, max(MEASURED_EPOCHS), at_epoch)
            runs.append(norms)
        found.append(
            {
                "batch": batch,
                "steps": [epoch * steps for epoch in MEASURED_EPOCHS],
                "norms_squared": runs,
                "slope": slope([epoch * steps for epoch in MEASURED_EPOCHS], geometric_means(runs)),
            }
        )
    return found


def geometric_means(runs: Sequence[Sequence[float]]) -> list[float]:
    """The geometric mean over runs at each time."""
    return [float(np.exp(np.log(values).mean())) for values in zip(*runs, strict=True)]


def largest_close_k(moves: Sequence[dict[str, Any]], epoch: int) -> int:
    """The largest k up to which the mean length ratio is within ``CLOSE`` of 1; at least 1, where it is trivially 1."""
    largest = 1
    for move in (move for move in moves if move["epoch"] == epoch):
        if abs(mean(draw["length_ratio"] for draw in move["draws"]) - 1) > CLOSE:
            break
        largest = move["k"]
    return largest


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    moves, convergence = report["results"]["moves"], report["results"]["convergence"]
    lines = [
        *heading(f"The mathematics of linear scaling on real digits: test_resnet, {IMAGE_SIZE} px", report),
        f"k steps at η on {N} images each, versus one step at kη on the same images; means of "
        f"{report['settings']['draws']} draws.",
        "",
        "| from | η | k | length of k steps ÷ one step's (min–max) | cosine | distance of ends ÷ one step's length |",
        "|---|---|---|---|---|---|",
    ]
    for move in moves:
        ratios, cosines, apart = ([draw[key] for draw in move["draws"]] for key in ("length_ratio", "cosine", "apart"))
        lines.append(
            f"| {POINTS[move['epoch']]} | {move['rate']:.4g} | {move['k']} | {mean(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}) | {mean(cosines):.2f} | {mean(apart):.2f} |"
        )
    close = "; ".join(
        f"from {name} {f'up to k = {k}' if (k := largest_close_k(moves, epoch)) > 1 else 'for no k'}"
        for epoch, name in POINTS.items()
    )
    lines += [
        "",
        f"Both ways move the weights equally far, within {CLOSE:.0%}: {close}.",
        "",
        f"|∇L|² over all training images (runs per batch: {report['settings']['seeds']}; geometric mean if several); "
        "the slope is the exponent of T in steps, from the end of epoch 1 on.",
        "",
        f"| batch | {' | '.join(f'epoch {epoch}' for epoch in MEASURED_EPOCHS)} | slope |",
        f"|{'---|' * (len(MEASURED_EPOCHS) + 2)}",
    ]
    for run in convergence:
        shown = " | ".join(f"{value:.1e}" for value in geometric_means(run["norms_squared"]))
        lines.append(f"| {run['batch']} | {shown} | {run['slope']:.2f} |")
    slopes = [run["slope"] for run in convergence]
    steeper = sum(value <= -0.5 for value in slopes)
    lines += [
        "",
        f"Of {len(slopes)} slopes, {steeper} are at least as steep as the -0.5 of the bound O(1/√T) "
        f"({min(slopes):.2f} to {max(slopes):.2f}). This is consistent with an upper bound; it does not show that "
        "|∇L|² falls as a power of T.",
    ]
    return "\n".join(lines) + "\n"


def draw_moves(moves: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw part 1 as PNG and SVG."""
    figure, (lengths, apart) = new_figure(1, 2, size=(11, 5))
    for axes, key in ((lengths, "length_ratio"), (apart, "apart")):
        for epoch, name in POINTS.items():
            values = [[draw[key] for draw in move["draws"]] for move in moves if move["epoch"] == epoch]
            (line,) = axes.plot(KS, [mean(v) for v in values], marker="o", markersize=4, label=f"from {name}")
            axes.fill_between(
                KS, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color()
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(KS, [str(k) for k in KS])
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.set_xlabel(f"k: steps of {N} images at η, or one step of k × {N} images at kη")
    lengths.axhspan(1 - CLOSE, 1 + CLOSE, color="black", alpha=0.08)
    lengths.set_title("Length of k steps, relative to one step's length")
    apart.set_title("Distance between both ends, relative to one step's length")
    lengths.legend(frameon=False)
    save_figure(figure, file)


def draw_convergence(convergence: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw part 2 as PNG and SVG."""
    figure, (by_steps, by_images) = new_figure(1, 2, size=(11, 5))
    for run in convergence:
        values, label = geometric_means(run["norms_squared"]), f"batch {run['batch']}: slope {run['slope']:.2f}"
        by_steps.plot(run["steps"], values, marker="o", markersize=4, label=label)
        by_images.plot([step * run["batch"] for step in run["steps"]], values, marker="o", markersize=4)
    first = convergence[0]
    start = geometric_means(first["norms_squared"])[0]
    bound = [start * (first["steps"][0] / step) ** 0.5 for step in first["steps"]]
    by_steps.plot(first["steps"], bound, color="black", linestyle="--", linewidth=1, label="1/√T: slope -0.50")
    for axes, label in ((by_steps, "T, optimizer steps"), (by_images, "images seen")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")  # new_figure draws no formulas, such as matplotlib's powers of ten
        axes.set_xlabel(label)
    by_steps.set_ylabel("|∇L|² over all training images")
    by_steps.set_title("Fewer steps at a larger batch …")
    by_images.set_title("… on as many images")
    by_steps.legend(frameon=False)
    save_figure(figure, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
