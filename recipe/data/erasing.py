"""Random erasing on the device (Zhong et al. 2020): a box of an image becomes the mean colour, by timm's rule."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recipe.data.augment import erased_boxes
from recipe.data.batch import Batch
from recipe.data.sampler import Keys


@dataclass(frozen=True)
class Erasing:
    """Erases a box in so many of the training images; which ones and where follow from seed, epoch and index."""

    probability: float
    seed: int

    def erase(self, batch: Batch, keys: Keys) -> Batch:
        """The batch, which holds the samples of ``keys``; 0 is the mean colour, as images are normalised."""
        assert keys.epoch is not None, "validation erases nothing"
        boxes = erased_boxes(
            self.seed, keys.epoch, torch.from_numpy(keys.indices), batch.images.shape[-1], self.probability
        )
        return replace(batch, images=fill_boxes(batch.images, boxes.to(batch.images.device, non_blocking=True)))


def fill_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Return images, (m, 3, S, S), with 0 in a box of each: top, left, height, width, int64 (m, 4)."""
    along = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows, columns = (top <= along) & (along < top + height), (left <= along) & (along < left + width)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
