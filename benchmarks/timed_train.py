"""``recipe/train.py`` that records how long each startup phase took, and exits after the first optimizer step.

Environment variables give the time of the command (``COMMAND_GIVEN``, in seconds of the monotonic clock, which all
processes on a machine share) and the file that rank 0 writes (``TIMES_FILE``). Training is unchanged.
"""

import time

BEGUN = time.monotonic()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe import train  # noqa: E402

LAUNCH, IMPORTS, BATCHES, STEP, REST = "launch", "imports", "batches of the first step", "first step", "all else"
PARTS = {
    "data set": ("data", "open_samples"),
    "model": ("run", "build_model"),
    "look at the model": ("run", "check_image_sizes"),
    "meeting of the ranks": ("meeting", "meet"),
    "process group": ("run", "join_process_group"),
    "deepspeed.initialize": ("run", "start_engine"),
}
ORDER = (LAUNCH, IMPORTS, *PARTS, BATCHES, STEP, REST)


def time_parts(given: float, file: Path) -> None:
    """Time the startup phases, and end the process after the first step."""
    import torch.distributed as dist

    from recipe import data, run
    from recipe.distributed import rendezvous as meeting

    modules: dict[str, Any] = {"data": data, "meeting": meeting, "run": run}
    seconds = dict.fromkeys(ORDER, 0.0)
    seconds[LAUNCH] = BEGUN - given

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            result = function(*args, **kwargs)
            seconds[part] += time.monotonic() - started
            return result

        return call

    def batches(own: Iterable[Any]) -> Iterator[Any]:
        waiting = timed(BATCHES, iter(own).__next__)
        while True:
            try:
                yield waiting()
            except StopIteration:
                return

    def one_step(engine: Any, own: Iterable[Any], *rest: Any) -> Iterator[Any]:
        started = time.monotonic()
        next(train_epoch(engine, batches(own), *rest))
        ended = time.monotonic()
        seconds[STEP] = ended - started - seconds[BATCHES]
        seconds[REST] = ended - given - sum(seconds.values())
        if dist.get_rank() == 0:
            file.write_text(json.dumps(seconds), encoding="utf-8")
        dist.barrier()
        os._exit(0)
        yield

    train_epoch = run.train_epoch
    modules["run"].train_epoch = one_step
    for part, (module, name) in PARTS.items():
        setattr(modules[module], name, timed(part, getattr(modules[module], name)))
    seconds[IMPORTS] = time.monotonic() - BEGUN


def set_up_torch_and_time(cores: int | None = None) -> None:
    """Install the timers at the point where ``train.py`` starts its imports."""
    set_up_torch(cores)
    time_parts(float(os.environ["COMMAND_GIVEN"]), Path(os.environ["TIMES_FILE"]))


if __name__ == "__main__":
    set_up_torch, train.set_up_torch = train.set_up_torch, set_up_torch_and_time
    sys.exit(train.main())
