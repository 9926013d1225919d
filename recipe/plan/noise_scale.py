"""The gradient noise scale of McCandlish et al. 2018 (arXiv 1812.06162): how large a batch is worthwhile.

A gradient over B independently drawn images has the mean G and the covariance Σ / B, so that its expected squared norm
is |G|² + tr(Σ) / B. The norms at two batch sizes determine both, and B_simple = tr(Σ) / |G|² is a number of images.
Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from recipe.plan.layout import counted

# The decay of the moving averages per measurement: as accurate as the mean of (1 + decay) / (1 - decay) = 19 of them.
DECAY = 0.9
ENOUGH = 20  # measurements, after which the averages are as accurate as they get


class Estimate(NamedTuple):
    """One measurement of tr(Σ) of a single image's gradient and of |G|². As it is unbiased, either can be negative."""

    gradient_variance: float
    gradient_norm_squared: float


def estimate(small_norm_squared: float, big_norm_squared: float, small_batch: int, big_batch: int) -> Estimate:
    """Estimate tr(Σ) and |G|² from the squared gradient norms at two batch sizes (appendix A.1).

    The estimate is unbiased, also with the mean over several batches of the small size.
    """
    gap = big_batch - small_batch
    return Estimate(
        gradient_variance=(small_norm_squared - big_norm_squared) * (small_batch * big_batch / gap),
        gradient_norm_squared=(big_batch * big_norm_squared - small_batch * small_norm_squared) / gap,
    )


@dataclass
class NoiseScale:
    """Moving averages of tr(Σ) and |G|², whose ratio is the noise scale; ratios of single estimates would be biased.

    The averages start at zero; ``weight`` is the total weight of the measurements in them, by which they are divided.
    ``lowest`` and ``highest`` are the range of the ratio since the measurement ``ENOUGH``.
    """

    variance: float = 0.0
    norm_squared: float = 0.0
    weight: float = 0.0
    measurements: int = 0
    last_step: int | None = None
    lowest: float | None = None
    highest: float | None = None

    def add(self, new: Estimate, step: int) -> bool:
        """Add the measurement of a step if it is finite; return whether it was."""
        if not all(map(math.isfinite, new)):
            return False
        self.variance = DECAY * self.variance + (1 - DECAY) * new.gradient_variance
        self.norm_squared = DECAY * self.norm_squared + (1 - DECAY) * new.gradient_norm_squared
        self.weight = DECAY * self.weight + (1 - DECAY)
        self.measurements, self.last_step = self.measurements + 1, step
        scale = self.values()["noise_scale"]
        if scale is not None and self.measurements >= ENOUGH:
            self.lowest = scale if self.lowest is None else min(self.lowest, scale)
            self.highest = scale if self.highest is None else max(self.highest, scale)
        return True

    def values(self) -> dict[str, float | None]:
        """The averages of tr(Σ) and |G|², and B_simple, which is None if either average is not positive.

        Raises:
            ZeroDivisionError: nothing has been measured.
        """
        variance, norm_squared = self.variance / self.weight, self.norm_squared / self.weight
        return {
            "gradient_variance": variance,
            "gradient_norm_squared": norm_squared,
            "noise_scale": variance / norm_squared if variance > 0 and norm_squared > 0 else None,
        }

    def summary(self, every_steps: int) -> dict[str, Any] | None:
        """The entry in ``summary.json``; None if nothing has been measured."""
        if not self.weight:
            return None
        kept = {key: getattr(self, key) for key in ("measurements", "last_step", "lowest", "highest")}
        return self.values() | kept | {"every_steps": every_steps}


def planned_measurements(total_steps: int, every_steps: int) -> int:
    """The number of measurements in a run, the first at step 0."""
    return -(-total_steps // every_steps)


def too_few(measurements: int, total_steps: int, every_steps: int) -> str | None:
    """A warning if the averages contain too few measurements, with the remedy if there is one; otherwise None."""
    if measurements >= ENOUGH:
        return None
    enough_every = (total_steps - 1) // (ENOUGH - 1)  # the longest interval that gives enough measurements
    text = f"{counted(measurements, 'measurement')} instead of about {ENOUGH}: it may be far off"
    if not enough_every:
        if every_steps > 1:
            text += f"; with recipe.noise_scale.every_steps = 1 there are {total_steps}"
        return f"{text}; a run of {total_steps} steps has no more"
    if enough_every < every_steps:
        text += f"; with recipe.noise_scale.every_steps = {enough_every} there are enough"
    return text


def in_words(found: Mapping[str, Any], global_batch: int, train_images: int, total_steps: int) -> list[str]:
    """Explain what a run's ``NoiseScale.summary`` means for its batch.

    In the model of the paper's section 2, training to a given loss takes 1 + B_simple / B times the steps of an
    infinite batch, and 1 + B / B_simple times the images of the smallest one.
    """
    lines, scale = [], found["noise_scale"]
    if scale is None and found["gradient_norm_squared"] <= 0:
        lines.append("no number: the mean gradient is lost in its noise; by this measure no batch is too large")
    elif scale is None:
        lines.append("no number: the gradients of the micro-batches are too alike to show their noise")
    else:
        size = _two_digits(scale)
        lines.append(f"about {size} images at the end: the gradient of such a batch is half signal, half noise")
        if scale > train_images:
            lines.append(f"more than the {train_images:,} training images: by this measure no batch is too large")
        lines.append(_beside(scale, global_batch, train_images))
    text = f"{counted(found['measurements'], 'measurement')}, the last at step {found['last_step']:,}"
    if found["lowest"] is not None:
        text += f"; {_two_digits(found['lowest'])} to {_two_digits(found['highest'])} images from the {ENOUGH}th on"
    few = too_few(found["measurements"], total_steps, found["every_steps"])
    return [*lines, text, *([] if few is None else [few])]


def _beside(scale: float, batch: int, train_images: int) -> str:
    """Compare the batch with B_simple, and say what twice or half of it would need."""
    where = "well below" if scale > 2 * batch else "well above" if scale < batch / 2 else "near"
    is_doubled = batch == 1 or (scale >= batch and 2 * batch <= train_images)
    other = 2 * batch if is_doubled else batch // 2
    steps, images = (1 + scale / other) / (1 + scale / batch), (1 + other / scale) / (1 + batch / scale)
    return (
        f"your batch of {batch:,} is {where} it: one of {other:,} would reach the same loss with about "
        f"{100 * steps:.0f} % of the steps and {100 * images:.0f} % of the images"
    )


def _two_digits(number: float) -> str:
    rounded = float(f"{number:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
