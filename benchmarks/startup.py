"""How long it takes from the command to the first optimizer step, part by part; and to list a large folder of images.

The digits' run is started by ``python`` and by the ``deepspeed`` launcher, in turn, one thread a rank, and ends after
its first step. Then a folder of empty files with the names of images is listed, in turn, by torchvision's ImageFolder,
by the recipe's scan, and by the index that the recipe keeps between runs.

    python -m benchmarks.startup --json benchmarks/results/startup_cpu.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from torchvision.datasets import ImageFolder

from benchmarks.launch import ROOT, deepspeed_command, environment
from benchmarks.report import add_json, at_least, context, heading, made_folder, positive, say, write
from benchmarks.timed_train import ORDER
from recipe.data import folder_index

SCRIPT = "benchmarks/timed_train.py"
CONFIG = "ds_configs/digits_b512.json"
TIMEOUT_SECONDS = 300
IMAGENET = 1_281_167
LAUNCHES: dict[str, int | None] = {"python": None, "deepspeed-1": 1, "deepspeed-2": 2}
NAMES = {"python": "python, 1 rank", "deepspeed-1": "deepspeed, 1 rank", "deepspeed-2": "deepspeed, 2 ranks"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; print the tables, and write them and a JSON if asked to."""
    words = list(sys.argv[1:] if argv is None else argv)
    before = context("benchmarks.startup", words, ("torch", "torchvision", "deepspeed", "timm"))
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = before | {
            "settings": {"config": CONFIG, "rounds": arguments.rounds, "image_folders": arguments.image_folders},
            "seconds_to_first_step": starts(Path(folder), arguments.launches, arguments.rounds),
            "listing": listing(Path(folder), arguments.images, arguments.image_folders, arguments.rounds),
        }
    table = format_report(report)
    print(table, end="")
    if arguments.json is not None:
        write(arguments.json, report, table)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES), help="(default: all)")
    parser.add_argument("--rounds", type=positive, default=5, help="of each, in turn (default: %(default)s)")
    parser.add_argument(
        "--images",
        type=at_least(folder_index.SMALLEST_KEPT_IMAGES),
        default=200_000,
        help="files to list, so many that the recipe keeps the list (default: %(default)s)",
    )
    parser.add_argument("--image-folders", type=positive, default=1000, help="they lie in (default: %(default)s)")
    parser.add_argument(
        "--folder", type=made_folder, help="where runs and files are made, for a while (default: the system's for such)"
    )
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.image_folders > arguments.images:
        parser.error(f"--image-folders {arguments.image_folders}: of {arguments.images} images none may be empty")
    return arguments


def starts(folder: Path, launches: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """For each launch the median seconds of each part, by rank 0, and those of the whole in each round."""
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
    """Start a run on ``ranks`` ranks by the launcher, or one rank without it; give the seconds of each part."""
    words = (SCRIPT, "--deepspeed_config", CONFIG, "--output", str(output))
    command = [sys.executable, *words] if ranks is None else deepspeed_command(ranks, *words)
    times = output.with_suffix(".json")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(COMMAND_GIVEN=str(time.monotonic()), TIMES_FILE=str(times)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    seconds: dict[str, float] = json.loads(times.read_text())
    return seconds


def listing(folder: Path, images: int, image_folders: int, rounds: int) -> dict[str, Any]:
    """Seconds to list so many images, each way; the same list each time."""
    root, caches = folder / "images", folder / "caches"
    say(f"listing {images:,} files in {image_folders:,} folders")
    for number in range(image_folders):
        below = root / f"n{number:08}"
        below.mkdir(parents=True)
        for image in range(number, images, image_folders):
            (below / f"n{number:08}_{image}.JPEG").touch()
    time.sleep(folder_index.SETTLED_SECONDS + 0.1)
    ways: dict[str, Callable[[], Any]] = {
        "torchvision": lambda: ImageFolder(root),
        "scan": lambda: folder_index.scan(str(root))[0],
        "kept": lambda: folder_index.index_folder(str(root)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(caches), LOCAL_RANK="0"):
        ways["kept"]()  # keeps it
        (kept,) = caches.rglob("*.npz")
        for _ in range(rounds):
            found = {}
            for way, list_images in ways.items():
                started = time.perf_counter()
                found[way] = list_images()
                seconds[way].append(time.perf_counter() - started)
            expected = found.pop("torchvision").samples
            for index in found.values():
                labels = index.labels.tolist()
                if [(index.path(image), label) for image, label in enumerate(labels)] != expected:
                    raise RuntimeError(f"another list than torchvision's of {root}")
    return {
        "images": images,
        "seconds": {way: median(of_rounds) for way, of_rounds in seconds.items()},
        "kept_bytes": kept.stat().st_size,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings, found, listed = report["settings"], report["seconds_to_first_step"], report["listing"]
    rows = {part: [of_launch["parts"][part] for of_launch in found.values()] for part in ORDER}
    rows["**all**"] = [median(of_launch["whole"]) for of_launch in found.values()]
    lines = [
        *heading("From the command to the first step", report),
        f"Seconds, medians of {settings['rounds']} launches of {CONFIG} by each way, in turn; one thread a rank, as "
        "rank 0 sees it. The launch is what passes until the rank's own Python runs.",
        "",
        f"| part | {' | '.join(NAMES[launch] for launch in found)} |",
        f"|---|{'---|' * len(found)}",
        *(f"| {part} | {' | '.join(f'{value:.2f}' for value in values)} |" for part, values in rows.items()),
        "",
        "## Listing a folder of images",
        "",
        f"{listed['images']:,} empty files in {settings['image_folders']:,} folders, medians of {settings['rounds']}, "
        f"in turn; the folders are in memory, as after the first look. Beside it ImageNet's {IMAGENET:,} at the same "
        "time an image, which was not measured. Every rank lists them when it starts.",
        "",
        "| way | seconds | of as many as ImageNet |",
        "|---|---|---|",
    ]
    names = {"torchvision": "torchvision's ImageFolder", "scan": "the recipe's scan", "kept": "the index that is kept"}
    for way, seconds in listed["seconds"].items():
        lines.append(f"| {names[way]} | {seconds:.3f} | {seconds * IMAGENET / listed['images']:.2f} |")
    lines += ["", f"The index takes {listed['kept_bytes'] / 2**20:.1f} MiB on the disk."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
