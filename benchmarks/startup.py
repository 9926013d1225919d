"""Time from the command to the first optimizer step, phase by phase.

The digits run is started with ``python`` and with the ``deepspeed`` launcher in turn, with one thread per rank, and
ends after its first step.

    python -m benchmarks.startup --json benchmarks/results/startup_cpu.json
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.launch import deepspeed_command, run_ok
from benchmarks.report import context, heading, new_parser, positive, publish, say
from benchmarks.timed_train import ORDER

SCRIPT = "benchmarks/timed_train.py"
CONFIG = "ds_configs/digits_b512.json"
LAUNCHES: dict[str, int | None] = {"python": None, "deepspeed-1": 1, "deepspeed-2": 2}
NAMES = {"python": "python, 1 rank", "deepspeed-1": "deepspeed, 1 rank", "deepspeed-2": "deepspeed, 2 ranks"}


def main(words: Sequence[str]) -> int:
    """Measure; print a table and, with ``--json``, write it and the JSON."""
    before = context("benchmarks.startup", words, ("torch", "torchvision", "deepspeed", "timm"))
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory() as folder:
        report = before | {
            "settings": {"config": CONFIG, "rounds": arguments.rounds},
            "seconds_to_first_step": starts(Path(folder), arguments.launches, arguments.rounds),
        }
    publish(report, format_report(report), arguments.json)
    return 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("benchmarks.startup", __doc__)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES), help="(default: all)")
    parser.add_argument("--rounds", type=positive, default=5, help="launches of each kind (default: %(default)s)")
    return parser.parse_args(words)


def starts(folder: Path, launches: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """For each kind of launch: median seconds per phase on rank 0, and the total of each round."""
    times: dict[str, list[dict[str, float]]] = {launch: [] for launch in launches}
    for number in range(rounds):
        for launch in launches:
            say(f"round {number + 1} of {rounds}: {NAMES[launch]}")
            times[launch].append(start(folder / f"{launch} {number}", LAUNCHES[launch]))
    return {
        launch: {
            "parts": {part: median(found[part] for found in of_rounds) for part in ORDER},
            "whole": [sum(found.values()) for found in of_rounds],
        }
        for launch, of_rounds in times.items()
    }


def start(output: Path, ranks: int | None) -> dict[str, float]:
    """Start a run with the launcher on ``ranks`` ranks, or, if None, one rank without it; return seconds per phase."""
    words = (SCRIPT, "--deepspeed_config", CONFIG, "--output", str(output))
    command = [sys.executable, *words] if ranks is None else deepspeed_command(ranks, *words)
    times = output.with_suffix(".json")
    run_ok(command, COMMAND_GIVEN=str(time.monotonic()), TIMES_FILE=str(times))
    seconds: dict[str, float] = json.loads(times.read_text())
    return seconds


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, found = report["settings"], report["seconds_to_first_step"]
    rows = {part: [of_launch["parts"][part] for of_launch in found.values()] for part in ORDER}
    rows["**all**"] = [median(of_launch["whole"]) for of_launch in found.values()]
    lines = [
        *heading("From the command to the first step", report),
        f"Seconds on rank 0, medians of {settings['rounds']} launches of {CONFIG} of each kind, interleaved, one "
        "thread per rank. The launch phase lasts until the rank's own Python runs.",
        "",
        f"| phase | {' | '.join(NAMES[launch] for launch in found)} |",
        f"|---|{'---|' * len(found)}",
        *(f"| {part} | {' | '.join(f'{value:.2f}' for value in values)} |" for part, values in rows.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
