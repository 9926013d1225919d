"""Mixup and CutMix on the device, between pairs of neighbours in the global batch.

A micro-batch with an even number of samples consists of whole pairs wherever it starts, so every split into ranks and
micro-batches mixes the same pairs. The sample order is random, and so are the pairs. As in timm and torchvision, all
pairs of a step share one ratio and one box, which are a function of (seed, step).
"""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from recipe.data.batch import Batch
from recipe.data.seeds import derive_seed


@dataclass(frozen=True)
class Mixed:
    """How the pairs of a step are mixed: each sample keeps ``share`` of itself."""

    share: float
    box: tuple[int, int, int, int] | None = None
    """the box (top, left, bottom, right) that CutMix takes from the other sample; None for mixup"""


@dataclass(frozen=True)
class Mixing:
    """Mixes batches and turns their labels into probabilities (m, classes).

    ``mixup`` and ``cutmix`` are each (the share of steps to mix, the α of the Beta(α, α) from which the share of a
    sample that is kept is drawn); Zhang et al. 2018, Yun et al. 2019.
    """

    mixup: tuple[float, float]
    cutmix: tuple[float, float]
    classes: int
    seed: int

    def mix(self, batches: Iterable[Batch], first_step: int, accumulation: int) -> Iterator[Batch]:
        """Yield the micro-batches, ``accumulation`` per optimizer step from ``first_step`` on, mixed if configured."""
        mixes = self.mixup[0] + self.cutmix[0] > 0
        for number, batch in enumerate(batches):
            if mixes:
                drawn = self.draw(first_step + number // accumulation, batch.images.shape[-1])
                yield mix_neighbours(batch, drawn, self.classes)
            else:
                yield batch

    def draw(self, step: int, size: int) -> Mixed:
        """Return how an optimizer step of the run mixes images of ``size`` × ``size`` pixels."""
        rng = random.Random(derive_seed("mixing", self.seed, step))
        kind = rng.random()
        (mixup, alpha), (cutmix, cut_alpha) = self.mixup, self.cutmix
        if kind < mixup:
            return Mixed(rng.betavariate(alpha, alpha))
        if kind >= mixup + cutmix:
            return Mixed(1.0)
        half = math.sqrt(1 - rng.betavariate(cut_alpha, cut_alpha)) * size / 2
        y, x = rng.random() * size, rng.random() * size
        top, left, bottom, right = (min(size, max(0, round(side))) for side in (y - half, x - half, y + half, x + half))
        return Mixed(1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))


def open_mixing(section: Mapping[str, Any], classes: int, seed: int) -> Mixing:
    """Return the mixing that ``recipe.data`` of a resolved config, as a dict, asks for."""
    mixup, cutmix = ((section[name]["probability"], section[name]["alpha"]) for name in ("mixup", "cutmix"))
    return Mixing(mixup, cutmix, classes, seed)


def mix_neighbours(batch: Batch, how: Mixed, classes: int) -> Batch:
    """Return the batch with samples 0 and 1, 2 and 3, … mixed with each other."""
    images = batch.images
    order = torch.arange(len(images), device=images.device) ^ 1
    labels = F.one_hot(batch.labels, classes).to(torch.promote_types(images.dtype, torch.float32))
    if how.box is None:
        images = images.lerp(images[order], 1 - how.share) if how.share < 1 else images
    else:
        top, left, bottom, right = how.box
        images = images.clone()
        images[:, :, top:bottom, left:right] = batch.images[order, :, top:bottom, left:right]
    return replace(batch, images=images, labels=labels.lerp(labels[order], 1 - how.share))
