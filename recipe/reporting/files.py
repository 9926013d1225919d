"""The files a run writes into its output folder; every function raises ``OutputError`` if it cannot write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from recipe.checkpoints import PLAN
from recipe.reporting.metrics import METRICS, steps_done

LOG, SUMMARY = "train.log", "summary.json"


class OutputError(RuntimeError):
    """A file of the run cannot be written; the message names the file and the cause."""


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failure to write ``path`` into an ``OutputError``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror}; the checkpoints are intact: fix it, and the same command resumes"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder of the run if it does not exist."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_summary(output: Path) -> None:
    """Remove ``summary.json``: it is written last, and its presence marks a run as complete."""
    with writing(output / SUMMARY):
        (output / SUMMARY).unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a kill or a power failure it has the old text or the new one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with writing(path):
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def set_former_run_aside(output: Path) -> list[str]:
    """Move the files of an earlier run that has no checkpoint left into ``former-N/``; return messages about it."""
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
    lost = f"no checkpoint of the earlier {steps:,} steps is left; their files are in {aside}"
    return [f"training starts at epoch 1: {lost}"]
