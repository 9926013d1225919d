"""The history of a run, saved with every checkpoint and restored when the run resumes."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from recipe.checkpoints import checkpoint, manifest
from recipe.checkpoints.checkpoint import CheckpointError
from recipe.checkpoints.resume import Start, statistics_change, training_sha256
from recipe.engine import Step, Validation, average_of, local_steps_of, waiting_for_storage
from recipe.model import average_running_statistics, gather_running_averages, restore_running_averages
from recipe.plan import NoiseScale, Plan, plan_json

BYTES_PER_PARAMETER = 16  # of a checkpoint, at most: weight, master weight, average and a moment or two


@dataclass
class History:
    """What a run has done so far, over all launches.

    ``validations`` are the validation lines of ``metrics.jsonl``; ``seconds`` is the wall time; ``decoded_by_pil``
    counts the images that needed the slower decoder: on rank 0 those of all ranks up to the last save, plus its own
    since; on other ranks only their own since the last save.
    """

    validations: list[dict[str, Any]] = field(default_factory=list)
    bad_images: set[str] = field(default_factory=set)
    seconds: float = 0.0
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    decoded_by_pil: int = 0

    @property
    def validated_steps(self) -> int:
        """The number of steps done at the last validation."""
        return int(self.validations[-1]["step"]) + 1 if self.validations else 0

    def add(self, passed: Step | Validation) -> None:
        """Record which images of a step or validation were bad, and how many needed the slower decoder."""
        self.bad_images |= set(passed.bad_images)
        self.decoded_by_pil += passed.decoded_by_pil

    def gather(self, device: torch.device, names_too: bool) -> None:
        """Combine the ranks' counts of images, and their names of bad images if ``names_too``. A collective."""
        if names_too:
            names: list[set[str]] = [set() for _ in range(dist.get_world_size())]
            dist.all_gather_object(names, self.bad_images)
            self.bad_images = set().union(*names)
        decoded_by_pil = torch.tensor(self.decoded_by_pil, device=device)
        dist.all_reduce(decoded_by_pil)
        self.decoded_by_pil = int(decoded_by_pil) if dist.get_rank() == 0 else 0

    def state(self, seconds_since: float) -> dict[str, Any]:
        """The history as plain values; ``seconds_since`` is the wall time of this launch."""
        return asdict(self) | {"bad_images": sorted(self.bad_images), "seconds": self.seconds + seconds_since}


def load_run(engine: DeepSpeedEngine, plan: Plan, start: Start) -> tuple[History | None, list[str]]:
    """Load the newest intact checkpoint; return its history (None without one) and messages to print.

    Raises:
        CheckpointError: intact checkpoints cannot be loaded, or none is intact and the run must resume.
    """
    if not start.checkpoints:
        return None, list(start.messages)
    largest = max(sum(file.size for file in one.files.values()) for one in start.checkpoints)
    with waiting_for_storage(plan.config.recipe.distributed.timeout_seconds, largest):
        loaded, state, problems = checkpoint.load_newest(engine, start.checkpoints)
    messages = [*start.messages, *problems]
    if loaded is None:
        if start.must_resume:
            raise CheckpointError(f"--resume must: no checkpoint is intact: {'; '.join(messages)}")
        if dist.get_rank() == 0:
            manifest.set_aside(start.checkpoints)
        return None, [*messages, "no intact checkpoint is left: training starts over"]
    restore_running_averages(engine.module, state["running_averages"])
    decoded_by_pil = state["decoded_by_pil"] if dist.get_rank() == 0 else 0
    average = average_of(engine)
    if average is not None:
        average.load(state.get("average"))
    local = local_steps_of(engine)
    if local is not None and (own := checkpoint.load_own(loaded, engine.device)) is not None:
        local.load(own)
    history = History(
        state["validations"],
        set(state["bad_images"]),
        state["seconds"],
        NoiseScale(**state["noise_scale"]),
        decoded_by_pil,
    )
    messages += statistics_change(plan, start)
    return history, [*messages, f"resumed from {loaded.path}, {engine.global_steps:,} steps done"]


def save_run(
    engine: DeepSpeedEngine,
    folder: Path,
    plan: Plan,
    data: manifest.Data,
    history: History,
    seconds: float,
    top1: float | None,
) -> None:
    """Write a checkpoint, then remove those that the config does not keep. The engine is left as it was.

    ``seconds`` is the wall time of this launch so far, ``top1`` the accuracy of these weights if they were validated.
    """
    recipe = plan.config.recipe
    history.gather(engine.device, names_too=recipe.data.on_bad_image == "skip")
    # DeepSpeed saves rank 0's running averages: here the mean over ranks. Training continues with each rank's own.
    own, average, local = gather_running_averages(engine.module), average_of(engine), local_steps_of(engine)
    averaged = {} if average is None else {"average": average.state()}
    average_running_statistics(engine.module)
    resolved = plan_json(plan)
    parameters = sum(getattr(one, "ds_numel", one.numel()) for one in engine.module.parameters())  # ZeRO-3 empties them
    with waiting_for_storage(recipe.distributed.timeout_seconds, BYTES_PER_PARAMETER * parameters):
        checkpoint.save(
            engine,
            folder,
            top1=top1,
            client_state=history.state(seconds) | {"running_averages": own} | averaged,
            plan=resolved,
            training_sha256=training_sha256(json.loads(resolved)),
            data=data,
            own_state=None if local is None else local.state(),
        )
    restore_running_averages(engine.module, own)
    if dist.get_rank() == 0:
        manifest.prune(folder, recipe.checkpoint.keep_last, recipe.checkpoint.keep_best)
