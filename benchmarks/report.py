"""Shared by all benchmarks: options, and the command, date, hardware and versions recorded with the results."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipe.commands.machine import processor

PACKAGES = ("torch", "deepspeed", "timm")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type for counts of at least ``least``."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}")
        return int(text)

    return count


positive = at_least(1)


def made_folder(text: str) -> Path:
    """An argparse type for an output folder: creates it before anything is measured."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be made a folder: {error.strerror}") from None
    if not os.access(text, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written to")
    return Path(text)


def add_device(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the option ``--device``."""

    def device(text: str) -> torch.device:
        try:
            named = torch.device(text)
        except RuntimeError:
            raise argparse.ArgumentTypeError(f"{text} is no device; use cpu or cuda") from None
        if named.type not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"{text} is not supported; use cpu or cuda")
        if named.type == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch finds no GPU; use cpu")
        return named

    parser.add_argument("--device", type=device, default="cpu", help=f"{purpose} (default: %(default)s)")


def parse_device(prog: str, words: Sequence[str]) -> torch.device:
    """The value of ``--device``, on which the defaults of other options depend."""
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    add_device(parser, "")
    parsed: torch.device = parser.parse_known_args(words)[0].device
    return parsed


def new_parser(
    program: str, doc: str | None, beside: str = "the table is written next to it, as .md"
) -> argparse.ArgumentParser:
    """A parser for ``python -m program``, described by the first line of its docstring, with the option ``--json``.

    ``beside`` says in the help what is written next to the JSON.
    """

    def results(text: str) -> Path:
        file = made_folder(str(Path(text).parent)) / Path(text).name
        if file.suffix == ".md" or file.is_dir():
            raise argparse.ArgumentTypeError(f"{text} cannot be the JSON: a file's name is expected, not in .md")
        return file

    parser = argparse.ArgumentParser(program, description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=results, metavar="FILE", help=f"results file; {beside}")
    return parser


def say(progress: str) -> None:
    """Print progress to stderr, so that stdout has only the tables."""
    print(progress, file=sys.stderr, flush=True)


def context(module: str, words: Sequence[str], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Command, date, hardware and versions for ``python -m module words``; call it before generating any load."""
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def hardware() -> dict[str, Any]:
    """The hardware, and its load average before the benchmark."""
    found: dict[str, Any] = processor() | {"load_before": round(os.getloadavg()[0], 2)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def heading(title: str, report: dict[str, Any]) -> list[str]:
    """The first lines of a Markdown report."""
    where = report["hardware"]
    processor = f"{where['cpu']}, {where['cores']} cores, load before {where['load_before']}"
    return [
        f"# {title}",
        "",
        f"- hardware: {where['gpus']} × {where['gpu']}; {processor}" if "gpu" in where else f"- hardware: {processor}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in report['versions'].items())}",
        f"- command: `{report['command']}`",
        f"- date: {report['date']}",
        "",
    ]


def publish(report: dict[str, Any], table: str, file: Path | None) -> None:
    """Print the Markdown of a report and, with ``file``, write both."""
    print(table, end="")
    if file is not None:
        write(file, report, table)


def write(file: Path, report: dict[str, Any], table: str) -> None:
    """Write a report as JSON, and its Markdown next to it."""
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table, encoding="utf-8")
