"""The paper's arithmetic as pure functions (Goyal et al. 2017, arXiv 1706.02677).

The plan, the schedule and the tests' tables share them.
"""

import math
from dataclasses import dataclass
from typing import Literal

ScalingRule = Literal["linear", "sqrt", "none"]
Warmup = Literal["gradual", "constant", "none"]
WarmupType = Literal["linear", "log"]
Decay = Literal["step", "cosine", "polynomial", "linear", "none"]
WeightDecayRule = Literal["constant", "inverse"]


def scaled_rate(reference_lr: float, reference_batch_size: int, batch_size: int, rule: ScalingRule) -> float:
    """The peak rate for a global batch of ``batch_size`` images.

    ``"linear"`` is the paper's rule (§2.1): η̂ = η · kn / 256. ``"sqrt"`` and ``"none"`` are the two that it
    compares with (Table 2a).
    """
    ratio = batch_size / reference_batch_size
    match rule:
        case "linear":
            return reference_lr * ratio
        case "sqrt":
            return reference_lr * math.sqrt(ratio)
        case "none":
            return reference_lr


def scaled_weight_decay(
    reference_weight_decay: float, reference_batch_size: int, batch_size: int, rule: WeightDecayRule
) -> float:
    """λ for a global batch: the paper's constant (§5.1), or divided by kn / 256."""
    if rule == "inverse":
        return reference_weight_decay / (batch_size / reference_batch_size)
    return reference_weight_decay


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """The nearest whole number of optimizer steps; halves go up."""
    return math.floor(epochs * steps_per_epoch + 0.5)


def warmup_applies(
    warmup: Warmup, batch_size: int, reference_batch_size: int, start_rate: float, peak_rate: float
) -> bool:
    """Whether a run warms up: only where kn > 256 (§2.2), and only towards a higher rate."""
    return warmup != "none" and batch_size > reference_batch_size and peak_rate > start_rate


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate as a pure function of the optimizer step, counted from 0.

    ``warmup_steps`` is T_w: update T_w is the first to use ``peak_rate``. ``milestones`` are the steps from
    which on the rate is multiplied by ``decay_factor`` once more, for the decay "step".

    The other decays fall from ``peak_rate`` at T_w to ``final_rate`` at T = ``total_steps``, one step after the last,
    with p = (t − T_w) / (T − T_w) by (1 + cos πp) / 2 for "cosine" (Loshchilov and Hutter 2017, eq. 5), by (1 − p)ᵏ
    with k = ``decay_power`` for "polynomial", and by 1 − p for "linear".
    """

    start_rate: float
    peak_rate: float
    warmup: Warmup
    warmup_steps: int
    warmup_type: WarmupType
    milestones: tuple[int, ...] = ()
    decay_factor: float = 1.0
    decay: Decay = "step"
    total_steps: int = 0
    final_rate: float = 0.0
    decay_power: float = 1.0

    @property
    def has_curve(self) -> bool:
        """Whether the rate falls at every step after the warmup."""
        return self.decay not in ("step", "none")

    def rate(self, step: int) -> float:
        """The rate that update number ``step`` uses."""
        if step < self.warmup_steps or not self.has_curve:
            decays = sum(step >= milestone for milestone in self.milestones)
            return self._undecayed_rate(step) * self.decay_factor**decays
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        match self.decay:
            case "cosine":
                share = (1 + math.cos(math.pi * progress)) / 2
            case "polynomial":
                share = (1 - progress) ** self.decay_power
            case _:
                share = 1 - progress
        return self.final_rate + (self.peak_rate - self.final_rate) * share

    def _undecayed_rate(self, step: int) -> float:
        if step >= self.warmup_steps:
            return self.peak_rate
        if self.warmup == "constant":
            return self.start_rate
        if self.warmup_type == "log":
            # DeepSpeed's own curve, which stands at the peak one step before T_w.
            progress = math.log(step + 1) / math.log(max(2, self.warmup_steps))
        else:
            # η(t) = η₀ + (η̂ − η₀) · t / T_w, §2.2
            progress = step / self.warmup_steps
        return self.start_rate + (self.peak_rate - self.start_rate) * progress
