"""Small data sets that live on the device, decoded once: there a batch is drawn and cut, from its keys alone."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.data.augment import padded_margin
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Sample, Samples
from recipe.data.resizing import resize, resized_boxes
from recipe.data.sampler import Keys

_SHARE = 0.5
"""Of the memory that is free; the rest is for training."""


class Held(NamedTuple):
    """The images of a batch."""

    epoch: int | None
    """as in ``Keys``"""
    indices: Tensor
    """int64 (m,): likewise"""


class HeldImages(Samples):
    """The images of a data set as one tensor on a device; every sample is that of the data set, to the bit.

    All of it is read when this is made, on all cores. ``training`` tells whether training samples will be asked for, or
    validation samples. The latter are held as they are seen, and the former where they are resized whole, to one size.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, *, training: bool) -> None:
        self._dataset = dataset
        self.class_names, self.digest = dataset.class_names, dataset.digest
        self._is_resized = dataset.crop != "random_resized" and len(dataset.sizes.training) == 1

        def read(index: int) -> tuple[Sample, int]:
            """The sample, and the image that stands there, which is another where this one is bad."""
            if not training:
                return next(dataset.samples(None, [index])), index
            (pixels, by_pil), source = dataset.readable_from(index)
            if self._is_resized:
                pixels = resize(pixels, dataset.sizes.at(0), dataset.sizes.at(0))
            bad_image = "" if source == index else dataset.name(index)
            return Sample(pixels, int(dataset.labels[source]), bad_image=bad_image, by_pil=by_pil), source

        first_sample, first_source = read(0)
        first = first_sample.image
        _check_memory(len(dataset), first, device)
        # Behind the last is a blank, at PADDING.
        images = torch.zeros(len(dataset) + 1, *first.shape, dtype=torch.uint8)
        self._labels = torch.zeros(len(dataset) + 1, dtype=torch.int64)
        self._weights = torch.zeros(len(dataset) + 1)
        self._bad_images: dict[int, str] = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for index, (sample, source) in enumerate(threads.map(read, range(len(dataset)))):
                if sample.image.shape != first.shape:
                    height, width = sample.image.shape[:2]
                    raise ValueError(
                        f"recipe.data.on_device = true: {dataset.name(source)} has {height} × {width} pixels, "
                        f"{dataset.name(first_source)} has {first.shape[0]} × {first.shape[1]}; random_resized crops "
                        "on the device, and image sizes by epoch, need images of one size: write false"
                    )
                images[index], self._labels[index], self._weights[index] = sample[:3]
                if sample.bad_image:
                    self._bad_images[index] = sample.bad_image
                self.decoded_by_pil += sample.by_pil
        self._images = images.to(device)
        self._size = torch.tensor([first.shape[:2]], device=device)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, keys: Keys) -> HostBatch:
        indices = torch.from_numpy(keys.indices)
        bad_images = [self._bad_images[index] for index in keys.indices.tolist() if index in self._bad_images]
        mirrored = torch.zeros(len(indices), dtype=torch.bool)
        return HostBatch(
            Held(keys.epoch, indices), self._labels[indices], self._weights[indices], mirrored, bad_images, 0
        )

    def on_device(self, batch: HostBatch) -> HostBatch:
        epoch, indices = batch.images
        indices = indices.to(self._images.device, non_blocking=True)
        if epoch is None:
            return batch._replace(images=self._images[indices])
        views = self._dataset.views(epoch, indices, self._size.expand(len(indices), 2))
        size, images = self._dataset.sizes.at(epoch), self._images[indices]
        if not self._is_resized:
            images = resized_boxes(images, views[:, :4], size)
        if self._dataset.crop == "padded":
            images = _windows(images, views[:, 6:8], padded_margin(size))
        return batch._replace(images=images, mirrored=views[:, 8].bool())


def _windows(images: Tensor, corners: Tensor, margin: int) -> Tensor:
    """Shift each image: what lies at its corner (top, left) and is as large; black beyond its border."""
    count, size = images.shape[:2]
    lines = F.pad(images, (0, 0, margin, margin, margin, margin)).flatten(2)
    windows = lines.unfold(1, size, 1).unfold(2, 3 * size, 3)
    top, left = (corners + margin).unbind(1)
    return windows[torch.arange(count, device=images.device), top, left].view(images.shape)


def _check_memory(count: int, first: Tensor, device: torch.device) -> None:
    needed = count * first.numel()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > _SHARE * free:
        height, width = first.shape[:2]
        raise ValueError(
            f"recipe.data.on_device = true: {count:,} images of {height} × {width} pixels take {needed / 1e9:,.1f} GB, "
            f"of {free / 1e9:,.1f} GB that are free on {device}; at most half is for images: write false"
        )
