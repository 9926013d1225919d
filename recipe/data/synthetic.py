"""Random images generated on the device, to measure training without the cost of reading images."""

from collections.abc import Sequence

import torch

from recipe.data.batch import HostBatch
from recipe.data.datasets import Samples, Sizes
from recipe.data.sampler import PADDING, Keys
from recipe.data.seeds import derive_seed, uniform


class SyntheticImages(Samples):
    """The same random pixels and labels in every batch; smaller images are corners of the largest."""

    def __init__(
        self,
        length: int,
        *,
        classes: int,
        image_size: int | Sequence[tuple[int, int]],
        validation_image_size: int | None = None,
        seed: int,
        device: torch.device,
    ) -> None:
        self._length, self._classes, self._seed, self._device = length, classes, seed, device
        self.class_names, self.digest = [], ""
        self._sizes = Sizes(image_size, validation_image_size)
        self._pixels = torch.empty(0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, keys: Keys) -> HostBatch:
        count = len(keys.indices)
        labels = (uniform(derive_seed("labels", self._seed), torch.arange(count)) * self._classes).long()
        weights = torch.from_numpy(keys.indices != PADDING).float()
        return HostBatch(keys.epoch, labels, weights, torch.zeros(count, dtype=torch.bool), [], 0)

    def on_device(self, batch: HostBatch) -> HostBatch:
        count, size = len(batch.labels), self._sizes.at(batch.images)
        if len(self._pixels) < count:
            generator = torch.Generator(self._device).manual_seed(derive_seed("pixels", self._seed))
            shape = (count, self._sizes.largest, self._sizes.largest, 3)
            self._pixels = torch.randint(256, shape, generator=generator, device=self._device, dtype=torch.uint8)
        return batch._replace(images=self._pixels[:count, :size, :size].contiguous())
