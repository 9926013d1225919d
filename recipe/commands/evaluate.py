"""``python -m recipe evaluate``: accuracy, confusion and calibration of a trained model, on one or more ranks."""

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.checkpoints import CHECKPOINTS
from recipe.commands import refusing
from recipe.commands.figure import new_figure, save_figure
from recipe.config import printable
from recipe.distributed import find_placement
from recipe.plan import columns
from recipe.reporting import Parser, accuracy_words, table, within

if TYPE_CHECKING:
    from recipe.commands.measure import Measured
    from recipe.commands.trained import Trained

RESULT, PER_CLASS, CONFUSION = "evaluation.json", "per_class.csv", "confusion"
SHOWN_CLASSES = 15
MOST_NAMED_CLASSES = 40  # on the axes of the confusion matrix; more labels would overlap
MOST_NUMBERED_CLASSES = 20  # whose counts fit the cells of the confusion matrix
COUNT = within(1, 1_000_000)


@refusing
def main(argv: Sequence[str]) -> int:
    """Evaluate; return 0, or 2 if the input is refused."""
    parser = Parser(
        prog="python -m recipe evaluate",
        description="Measure accuracy, confusion and calibration of a trained model. On several ranks: "
        "deepspeed --no_local_rank --module recipe evaluate …",
    )
    add_model_options(parser, "evaluation")
    data_help = "folder with val/, one folder per class, a pack, or a Hugging Face data set (default: the run's data)"
    size_help = "pixels per side (default: as in the run's validation)"
    parser.add_argument("--data", help=data_help)
    parser.add_argument("--image-size", type=within(8, 4096), metavar="S", help=size_help)
    parser.add_argument("--micro-batch", type=COUNT, metavar="N", help="images per forward pass (default: the run's)")
    arguments = parser.parse_args(argv)
    os.environ |= find_placement(os.environ).variables()
    trained = load(arguments)
    from recipe.commands.measure import measure

    measured = measure(trained, arguments.data, arguments.image_size, arguments.micro_batch, arguments.workers)
    if measured is None:
        return 0  # rank 0 has the result
    output = arguments.output or default_output(arguments.model, "evaluation")
    write(measured, output)
    print(format_evaluation(measured.summary))
    print(f"\nin {printable(str(output))}: {RESULT}, {PER_CLASS}, {CONFUSION}.csv, .png, .svg")
    return 0


def add_model_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Add the options shared by commands that use a trained model and write into a ``results`` folder."""
    model_help = "a run, or an export: its folder or its model.safetensors"
    workers_help = "processes that read images (default: 0)"
    parser.add_argument("model", type=Path, metavar="RUN_DIR|EXPORT", help=model_help)
    parser.add_argument("--checkpoint", default="best", help='"best", "last" or a name such as step-00000150')
    parser.add_argument("--workers", type=within(0, 1000), default=0, metavar="N", help=workers_help)
    parser.add_argument("--output", type=Path, help=f"folder to write to (default: {results}/ in the run, or here)")


def load(arguments: argparse.Namespace) -> "Trained":
    """The model that the command line names. Imports torch, which takes seconds."""
    from recipe.train import set_up_torch

    set_up_torch()
    from recipe.commands.trained import read_trained

    return read_trained(arguments.model, arguments.checkpoint)


def write(measured: "Measured", output: Path) -> None:
    """Write the summary, the table per class, and the confusion matrix as CSV and pictures into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT).write_text(json.dumps(measured.summary, indent=2) + "\n", encoding="utf-8")
    head = ["class", "images", "correct", "accuracy_percent", "most_often_taken_for", "times"]
    rows = [(row | {"accuracy": f"{row['accuracy']:.4f}"}).values() for row in measured.summary["classes"]]
    matrix = [[name, *counts] for name, counts in zip(measured.classes, measured.confusion, strict=True)]
    tables = {PER_CLASS: [head, *rows], f"{CONFUSION}.csv": [["true class \\ predicted", *measured.classes], *matrix]}
    for name, lines in tables.items():
        with (output / name).open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(lines)
    draw_confusion(measured, output / CONFUSION)


def draw_confusion(measured: "Measured", path: Path) -> None:
    """Draw the confusion matrix as PNG and SVG; each row is in per cent of its class's images."""
    import numpy as np

    counts = np.array(measured.confusion, dtype=np.float64)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    classes = len(measured.classes)
    side = min(14.0, max(5.0, 0.35 * classes + 2))
    figure, axes = new_figure(size=(side + 1, side))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="share of the class's images, %", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"Confusion on {counts.sum():,.0f} images: top-1 {measured.summary['top1']:.2f} %", pad=12)
    if classes <= MOST_NAMED_CLASSES:
        names = [printable(name)[:24] for name in measured.classes]
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
    if classes <= MOST_NUMBERED_CLASSES:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour)
    save_figure(figure, path)


def format_evaluation(result: dict[str, Any]) -> str:
    """The overall numbers, and a table of the classes with the lowest accuracy."""
    rows, bad_images = result["classes"], result["bad_images"]
    shown = [("class", "images", "accuracy", "most often taken for")]
    for row in rows[:SHOWN_CLASSES]:
        taken_for = f"{row['taken_for']} ({row['times']:,})" if row["times"] else ""
        shown.append((printable(row["name"]), f"{row['images']:,}", f"{row['accuracy']:.2f} %", printable(taken_for)))
    lines = [
        printable(f"{result['model']} on {result['data']}"),
        f"{accuracy_words(result['top1'], result['top5'], len(rows))}, loss {result['loss']:.4f} "
        f"on {result['count']:,} images",
        f"expected calibration error {result['expected_calibration_error']:.2f} % "
        f"(mean confidence {result['mean_confidence']:.2f} %)",
        "",
        table(shown, columns()).rstrip(),
    ]
    if len(rows) > SHOWN_CLASSES:
        lines.append(f"… and {len(rows) - SHOWN_CLASSES:,} classes with higher accuracy")
    if bad_images:
        names = ", ".join(map(printable, bad_images[:5]))
        lines += ["", f"{len(bad_images):,} files could not be read and were left out: {names}"]
    return "\n".join(lines)


def default_output(model: Path, results: str) -> Path:
    """The default output folder: inside a run, or in the current folder for an export, which stays unchanged."""
    return model / results if (model / CHECKPOINTS).is_dir() else Path(results)
