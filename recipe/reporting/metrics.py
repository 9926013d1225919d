"""Reads ``metrics.jsonl`` without importing torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic_core import from_json

METRICS = "metrics.jsonl"
_TAIL_BYTES = 4096  # more than a dozen lines


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None if the line holds anything else, such as half an object."""
    try:
        value = from_json(line, allow_inf_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event on a line, with its name and ``step``; None if the line is not an event."""
    event = parse_object(line)
    is_event = event is not None and isinstance(event.get("event"), str) and type(event.get("step")) is int
    return event if is_event else None


def read_events(output: Path) -> list[dict[str, Any]]:
    """The events of a run, earliest first, without half-written lines; empty if the run has not written any.

    Each has an ``event`` ("step", "validation" or "noise_scale") and a ``step``, counted from 0.
    """
    try:
        return _events((output / METRICS).read_bytes().splitlines())
    except OSError:
        return []


def has_diverged(loss: float | None, skipped: bool, loss_scale: float) -> bool:
    """Whether a step's loss (None if not finite) means divergence, not just an fp16 loss scale that is too high."""
    return loss is None and (not skipped or loss_scale <= 1)


def accuracy_words(top1: float, top5: float, classes: int) -> str:
    """Accuracies in per cent as text; top-5 says nothing with five ``classes`` or fewer."""
    return f"top-1 {top1:.2f} %" + (f", top-5 {top5:.2f} %" if classes > 5 else "")


def steps_done(output: Path) -> int:
    """The number of optimizer steps a run has logged, read from the tail of the file, which can be long."""
    try:
        with (output / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            events = _events(file.read().splitlines())
    except OSError:
        return 0
    return max((event["step"] + 1 for event in events), default=0)


def _events(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    return [event for event in map(parse_event, lines) if event is not None]
