"""The gradient noise scale of McCandlish et al. 2018 (arXiv 1812.06162): how many images a step are worth while.

A gradient over B images that are drawn independently has the mean G and the covariance Σ / B, so that the expectation
of its squared norm is |G|² + tr(Σ) / B. The norms at two sizes of batch tell both, and tr(Σ) / |G|² is a number of
images, B_simple. Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

# Of the moving averages, a measurement. They are as good as the plain mean of (1 + decay) / (1 - decay) = 19 of them.
DECAY = 0.9


class Estimate(NamedTuple):
    """tr(Σ) of the gradient of one image and |G|², of one measurement. Either may come out negative: it is unbiased."""

    gradient_variance: float
    gradient_norm_squared: float


def estimate(small_norm_squared: float, big_norm_squared: float, small_batch: int, big_batch: int) -> Estimate:
    """tr(Σ) and |G|² from squared gradient norms at two sizes of batch, in images (appendix A.1).

    With one norm a size it is unbiased; any mean over batches of the small size stays so.
    """
    gap = big_batch - small_batch
    return Estimate(
        gradient_variance=(small_norm_squared - big_norm_squared) * (small_batch * big_batch / gap),
        gradient_norm_squared=(big_batch * big_norm_squared - small_batch * small_norm_squared) / gap,
    )


@dataclass
class NoiseScale:
    """Moving averages of both, and their ratio; the ratio of single estimates would be biased, and jump.

    The averages begin with zeros; ``weight`` is what the measurements count in them, by which they are divided.
    """

    variance: float = 0.0
    norm_squared: float = 0.0
    weight: float = 0.0

    def add(self, new: Estimate) -> bool:
        """Take one measurement in, unless it is not finite; say whether it was."""
        if not all(map(math.isfinite, new)):
            return False
        self.variance = DECAY * self.variance + (1 - DECAY) * new.gradient_variance
        self.norm_squared = DECAY * self.norm_squared + (1 - DECAY) * new.gradient_norm_squared
        self.weight = DECAY * self.weight + (1 - DECAY)
        return True

    def values(self) -> dict[str, float | None]:
        """tr(Σ) of the gradient of one image, |G|², and B_simple in images; None where noise hides either of the two.

        Raises:
            ZeroDivisionError: nothing has been measured.
        """
        variance, norm_squared = self.variance / self.weight, self.norm_squared / self.weight
        return {
            "gradient_variance": variance,
            "gradient_norm_squared": norm_squared,
            "noise_scale": variance / norm_squared if variance > 0 and norm_squared > 0 else None,
        }


def in_words(noise_scale: float | None, global_batch: int) -> str:
    """What B_simple, in images, means for a batch.

    By the model of the paper's section 2 training to a given loss takes 1 + B_simple / B times the steps of a batch
    without bound, and 1 + B / B_simple times the images of the smallest one.
    """
    if noise_scale is None:
        return f"the gradients were too noisy, or too alike, to tell it; your batch is {global_batch:,}"
    useful = f"about {_two_digits(noise_scale)} images are" if noise_scale >= 1.5 else "a single image is"
    return (
        f"at this point of training {useful} a useful batch; yours is {global_batch:,}: about "
        f"{_two_digits(1 + noise_scale / global_batch)} times the fewest steps, "
        f"{_two_digits(1 + global_batch / noise_scale)} times the fewest images"
    )


def _two_digits(number: float) -> str:
    rounded = float(f"{number:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
