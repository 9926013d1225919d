"""What the lines of ``metrics.jsonl`` say, for those who read it without importing torch."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
_TAIL_BYTES = 4096  # more than a dozen lines


def read_events(output: Path) -> list[dict[str, Any]]:
    """The lines of a run, the earliest first; none if it has not written any. A line that is half written is no line.

    Each has an ``event``, "step" or "validation", and a ``step``, which counts from 0.
    """
    try:
        text = (output / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return list(_events(text.splitlines()))


def has_diverged(loss: float | None, skipped: bool, loss_scale: float) -> bool:
    """Whether a step's loss, None where it is not finite, ends the run: not where fp16's loss scale is to blame."""
    return loss is None and (not skipped or loss_scale <= 1)


def steps_done(output: Path) -> int:
    """Optimizer steps that a run has written down, told by the end of the file alone: it may be long."""
    try:
        with (output / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    return max((event["step"] + 1 for event in _events(lines)), default=0)


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line)
            yield {**event, "event": str(event["event"]), "step": int(event["step"])}
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            continue
