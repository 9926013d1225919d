"""The files that a run writes below its output folder."""

import os
from contextlib import suppress
from itertools import count
from pathlib import Path

from recipe.checkpoints import PLAN
from recipe.reporting.metrics import METRICS, steps_done

LOG, SUMMARY = "train.log", "summary.json"


class OutputError(RuntimeError):
    """A file of the run cannot be written; the message names it and the cause."""


def cannot_write(path: Path | str, error: OSError) -> OutputError:
    """The failure to write a file of the run, for people."""
    return OutputError(f"{path}: {error.strerror}; the checkpoints are whole: mend it, and the same command resumes")


def make_folder(path: Path) -> None:
    """Make a folder of the run, if it is not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_summary(output: Path) -> None:
    """It is written last: while it is there, the run is complete.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        (output / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(output / SUMMARY, error) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either.

    Raises:
        OutputError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def set_former_run_aside(output: Path) -> list[str]:
    """Give what an earlier run wrote, and left no checkpoint of, a folder of its own; return what there is to say.

    Raises:
        OutputError: it cannot be moved.
    """
    metrics = output / METRICS
    if not metrics.exists() or not metrics.stat().st_size:
        return []
    steps = steps_done(output)
    aside = next(folder for number in count(1) if not (folder := output / f"former-{number}").exists())
    try:
        aside.mkdir()
        for name in (METRICS, LOG, PLAN, SUMMARY):
            with suppress(FileNotFoundError):
                os.rename(output / name, aside / name)
    except OSError as error:
        raise cannot_write(aside, error) from error
    return [f"training begins at epoch 1: no checkpoint is left of {steps:,} steps, whose files are in {aside}"]
