"""The paper's arithmetic as pure functions (Goyal et al. 2017, arXiv 1706.02677).

The plan and the engine's schedule share them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ScalingRule = Literal["linear", "sqrt", "none"]


def scaled_rate(reference_lr: float, reference_batch_size: int, batch_size: int, rule: ScalingRule) -> float:
    """The peak rate for a global batch of ``batch_size`` images.

    ``"linear"`` is the paper's rule (§2.1): η̂ = η · kn / 256, ``"sqrt"`` and ``"none"`` the two that it is compared
    with (Table 2a).
    """
    ratio = batch_size / reference_batch_size
    match rule:
        case "linear":
            return reference_lr * ratio
        case "sqrt":
            return reference_lr * math.sqrt(ratio)
        case "none":
            return reference_lr


@dataclass(frozen=True)
class Phase:
    """A range of epochs with one global batch, which starts with the step ``first_step`` of the run."""

    first_epoch: int
    first_step: int
    global_batch: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Timeline:
    """Maps optimizer steps, counted from 0, to epochs and images in a run whose batch can change between epochs."""

    phases: tuple[Phase, ...]
    epochs: int

    @staticmethod
    def of(batches: Iterable[tuple[int, int]], train_images: int, epochs: int) -> "Timeline":
        """From pairs of an epoch, the first 0, and the batch from that epoch on; partial batches are dropped."""
        timeline = Timeline((), epochs)
        for epoch, batch in batches:
            first_step = timeline.steps(epoch) if timeline.phases else 0
            phase = Phase(epoch, first_step, batch, train_images // batch)
            timeline = Timeline((*timeline.phases, phase), epochs)
        return timeline

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps(self.epochs)

    def phase(self, step: int) -> Phase:
        """The phase of a step; the last one for steps after the end."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step and its index within that epoch, both from 0."""
        phase = self.phase(step)
        epochs, within = divmod(step - phase.first_step, phase.steps_per_epoch)
        return phase.first_epoch + epochs, within

    def steps(self, epochs: float) -> int:
        """A number of epochs in steps, rounded to the nearest, halves up."""
        phase = next(phase for phase in reversed(self.phases) if phase.first_epoch <= epochs)
        return phase.first_step + math.floor((epochs - phase.first_epoch) * phase.steps_per_epoch + 0.5)

    def epochs_done(self, steps: int) -> float:
        """A number of steps in epochs."""
        epoch, within = self.place(steps)
        return epoch + within / self.phase(steps).steps_per_epoch

    def images(self, steps: int) -> int:
        """The number of images that the first ``steps`` steps train on."""
        return sum(phase.global_batch * count for phase, count in self.spans(steps))

    def spans(self, steps: int) -> list[tuple[Phase, int]]:
        """Each phase with the number of its steps among the first ``steps``."""
        ends = [*(phase.first_step for phase in self.phases[1:]), steps]
        return [
            (phase, max(0, min(end, steps) - phase.first_step)) for phase, end in zip(self.phases, ends, strict=True)
        ]


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate as a pure function of the optimizer step, counted from 0.

    ``warmup_steps`` is T_w: step T_w is the first to use ``peak_rate``. For the decay "step", the rate is multiplied by
    ``decay_factor`` at each of the ``milestones``.

    The other decays fall from ``peak_rate`` at T_w to ``final_rate`` at T, one step after the last. With the progress
    p = (t − T_w) / (T − T_w), counted in images, they follow (1 + cos πp) / 2 for "cosine" (Loshchilov and Hutter 2017,
    eq. 5), (1 − p)ᵏ with k = ``decay_power`` for "polynomial", and 1 − p for "linear".

    ``peak_rate`` is for the first batch of ``timeline``; ``scaling_rule`` scales it to later batches.
    """

    start_rate: float
    peak_rate: float
    warmup: Literal["gradual", "constant", "none"]
    warmup_steps: int
    warmup_type: Literal["linear", "log"]
    milestones: tuple[int, ...] = ()
    decay_factor: float = 1.0
    decay: Literal["step", "cosine", "polynomial", "linear", "none"] = "step"
    final_rate: float = 0.0
    decay_power: float = 1.0
    scaling_rule: ScalingRule = "linear"
    timeline: Timeline = Timeline((Phase(0, 0, 1, 1),), 0)

    @property
    def has_curve(self) -> bool:
        """Whether the rate falls at every step after warmup."""
        return self.decay not in ("step", "none")

    def peak(self, batch: int) -> float:
        """The peak rate for a global batch of ``batch`` images."""
        return scaled_rate(self.peak_rate, self.timeline.phases[0].global_batch, batch, self.scaling_rule)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup_steps or not self.has_curve:
            decays = sum(step >= milestone for milestone in self.milestones)
            return self._undecayed_rate(step) * self.decay_factor**decays
        images, warmup = self.timeline.images, self.timeline.images(self.warmup_steps)
        progress = min(1.0, (images(step) - warmup) / max(1, images(self.timeline.total_steps) - warmup))
        match self.decay:
            case "cosine":
                share = (1 + math.cos(math.pi * progress)) / 2
            case "polynomial":
                share = (1 - progress) ** self.decay_power
            case _:
                share = 1 - progress
        peak = self.peak(self.timeline.phase(step).global_batch)
        return self.final_rate + (peak - self.final_rate) * share

    def _undecayed_rate(self, step: int) -> float:
        if step >= self.warmup_steps:
            return self.peak(self.timeline.phase(step).global_batch)
        if self.warmup == "constant":
            return self.start_rate
        if self.warmup_type == "log":
            # DeepSpeed's own curve, which reaches the peak one step before T_w.
            progress = math.log(step + 1) / math.log(max(2, self.warmup_steps))
        else:
            # η(t) = η₀ + (η̂ − η₀) · t / T_w, §2.2
            progress = step / self.warmup_steps
        return self.start_rate + (self.peak_rate - self.start_rate) * progress
