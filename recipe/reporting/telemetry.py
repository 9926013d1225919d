"""What a run reports: progress bar or lines, a log, ``metrics.jsonl`` for programs, DeepSpeed's monitors."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from recipe.config import printable
from recipe.engine import Step, Validation
from recipe.plan import NoiseScale, Plan, estimate
from recipe.reporting.files import LOG, OutputError, replace_text, writing
from recipe.reporting.metrics import METRICS, accuracy_words, has_diverged, parse_event
from recipe.reporting.terminal import Progress

# More than fp16's loss scale needs to fall from any start to 1; bf16 has none that could fall.
MOST_SKIPS_IN_A_ROW = 100


class Telemetry:
    """Collects steps on all ranks; every ``steps_per_print`` steps, rank 0 writes them down.

    Until then a step's loss stays on the device. A GPU need not idle for a report either: its values are copied to the
    host while the next step is computed, and written down after that step. Every rank must make the same calls: the
    mean over ranks is one collective per report.
    """

    def __init__(
        self,
        output: Path,
        plan: Plan,
        *,
        first_step: int,
        validated_steps: int,
        noise_scale: NoiseScale,
        monitor: Callable[[list[tuple[str, float, int]]], None],
    ) -> None:
        self.plan = plan
        self.noise_scale = noise_scale
        self.monitor = monitor
        self.training_seconds = 0.0
        self.images_trained = 0
        self.writer: Writer | None = None
        self._pending: list[Step] = []
        self._report: Report | None = None
        self._skips_in_a_row = 0
        self._figures: list[str] = []
        self._clock = 0.0
        if dist.get_rank() == 0:
            self.writer = Writer(output, first_step, validated_steps, plan.total_steps)
            if self.writer.steps_kept < first_step:
                kept = self.writer.steps_kept
                self.say(f"{output / METRICS} has lines for only {kept:,} of the {first_step:,} steps done so far")

    def start_clock(self) -> None:
        """Resume measuring training time; time since the last report (validation, a save) does not count."""
        self._clock = time.perf_counter()

    def step(self, step: Step) -> None:
        """Take one step; report if there are enough of them, or the epoch ends.

        Raises:
            FloatingPointError: the loss is not finite, and not because fp16's loss scale is too high; or too many
                updates in a row were skipped.
        """
        self._write_report()
        self._pending.append(step)
        ends_epoch = self.plan.timeline.place(step.step + 1)[1] == 0
        if ends_epoch or len(self._pending) == self.plan.config.steps_per_print:
            self._send_report()
            if ends_epoch or not _is_asynchronous(step.loss.device):
                self._write_report()
        if self.writer is not None:
            epoch = self.plan.timeline.place(step.step)[0] + 1
            self.writer.progress.update(step.step + 1, f"epoch {epoch}/{self.plan.epochs}", *self._figures)

    def validation(self, result: Validation, step: int) -> dict[str, Any]:
        """Write down a validation that followed update ``step``; return its line of ``metrics.jsonl``."""
        classes = self.plan.config.recipe.model.num_classes
        text = (
            f"{accuracy_words(result.top1, result.top5, classes)}, loss {result.loss:.4f} "
            f"on {result.count:,} validation images"
        )
        measured = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        if result.averaged is not None:
            measured |= dict(zip(("ema_top1", "ema_top5", "ema_loss"), result.averaged, strict=True))
            top1, top5, loss = result.averaged
            text += f"; averaged weights: {accuracy_words(top1, top5, classes)}, loss {loss:.4f}"
        values = {name: _finite(value) for name, value in measured.items()} | {"count": result.count}
        event = self._record("validation", step, values, text)
        self._monitor("Validation", step, measured)
        return event

    def images_per_second(self) -> float | None:
        """Images per second of training time in this launch; None if it trained none."""
        return self.images_trained / self.training_seconds if self.images_trained else None

    def say(self, message: str) -> None:
        """Print a message above the bar and log it, on rank 0."""
        if self.writer is not None:
            self.writer.say(message)

    def sync(self) -> None:
        """Report all pending steps and sync the metrics to disk, before a checkpoint is written."""
        self._write_report()
        if self._pending:
            self._send_report()
        self._write_report()
        if self.writer is not None:
            self.writer.sync()

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self.writer is not None:
            self.writer.close()

    def _send_report(self) -> None:
        """Start copying the pending steps' values to the host."""
        self._report, self._pending = Report(self._pending), []

    def _write_report(self) -> None:
        """Write down the report that was sent last, if it has not been written yet."""
        if self._report is None:
            return
        reported, self._report = self._report.values(), None
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        last = reported[-1]
        batch = self.plan.timeline.phase(last.step.step).global_batch  # of all steps: an epoch ends with a report
        images = len(reported) * batch
        self.training_seconds += seconds
        self.images_trained += images
        data_wait = sum(one.step.data_wait_seconds for one in reported) / seconds
        rates = {"images_per_second": round(images / seconds, 1), "data_wait": round(data_wait, 4)}
        for one in reported:
            self._write_step(one, rates)
            if one.gradient_norms is not None and not one.skipped:
                self._write_noise_scale(one.step.step, one.gradient_norms, batch)
        self._monitor("Train", last.step.step, rates)
        self._figures = [f"loss {last.loss:.3f}", f"{images / seconds:,.0f} images/s", f"rate {last.step.lr:.4g}"]
        for one in reported:
            self._skips_in_a_row = self._skips_in_a_row + 1 if one.skipped else 0
            if self._skips_in_a_row == MOST_SKIPS_IN_A_ROW:
                raise FloatingPointError(
                    f"{MOST_SKIPS_IN_A_ROW} updates in a row, up to step {one.step.step}, were skipped because of "
                    f"gradients that are not finite, the last at loss scale {one.loss_scale:g}: lower the rate, or "
                    "train in fp32"
                )
            if has_diverged(_finite(one.loss), one.skipped, one.loss_scale):
                raise FloatingPointError(
                    f"the loss of step {one.step.step} is {one.loss}: training has diverged at rate {one.step.lr:g}"
                )

    def _write_step(self, reported: "Reported", rates: dict[str, float]) -> None:
        step, loss, loss_scale, skipped, _ = reported
        values = {"samples": self.plan.timeline.images(step.step + 1), "lr": step.lr, "loss": _finite(loss), **rates}
        overflow = f", update skipped: overflow at loss scale {loss_scale:g}" if skipped else ""
        self._record(
            "step",
            step.step,
            values | {"loss_scale": loss_scale, "skipped": skipped},
            f"loss {loss:.4f}, rate {step.lr:.5g}, {rates['images_per_second']:,.0f} images/s, "
            f"{rates['data_wait']:.0%} waiting for data{overflow}",
        )
        scale = {"loss_scale": loss_scale} if self.plan.precision == "fp16" else {}
        self._monitor("Train", step.step, {"train_loss": loss} | scale)

    def _write_noise_scale(self, step: int, gradient_norms: list[float], batch: int) -> None:
        """Update the noise scale with a step's squared gradient norms and write it down, unless they are not finite."""
        small, big = gradient_norms
        if not self.noise_scale.add(estimate(small, big, self.plan.micro_batch, batch), step):
            return
        values = self.noise_scale.values()
        scale = values["noise_scale"]
        shown = "hidden by noise" if scale is None else f"{scale:,.0f} images"
        self._record("noise_scale", step, values, f"gradient noise scale {shown}")
        self._monitor("Train", step, {name: value for name, value in values.items() if value is not None})

    def _record(self, name: str, step: int, values: dict[str, Any], text: str) -> dict[str, Any]:
        """Write an event into ``metrics.jsonl`` and its text into the log; return the event."""
        epoch = self.plan.timeline.place(step)[0]
        event = {"event": name, "step": step, "epoch": epoch} | values
        if self.writer is not None:
            self.writer.event(event)
            place = f"epoch {epoch + 1}/{self.plan.epochs}"
            if name == "validation":
                self.writer.say(f"{place}: {text}")
            else:
                self.writer.log(f"{place}, step {step}: {text}")
        return event

    def _monitor(self, part: str, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            samples = self.plan.timeline.images(step + 1)
            self.monitor([(f"{part}/Samples/{name}", value, samples) for name, value in values.items()])


class Writer:
    """Rank 0's files and its terminal."""

    def __init__(self, output: Path, first_step: int, validated_steps: int, total_steps: int) -> None:
        with writing(output / METRICS):
            self.steps_kept = drop_later_events(output / METRICS, first_step, validated_steps)
            self.metrics = (output / METRICS).open("a", encoding="utf-8")
        with writing(output / LOG):
            self.log_file = (output / LOG).open("a", encoding="utf-8")
        self.progress = Progress(total_steps, "steps", first_step)

    def event(self, event: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        self._write(self.metrics, json.dumps(event, allow_nan=False))

    def log(self, message: str) -> None:
        """Append a line to the log file."""
        self._write(self.log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def sync(self) -> None:
        """Sync ``metrics.jsonl`` to disk: no checkpoint may exist without the lines that precede it."""
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
        """Print a line above the bar and log it."""
        message = printable(message)
        self.log(message)
        self.progress.say(message)

    def close(self) -> None:
        """Stop the bar and close the files."""
        self.progress.close()
        with contextlib.suppress(OSError):  # a failed write has been reported already
            self.metrics.close()
            self.log_file.close()


def drop_later_events(metrics: Path, first_step: int, validated_steps: int) -> int:
    """Drop the lines that a resumed run will write again, and half-written ones; return how many steps are left.

    Lines about updates before ``first_step`` stay, and validations after at most ``validated_steps`` steps.
    """
    if not metrics.exists():
        return 0
    limits = {"step": first_step, "noise_scale": first_step, "validation": validated_steps}
    kept, steps = [], 0
    for line in metrics.read_bytes().splitlines():
        event = parse_event(line)
        if event is not None and event["step"] < limits.get(event["event"], 0):
            kept.append(line + b"\n")
            steps += event["event"] == "step"
    replace_text(metrics, b"".join(kept).decode())
    return steps


class Reported(NamedTuple):
    """A step and its values on the host; ``loss`` and ``gradient_norms`` are means over ranks."""

    step: Step
    loss: float
    loss_scale: float
    skipped: bool
    gradient_norms: list[float] | None


class Report:
    """The values of several steps while they are copied from the device to the host, which does not wait."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        skips = [torch.zeros_like(step.loss) if step.skipped is None else step.skipped for step in steps]
        norms = [step.gradient_norms for step in steps if step.gradient_norms is not None]
        on_device = [
            _mean_over_ranks(torch.stack([step.loss for step in steps])),
            torch.stack([step.loss_scale for step in steps]),
            torch.stack([skip.double() for skip in skips]),
            *([_mean_over_ranks(torch.stack(norms))] if norms else []),
        ]
        self._on_host = [values.to("cpu", non_blocking=True) for values in on_device]  # from a GPU: in pinned memory
        self._arrived = None
        if on_device[0].device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[Reported]:
        """Each step with its values; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        losses, scales, skips, *norms = (values.tolist() for values in self._on_host)
        pairs = iter(norms[0] if norms else [])
        return [
            Reported(step, loss, scale, bool(skipped), None if step.gradient_norms is None else next(pairs))
            for step, loss, scale, skipped in zip(self._steps, losses, scales, skips, strict=True)
        ]


def _is_asynchronous(device: torch.device) -> bool:
    """Whether work queued on ``device`` may still be running."""
    return device.type != "cpu"


def _mean_over_ranks(values: Tensor) -> Tensor:
    # Gathered and added in rank order: an all-reduce may add in another order, and so round differently, depending on
    # how many values are reported together, which changes after a signal and in a resumed run.
    ranks = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, values)
    total = ranks[0]
    for other in ranks[1:]:
        total = total + other
    return total / len(ranks)


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON cannot express."""
    return value if math.isfinite(value) else None
