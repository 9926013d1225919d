"""Reads ``metrics.jsonl``, without importing torch."""

from collections.abc import Iterable
from json import JSONDecoder
from pathlib import Path
from typing import Any, NoReturn

METRICS = "metrics.jsonl"
_TAIL_BYTES = 4096  # more than a dozen lines


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none, as where it is half written."""
    try:
        value = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event of a line, with its name and ``step``; None if it is none."""
    event = parse_object(line)
    is_event = event is not None and isinstance(event.get("event"), str) and type(event.get("step")) is int
    return event if is_event else None


def read_events(output: Path) -> list[dict[str, Any]]:
    """The lines of a run, the earliest first; none if it has not written any. A line that is half written is left out.

    Each has an ``event``, "step" or "validation", and a ``step``, which counts from 0.
    """
    try:
        return _events((output / METRICS).read_bytes().splitlines())
    except OSError:
        return []


def has_diverged(loss: float | None, skipped: bool, loss_scale: float) -> bool:
    """Whether a step's loss, None where it is not finite, ends the run: not where fp16's loss scale is to blame."""
    return loss is None and (not skipped or loss_scale <= 1)


def accuracy_words(top1: float, top5: float, classes: int) -> str:
    """Accuracies in per cent for people, who learn nothing from the top five of five ``classes``."""
    return f"top-1 {top1:.2f} %" + (f", top-5 {top5:.2f} %" if classes > 5 else "")


def steps_done(output: Path) -> int:
    """Optimizer steps that a run has written down, read from the end of the file alone, which may be long."""
    try:
        with (output / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            events = _events(file.read().splitlines())
    except OSError:
        return 0
    return max((event["step"] + 1 for event in events), default=0)


def _events(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    return [event for event in map(parse_event, lines) if event is not None]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = JSONDecoder(parse_constant=_no_constant)
