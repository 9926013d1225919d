"""What the lines of ``metrics.jsonl`` say, for those who read it without importing torch."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_events(output: Path) -> list[dict[str, Any]]:
    """The lines of a run, the earliest first; none if it has not written any. A line that is half written is no line.

    Each has an ``event``, "step" or "validation", and a ``step``, which counts from 0.
    """
    try:
        text = (output / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
            events.append({**event, "event": str(event["event"]), "step": int(event["step"])})
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            continue
    return events


def has_diverged(loss: float | None, skipped: bool, loss_scale: float) -> bool:
    """Whether a step's loss, None where it is not finite, ends the run: not where fp16's loss scale is to blame."""
    return loss is None and (not skipped or loss_scale <= 1)
