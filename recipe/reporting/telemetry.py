"""What a run reports: a bar or lines and a log for people, ``metrics.jsonl`` for programs, DeepSpeed's monitors."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from recipe.config import printable
from recipe.engine import Step, Validation
from recipe.plan import NoiseScale, Plan, estimate
from recipe.reporting.files import LOG, OutputError, writing
from recipe.reporting.metrics import METRICS, accuracy_words, has_diverged, parse_event
from recipe.reporting.terminal import Progress

LINE_EVERY_SECONDS = 30.0

Monitor = Callable[[list[tuple[str, float, int]]], None]


class Telemetry:
    """Collects steps on all ranks and, every ``steps_per_print`` of them, has rank 0 write them down.

    A step's loss stays on the device until then, and a GPU need not run dry for a report either: what is reported
    travels to the host while the next step is computed, and is written down after that. Every rank makes the same
    calls: the mean over ranks is one collective for all steps of a report.
    """

    def __init__(
        self,
        output: Path,
        plan: Plan,
        *,
        first_step: int,
        validated_steps: int,
        noise_scale: NoiseScale,
        monitor: Monitor,
    ) -> None:
        self.plan = plan
        self.noise_scale = noise_scale
        self.monitor = monitor
        self.training_seconds = 0.0
        self.images_trained = 0
        self.writer: Writer | None = None
        self._pending: list[Step] = []
        self._sent: Sent | None = None
        self._figures: list[str] = []
        self._clock = 0.0
        if dist.get_rank() == 0:
            self.writer = Writer(output, first_step, validated_steps, plan.total_steps)

    def start_clock(self) -> None:
        """Training continues from here; what passed since the last report (validation, a save) is not training time."""
        self._clock = time.perf_counter()

    def step(self, step: Step) -> None:
        """Take one step; report if enough have come or the epoch ends.

        Raises:
            FloatingPointError: the loss is not finite and fp16's loss scale is not to blame.
        """
        self._write_what_was_sent()
        self._pending.append(step)
        last_of_epoch = self.plan.timeline.place(step.step + 1)[1] == 0
        is_full = len(self._pending) == self.plan.config.steps_per_print
        if last_of_epoch or (is_full and not _is_behind_the_host(step.loss.device)):
            self.report()
        elif is_full:
            self._send()
        if self.writer is not None:
            epoch = self.plan.timeline.place(step.step)[0] + 1
            self.writer.progress.update(step.step + 1, f"epoch {epoch}/{self.plan.epochs}", *self._figures)

    def report(self) -> None:
        """Write down the steps that have come since the last report, and wait for the device."""
        self._write_what_was_sent()
        self._send()
        self._write_what_was_sent()

    def _send(self) -> None:
        """Have what the pending steps measured travel to the host."""
        if self._pending:
            self._sent, self._pending = Sent(self._pending), []

    def _write_what_was_sent(self) -> None:
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        means, scales, skips, norms = sent.values()
        steps = sent.steps
        noise_scales = self._take_gradient_norms(norms)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.training_seconds += seconds
        batch = self._batch(steps[-1].step)  # of all of them: an epoch ends with a report
        self.images_trained += len(steps) * batch
        speed = len(steps) * batch / seconds
        data_wait = sum(step.data_wait_seconds for step in steps) / seconds
        rates = {"images_per_second": round(speed, 1), "data_wait": round(data_wait, 4)}
        reported = list(zip(steps, means, scales, skips, strict=True))
        if self.writer is not None:
            for step, loss, scale, skipped in reported:
                self._write_step(self.writer, step, loss, scale, skipped, rates)
                if step.step in noise_scales:
                    self._write_noise_scale(self.writer, step.step, noise_scales[step.step])
            self._monitor("Train", steps[-1].step, rates)
            self._figures = [f"loss {means[-1]:.3f}", f"{speed:,.0f} images/s", f"rate {steps[-1].lr:.4g}"]
        for step, loss, scale, skipped in reported:
            if has_diverged(_finite(loss), skipped, scale):
                raise FloatingPointError(
                    f"the loss of step {step.step} is {loss}: training has diverged at rate {step.lr:g}"
                )

    def validation(self, result: Validation, step: int) -> dict[str, Any]:
        """Write down a validation that followed update ``step``; return its line of ``metrics.jsonl``."""
        measured, words = {"top1": result.top1, "top5": result.top5, "loss": result.loss}, ""
        classes = self.plan.config.recipe.model.num_classes
        if result.averaged is not None:
            measured |= dict(zip(("ema_top1", "ema_top5", "ema_loss"), result.averaged, strict=True))
            top1, top5, loss = result.averaged
            words = f"; of the averaged weights {accuracy_words(top1, top5, classes)}, loss {loss:.4f}"
        event = self._event("validation", step) | {name: _finite(value) for name, value in measured.items()}
        event |= {"count": result.count}
        if self.writer is not None:
            self.writer.event(event)
            self.writer.say(
                f"epoch {event['epoch'] + 1}/{self.plan.epochs}: {accuracy_words(result.top1, result.top5, classes)}, "
                f"loss {result.loss:.4f} on {result.count:,} validation images{words}"
            )
            self._monitor("Validation", step, measured)
        return event

    def images_per_second(self) -> float | None:
        """Images trained in a second of training time, over this launch; None if it trained none."""
        return self.images_trained / self.training_seconds if self.images_trained else None

    def _batch(self, step: int) -> int:
        return self.plan.timeline.phase(step).global_batch

    def say(self, message: str) -> None:
        """Print a message above the bar and log it, on rank 0."""
        if self.writer is not None:
            self.writer.say(message)

    def sync(self) -> None:
        """Report what is outstanding and sync the metrics to the disk, before a checkpoint is written."""
        self.report()
        if self.writer is not None:
            self.writer.sync()

    def close(self) -> None:
        """Leave the bar as it is and close the files."""
        if self.writer is not None:
            self.writer.close()

    def _take_gradient_norms(self, norms: dict[int, list[float]]) -> dict[int, dict[str, float | None]]:
        """Take what steps measured into the noise scale; return its values after each, by step."""
        values = {}
        for step, (small, big) in norms.items():
            if self.noise_scale.add(estimate(small, big, self.plan.micro_batch, self._batch(step)), step):
                values[step] = self.noise_scale.values()
        return values

    def _event(self, name: str, step: int) -> dict[str, Any]:
        """The beginning of each line of ``metrics.jsonl``."""
        return {"event": name, "step": step, "epoch": self.plan.timeline.place(step)[0]}

    def _write_noise_scale(self, writer: "Writer", step: int, values: dict[str, float | None]) -> None:
        event, scale = self._event("noise_scale", step), values["noise_scale"]
        writer.event(event | values)
        shown = "hidden by noise" if scale is None else f"{scale:,.0f} images"
        writer.log(f"epoch {event['epoch'] + 1}/{self.plan.epochs}, step {step}: gradient noise scale {shown}")
        self._monitor("Train", step, {name: value for name, value in values.items() if value is not None})

    def _monitor(self, part: str, step: int, values: dict[str, float]) -> None:
        samples = self.plan.timeline.images(step + 1)
        self.monitor([(f"{part}/Samples/{name}", value, samples) for name, value in values.items()])

    def _write_step(
        self, writer: "Writer", step: Step, loss: float, loss_scale: float, skipped: bool, rates: dict[str, float]
    ) -> None:
        event = self._event("step", step.step)
        event |= {"samples": self.plan.timeline.images(step.step + 1), "lr": step.lr, "loss": _finite(loss)}
        writer.event(event | rates | {"loss_scale": loss_scale, "skipped": skipped})
        overflow = f", update skipped: overflow at loss scale {loss_scale:g}" if skipped else ""
        writer.log(
            f"epoch {event['epoch'] + 1}/{self.plan.epochs}, step {step.step}: loss {loss:.4f}, rate {step.lr:.5g}, "
            f"{rates['images_per_second']:,.0f} images/s, {rates['data_wait']:.0%} waiting for data{overflow}"
        )
        scale = {"loss_scale": loss_scale} if self.plan.precision == "fp16" else {}
        self._monitor("Train", step.step, {"train_loss": loss} | scale)


class Writer:
    """Rank 0's files and its terminal."""

    def __init__(self, output: Path, first_step: int, validated_steps: int, total_steps: int) -> None:
        with writing(output / METRICS):
            lost = drop_later_events(output / METRICS, first_step, validated_steps)
            self.metrics = (output / METRICS).open("a", encoding="utf-8")
        with writing(output / LOG):
            self.log_file = (output / LOG).open("a", encoding="utf-8")
        self.progress = Progress(total_steps, "steps", first_step, LINE_EVERY_SECONDS)
        if lost:
            self.say(
                f"{output / METRICS} lacks {lost:,} of the {first_step:,} steps before this one: lines were removed or "
                "damaged; training continues as it would, but plot and compare do not see them"
            )

    def event(self, event: dict[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._write(self.metrics, json.dumps(event, allow_nan=False))

    def log(self, message: str) -> None:
        """Add a line to the log file."""
        self._write(self.log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def sync(self) -> None:
        """Sync ``metrics.jsonl`` to the disk: a checkpoint must not be there without the lines that precede it."""
        with writing(self.metrics.name):
            os.fsync(self.metrics.fileno())
            is_removed = os.fstat(self.metrics.fileno()).st_nlink == 0
        if is_removed:
            raise OutputError(f"{self.metrics.name}: it was removed while the run was writing to it")

    @staticmethod
    def _write(file: TextIO, line: str) -> None:
        with writing(file.name):
            file.write(line + "\n")
            file.flush()

    def say(self, message: str) -> None:
        """Print a line above the bar, and log it."""
        message = printable(message)
        self.log(message)
        self.progress.say(message)

    def close(self) -> None:
        """Leave the bar as it stands and close the files."""
        self.progress.close()
        with contextlib.suppress(OSError):  # that a line could not be written has been reported
            self.metrics.close()
            self.log_file.close()


def drop_later_events(metrics: Path, first_step: int, validated_steps: int) -> int:
    """Keep the lines about updates before ``first_step``, and about validations after ``validated_steps`` or fewer.

    Later ones will be written again. A line that a kill left half-written is dropped too. Returns the number of
    steps before ``first_step`` that have no line.
    """
    if not metrics.exists():
        return first_step
    limits = {"step": first_step, "noise_scale": first_step, "validation": validated_steps}
    kept, steps = [], set()
    for line in metrics.read_bytes().splitlines():
        event = parse_event(line)
        if event is not None and event["step"] < limits.get(event["event"], 0):
            kept.append(line + b"\n")
            if event["event"] == "step":
                steps.add(event["step"])
    rewritten = metrics.with_suffix(".rewritten")
    with rewritten.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(rewritten, metrics)
    return first_step - len(steps)


class Sent:
    """What some steps measured, on its way from the device to the host; the host goes on meanwhile."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        skips = [torch.zeros_like(step.loss) if step.skipped is None else step.skipped for step in steps]
        norms = [step.gradient_norms for step in steps if step.gradient_norms is not None]
        self._measured = [at for at, step in enumerate(steps) if step.gradient_norms is not None]
        on_device = [
            _mean_over_ranks(torch.stack([step.loss for step in steps])),
            torch.stack([step.loss_scale for step in steps]),
            torch.stack([skip.double() for skip in skips]),
            *([_mean_over_ranks(torch.stack(norms))] if norms else []),
        ]
        # Into pinned memory, where it comes from a GPU.
        self._on_host = [values.to("cpu", non_blocking=True) for values in on_device]
        self._arrived = None
        if on_device[0].device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> tuple[list[float], list[float], list[bool], dict[int, list[float]]]:
        """Each step's loss, its loss scale and whether it was skipped; by step, what ``GradientNorms`` took of some."""
        if self._arrived is not None:
            self._arrived.synchronize()
        losses, scales, skipped, *norms = (values.tolist() for values in self._on_host)
        skips = [bool(skip) for skip in skipped]
        measured = zip(self._measured, norms[0] if norms else [], strict=True)
        return losses, scales, skips, {self.steps[at].step: pair for at, pair in measured if not skips[at]}


def _is_behind_the_host(device: torch.device) -> bool:
    """Whether what was asked of ``device`` may still be under way."""
    return device.type != "cpu"


def _mean_over_ranks(values: Tensor) -> Tensor:
    # Gathered: the order of an all-reduce's additions, and with it rounding, depends on how many values are reported
    # together, which is another number after a signal and in a resumed run.
    ranks = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, values)
    total = ranks[0]
    for other in ranks[1:]:
        total = total + other
    return total / len(ranks)


def _finite(value: float) -> float | None:
    """JSON has no word for an infinite loss."""
    return value if math.isfinite(value) else None
