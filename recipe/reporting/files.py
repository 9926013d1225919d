"""The files that a run writes below its output folder; every function raises ``OutputError`` where it cannot write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from recipe.checkpoints import PLAN
from recipe.reporting.metrics import METRICS, steps_done

LOG, SUMMARY = "train.log", "summary.json"


class OutputError(RuntimeError):
    """A file of the run cannot be written; the message names it and the cause."""


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failure to write ``path`` into an ``OutputError``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror}; the checkpoints are whole: fix it, and the same command resumes"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder of the run, if it is not there."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_summary(output: Path) -> None:
    """Remove ``summary.json``, which is written last: while it is there, the run is complete."""
    with writing(output / SUMMARY):
        (output / SUMMARY).unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with writing(path):
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)


def set_former_run_aside(output: Path) -> list[str]:
    """Move what an earlier run wrote, of which no checkpoint is left, into a folder of its own; return a message."""
    metrics = output / METRICS
    if not metrics.exists() or not metrics.stat().st_size:
        return []
    steps = steps_done(output)
    aside = next(folder for number in count(1) if not (folder := output / f"former-{number}").exists())
    with writing(aside):
        aside.mkdir()
        for name in (METRICS, LOG, PLAN, SUMMARY):
            with suppress(FileNotFoundError):
                os.rename(output / name, aside / name)
    return [f"training begins at epoch 1: no checkpoint is left of {steps:,} steps, whose files are in {aside}"]
