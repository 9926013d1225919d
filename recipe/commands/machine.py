"""The machine that a report was made on."""

import os
import platform
from pathlib import Path
from typing import Any


def processor() -> dict[str, Any]:
    """The CPU's name, and the number of its cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0))}
