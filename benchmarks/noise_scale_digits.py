"""How the gradient noise scale changes during training: the first run, the digits at batch 512, with several seeds.

Real ``deepspeed`` launches measure it at every step. The table has the values in ``metrics.jsonl`` after some epochs
for each seed, smoothed over about 20 measurements (fewer in the first rows).

    python -m benchmarks.noise_scale_digits --json benchmarks/results/noise_scale_digits_cpu.json
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import deepspeed_command, run_ok
from benchmarks.report import context, heading, new_parser, positive, publish
from recipe.plan import DIGITS_IMAGES
from recipe.reporting import read_events

CONFIG = "ds_configs/digits_b512.json"
BATCH, STEPS_PER_EPOCH = 512, 2
AFTER_EPOCHS = (5, 10, 15, 20, 25, 30, 35, 40)
VALUES = ("noise_scale", "gradient_variance", "gradient_norm_squared")


def main(words: Sequence[str]) -> int:
    """Train; print a table and, with ``--json``, write it and the JSON."""
    parser = new_parser("benchmarks.noise_scale_digits", __doc__)
    parser.add_argument("--seeds", type=positive, default=5, help="number of runs (default: %(default)s)")
    arguments, before = parser.parse_args(words), context("benchmarks.noise_scale_digits", words)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(seed, Path(folder, str(seed))) for seed in range(arguments.seeds)]
    report = before | {"training_images": DIGITS_IMAGES["train"], "results": results}
    publish(report, format_report(report), arguments.json)
    return 0


def measure(seed: int, output: Path) -> dict[str, Any]:
    """Train one seed to completion; return the measurements after ``AFTER_EPOCHS``."""
    changes = {"recipe.noise_scale.enabled": "true", "recipe.noise_scale.every_steps": 1, "recipe.seed": seed}
    overrides = [f"--set={key}={value}" for key, value in changes.items()]
    words = ("--deepspeed_config", CONFIG, "--output", str(output), *overrides)
    run_ok(deepspeed_command(1, "recipe/train.py", *words))
    return {"seed": seed, "after_epoch": after_epochs(read_events(output))}


def after_epochs(events: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The last measurement before the end of each of ``AFTER_EPOCHS``; the keys are strings, as in JSON."""
    measured = [event for event in events if event["event"] == "noise_scale"]
    found = {}
    for epoch in AFTER_EPOCHS:
        before = [event for event in measured if event["step"] < epoch * STEPS_PER_EPOCH]
        found[str(epoch)] = {name: before[-1][name] for name in VALUES}
    return found


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    results = report["results"]
    seeds = [f"seed {result['seed']}" for result in results]
    lines = [
        *heading(f"The gradient noise scale during training: digits, batch {BATCH}, measured at every step", report),
        "In images; a dash means that the mean gradient is indistinguishable from its noise. There are "
        f"{report['training_images']:,} training images. No times are given: the machine also did other work.",
        "",
        f"| after epoch | {' | '.join(seeds)} |",
        f"|---|{'---|' * len(seeds)}",
    ]
    for epoch in map(str, AFTER_EPOCHS):
        scales = [result["after_epoch"][epoch]["noise_scale"] for result in results]
        lines.append(f"| {epoch} | {' | '.join('–' if scale is None else f'{scale:,.0f}' for scale in scales)} |")
    lines += [
        "",
        "tr(Σ) of the per-image gradient / |G|²; their ratio is the noise scale:",
        "",
        f"| after epoch | {' | '.join(seeds)} |",
        f"|---|{'---|' * len(seeds)}",
    ]
    for epoch in map(str, AFTER_EPOCHS):
        values = [result["after_epoch"][epoch] for result in results]
        pairs = [f"{value['gradient_variance']:.3g} / {value['gradient_norm_squared']:.2g}" for value in values]
        lines.append(f"| {epoch} | {' | '.join(pairs)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
