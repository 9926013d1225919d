"""Small data sets that live on the device, decoded once: there a batch is cut, from keys and crops drawn as ever."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from recipe.data.augment import View
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Key, Sample, Samples
from recipe.data.resizing import resize, resized_boxes
from recipe.data.sampler import PADDING

_SHARE = 0.5
"""Of the memory that is free; the rest is for training."""

_CUT = View(0, 0, 0, 0, 0, 0)
"""Of what is held as it is seen."""


class HeldImages(Samples):
    """The images of a data set as one tensor on a device; every sample is that of the data set, to the bit.

    All of it is read when this is made, on all cores. ``Sample.image`` is the image's place, int64 (10,): its row, and
    its view. ``training`` tells whether training samples will be asked for, or validation samples.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, *, training: bool) -> None:
        self._dataset = dataset
        self.class_names = dataset.class_names
        self._crop = dataset.crop if training else "none"

        def read(index: int) -> tuple[Sample, int]:
            """The sample, and the image that stands there, which is another where this one is bad."""
            if not training:
                return dataset[index], index
            (pixels, by_pil), source = dataset.readable_from(index)
            if dataset.crop != "random_resized":
                pixels = resize(pixels, dataset.image_size, dataset.image_size)
            bad_image = "" if source == index else dataset.name(index)
            return Sample(pixels, int(dataset.labels[source]), bad_image=bad_image, by_pil=by_pil), source

        first_sample, first_source = read(0)
        first = first_sample.image
        _check_memory(len(dataset), first, device)
        self._samples: list[Sample] = []
        # Behind the last is a black one, at PADDING.
        images = torch.zeros(len(dataset) + 1, *first.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for index, (sample, source) in enumerate(threads.map(read, range(len(dataset)))):
                if sample.image.shape != first.shape:
                    height, width = sample.image.shape[:2]
                    raise ValueError(
                        f"recipe.data.on_device = true: {dataset.name(source)} has {height} × {width} pixels, "
                        f"{dataset.name(first_source)} has {first.shape[0]} × {first.shape[1]}; random_resized crops "
                        'on the device need images of one size: write false, or another "crop"'
                    )
                images[index] = sample.image
                row = index if sample.weight else PADDING
                self._samples.append(sample._replace(image=torch.tensor([row, *_CUT]), by_pil=False))
                self.decoded_by_pil += sample.by_pil
        self._images = images.to(device)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> Sample:
        if key == PADDING:
            return Sample(torch.tensor([PADDING, *_CUT]), 0, 0.0)
        if isinstance(key, int):
            return self._samples[key]
        view = self._dataset.view(key, *self._images.shape[1:3])
        place = torch.tensor([key[1], *view])
        return self._samples[key[1]]._replace(image=place, mirrored=view.mirrored)

    def on_device(self, batch: HostBatch) -> HostBatch:
        places = batch.images.to(self._images.device, non_blocking=True)
        rows, views = places[:, 0], places[:, 1:]
        if self._crop == "random_resized":
            return batch._replace(images=resized_boxes(self._images[rows], views[:, :4], self._dataset.image_size))
        if self._crop == "padded":
            return batch._replace(images=_windows(self._images, rows, views[:, 6:8]))
        return batch._replace(images=self._images[rows])


def _windows(images: Tensor, rows: Tensor, boxes: Tensor) -> Tensor:
    """The windows as large as the images that see them from ``boxes``' (top, left); black beyond the border."""
    size = images.shape[1]
    sides = torch.arange(size, device=images.device)
    y, x = (boxes[:, 0, None] + sides)[:, :, None], (boxes[:, 1, None] + sides)[:, None, :]
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    return images[torch.where(inside, rows[:, None, None], PADDING), y.clamp(0, size - 1), x.clamp(0, size - 1)]


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
