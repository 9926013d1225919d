"""What every benchmark says beside its numbers: command, date, hardware and versions; and how it writes them."""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipe.commands.machine import processor

PACKAGES = ("torch", "deepspeed", "timm")


def context(module: str, words: Sequence[str], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Command, date, hardware and versions of ``python -m module words``; call it before the load begins."""
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def hardware() -> dict[str, Any]:
    """What it runs on, and how busy that is with other things."""
    found: dict[str, Any] = processor() | {"load_before": round(os.getloadavg()[0], 2)}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def heading(title: str, report: dict[str, Any]) -> list[str]:
    """The lines that begin a Markdown report."""
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


def write(file: Path, report: dict[str, Any], table: str) -> None:
    """Write a report as JSON, and its Markdown beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table, encoding="utf-8")
