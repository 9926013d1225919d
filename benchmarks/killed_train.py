"""``recipe/train.py`` that kills itself, or all processes of its launch, with SIGKILL at a specified moment.

The environment variable ``KILL_AT`` sets the moment: ``KILL_AT="window 7 1"`` is the seventh time that rank 1 reaches
``window`` in this launch. For ``last``, the number is the number of steps; for ``clock``, it is in milliseconds. With
``group`` in place of a rank, rank 0 kills the whole process group, including the launcher. A fourth word selects a
different signal, such as ``TERM``. Apart from these hooks, training is unchanged.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe import train
from recipe.distributed import listen

MOMENTS = {
    "window": "between a micro-batch's backward pass and the optimizer step",
    "step": "right after a micro-batch or an optimizer step",
    "metrics": "in the middle of a metrics.jsonl line",
    "checkpoint": "in the middle of a checkpoint file",
    "files": "between the files of a checkpoint",
    "publish": "after a checkpoint is complete, before it is renamed",
    "published": "right after a checkpoint is renamed",
    "prune": "while an old checkpoint is being deleted",
    "validation": "during a validation",
    "last": "right after the last step",
    "summary": "after training, before the summary",
    "clock": "at any point, some milliseconds after the imports",
}


class Trigger:
    """Counts how often its moment is reached, and kills at the given count."""

    def __init__(self, count: int, whole_group: bool, signum: signal.Signals) -> None:
        self.left = count
        self.whole_group = whole_group
        self.signum = signum

    def __call__(self) -> bool:
        """Count this time; return whether it is the one to kill at."""
        self.left -= 1
        return self.left == 0

    def kill(self) -> None:
        """Send the signal; SIGKILL acts like the OOM killer: nothing is flushed, no other rank is notified."""
        if self.whole_group:
            os.killpg(os.getpgrp(), self.signum)
        else:
            os.kill(os.getpid(), self.signum)


def kill_at(moment: str, trigger: Trigger) -> None:
    """Hook ``trigger`` into the code at ``moment``."""
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from recipe import reporting, run
    from recipe.checkpoints import manifest
    from recipe.reporting import telemetry

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **kwargs: Any) -> Any:
            if trigger():
                trigger.kill()
            return function(*args, **kwargs)

        return killed

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if trigger():
                trigger.kill()
            return result

        return killed

    def half_a_file(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        whole = io.BytesIO()
        save(state, whole, *args, **kwargs)
        if trigger():
            Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
            trigger.kill()
        Path(path).write_bytes(whole.getvalue())

    def half_a_line(file: Any, line: str) -> None:
        if file.name.endswith(telemetry.METRICS) and trigger():
            file.write(line[: len(line) // 2])
            file.flush()
            trigger.kill()
        write(file, line)

    def half_removed(path: Path) -> None:
        if trigger():
            (path / manifest.MANIFEST).unlink()
            trigger.kill()
        remove(path)

    def some_batches(engine: Any, batches: Iterable[Any], device: Any) -> Any:
        def watched() -> Iterator[Any]:
            for batch in batches:
                if trigger():
                    trigger.kill()
                yield batch

        return evaluate(engine, watched(), device)

    def after_the_last_step(engine: Any, batches: Iterable[Any], device: Any) -> Any:
        if engine.global_steps == trigger.left:
            trigger.kill()
        return evaluate(engine, batches, device)

    save, write, evaluate, remove = torch.save, telemetry.Writer._write, run.evaluate, manifest.remove
    places: dict[str, tuple[Any, str, Any]] = {
        "window": (DeepSpeedEngine, "step", before(DeepSpeedEngine.step)),
        "step": (DeepSpeedEngine, "step", after(DeepSpeedEngine.step)),
        "metrics": (telemetry.Writer, "_write", staticmethod(half_a_line)),
        "checkpoint": (torch, "save", half_a_file),
        "files": (manifest, "complete", before(manifest.complete)),
        "publish": (manifest, "publish", before(manifest.publish)),
        "published": (manifest, "publish", after(manifest.publish)),
        "prune": (manifest, "remove", half_removed),
        "validation": (run, "evaluate", some_batches),
        "last": (run, "evaluate", after_the_last_step),
        "summary": (reporting, "summarise", before(reporting.summarise)),
    }
    if moment == "clock":
        threading.Timer(trigger.left / 1000, trigger.kill).start()
    else:
        setattr(*places[moment])


if __name__ == "__main__":
    listen()  # before torch starts threads
    train.set_up_torch()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # fp16 is slow on some CPUs, but still correct.
        train.cpu_may_support_fp16 = get_accelerator().is_fp16_supported = lambda: True
    if os.environ.get("KILL_AT"):
        name, count, who, signal_name = f"{os.environ['KILL_AT']} KILL".split()[:4]
        if os.environ.get("RANK", "0") == who.replace("group", "0"):
            kill_at(name, Trigger(int(count), who == "group", signal.Signals[f"SIG{signal_name}"]))
    sys.exit(train.main())
