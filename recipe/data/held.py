"""Small data sets decoded once and held on the device, where batches are drawn and cropped from their keys alone."""

import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.data.augment import padded_margin
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Sample, Samples
from recipe.data.resizing import resize, resized_boxes
from recipe.data.sampler import Keys

_SHARE = 0.5
"""Share of the free memory that images may take; the rest is for training."""


class HeldImages(Samples):
    """The images of a data set as one tensor on a device, from which every sample is bit-identical to the data set's.

    The constructor reads all images, on all cores. With ``training``, only training samples can be requested, otherwise
    only validation samples. The latter are held as the model sees them, and so are training images, apart from shifts
    and mirroring, if they are resized whole to a single size.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, *, training: bool) -> None:
        self._dataset = dataset
        self.class_names, self.digest = dataset.class_names, dataset.digest
        self._is_resized = dataset.crop != "random_resized" and len(dataset.sizes.training) == 1

        def read(index: int) -> Sample:
            if not training:
                return next(dataset.samples(None, [index]))
            sample = dataset.uncut(0, index)
            if not self._is_resized:
                return sample
            size = dataset.sizes.at(0)
            return sample._replace(image=resize(sample.image, size, size))

        first = read(0).image
        _check_memory(len(dataset), first, device)
        # The last row, at PADDING, is a blank.
        # Not on the host first: its memory may not hold the copies of all its GPUs.
        images = torch.zeros(len(dataset) + 1, *first.shape, dtype=torch.uint8, device=device)
        self._labels = torch.zeros(len(dataset) + 1, dtype=torch.int64)
        self._weights = torch.zeros(len(dataset) + 1)
        self._bad_images: dict[int, str] = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for index, sample in enumerate(threads.map(read, range(len(dataset)))):
                if sample.image.shape != first.shape:
                    height, width = sample.image.shape[:2]
                    raise ValueError(
                        f"recipe.data.on_device = true: {dataset.name(index)} has {height} × {width} pixels, "
                        f"{dataset.name(0)} has {first.shape[0]} × {first.shape[1]}; random_resized crops on the "
                        "device, and image sizes by epoch, need images of one size: use false"
                    )
                images[index], self._labels[index], self._weights[index] = sample[:3]
                if sample.bad_image:
                    self._bad_images[index] = sample.bad_image
                self.decoded_by_pil += sample.by_pil
        self._images = images
        self._size = torch.tensor([first.shape[:2]], device=device)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, keys: Keys) -> HostBatch:
        indices = torch.from_numpy(keys.indices)
        bad_images = [self._bad_images[index] for index in keys.indices.tolist() if index in self._bad_images]
        mirrored = torch.zeros(len(indices), dtype=torch.bool)
        return HostBatch((keys.epoch, indices), self._labels[indices], self._weights[indices], mirrored, bad_images, 0)

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
    """Return the window of each image, black beyond its border, that starts at (top, left) and has the same size."""
    count, size = images.shape[:2]
    lines = F.pad(images, (0, 0, margin, margin, margin, margin)).flatten(2)
    windows = lines.unfold(1, size, 1).unfold(2, 3 * size, 3)
    top, left = (corners + margin).unbind(1)
    return windows[torch.arange(count, device=images.device), top, left].view(images.shape)


def _check_memory(count: int, first: Tensor, device: torch.device) -> None:
    needed, holders = count * first.numel(), 1
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available  # including the page cache, which data that was just read may fill
        holders = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed * holders > _SHARE * free:
        height, width = first.shape[:2]
        each = f" for each of {holders} ranks" if holders > 1 else ""
        raise ValueError(
            f"recipe.data.on_device = true: {count:,} images of {height} × {width} pixels take {needed / 1e9:,.1f} GB"
            f"{each}, but only {free / 1e9:,.1f} GB are free on {device}, and images may take half of that: use false"
        )
