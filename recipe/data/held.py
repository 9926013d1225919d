"""Small data sets that live on the device, decoded once: there a batch is cut, from keys and crops drawn as ever."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from recipe.data.augment import View, resize
from recipe.data.batch import HostBatch
from recipe.data.datasets import ImageDataset, Key, Sample, Samples
from recipe.data.sampler import PADDING

_SHARE = 0.5
"""Of the memory that is free; the rest is for training."""

_CUT = View(0, 0, 0, 0, 0, 0)
"""Of what is held as it is seen."""


class HeldImages(Samples):
    """The images of a data set on a device; every sample is that of the data set, to the bit.

    ``Sample.image`` is the image's place, int64 (10,): its row, and its view.

    Args:
        dataset: What is held. All of it is read now, on all cores.
        device: Where it is held, as one tensor.
        training: Whether it is asked for training samples, of (epoch, index), or for validation samples.

    Raises:
        ValueError: It takes too much memory, or boxes are to be cut out of images that differ in size.
        BadImageError: An image cannot be read, and the data set does not skip it.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, *, training: bool) -> None:
        self._dataset = dataset
        self._crop = dataset.crop if training else "none"

        def read(index: int) -> Sample:
            if not training:
                return dataset[index]
            (pixels, by_pil), source = dataset.readable_from(index)
            if dataset.crop != "random_resized":
                pixels = resize(pixels, dataset.image_size, dataset.image_size)
            bad_image = "" if source == index else dataset.name(index)
            return Sample(pixels, int(dataset.labels[source]), bad_image=bad_image, by_pil=by_pil)

        first = read(0).image
        _check_memory(len(dataset), first, device)
        self._samples: list[Sample] = []
        # Behind the last is a black one, at PADDING.
        images = torch.zeros(len(dataset) + 1, *first.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for index, sample in enumerate(threads.map(read, range(len(dataset)))):
                if sample.image.shape != first.shape:
                    height, width = sample.image.shape[:2]
                    raise ValueError(
                        f"recipe.data.on_device = true: {dataset.name(index)} has {height} × {width} pixels, "
                        f"{dataset.name(0)} has {first.shape[0]} × {first.shape[1]}; random_resized crops on the "
                        'device need images of one size: write false, or another "crop"'
                    )
                images[index] = sample.image
                row = index if sample.weight else PADDING
                self._samples.append(sample._replace(image=torch.tensor([row, *_CUT]), by_pil=False))
                self.decoded_by_pil += sample.by_pil
        self._images = images.to(device)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of ``key``."""
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


def resized_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it; the same values as torch's kernel for uint8 gives on a CPU.

    Args:
        images: uint8 (m, height, width, 3).
        boxes: int64 (m, 4): top, left, height, width, in pixels.
        size: S, pixels a side of what comes out.

    Returns:
        uint8 (m, S, S, 3).
    """
    m, height, width, _ = images.shape
    every = torch.arange(m, device=images.device)[:, None, None]
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(size, device=images.device)[None, None, :]
    # First along the rows, then along the columns, rounded to uint8 between.
    first, weights, precision = _taps(boxes[:, 3], size, width)
    sums = torch.zeros(m, height, size, 3, dtype=torch.int32, device=images.device)
    for tap in range(weights.shape[-1]):
        column = (boxes[:, 1, None] + first + tap).clamp_(max=width - 1)
        sums += images[every, rows, column[:, None, :]] * weights[:, None, :, tap, None]
    images = _rounded(sums, precision)
    first, weights, precision = _taps(boxes[:, 2], size, height)
    sums = torch.zeros(m, size, size, 3, dtype=torch.int32, device=images.device)
    for tap in range(weights.shape[-1]):
        row = (boxes[:, 0, None] + first + tap).clamp_(max=height - 1)
        sums += images[every, row[:, :, None], columns] * weights[:, :, None, tap, None]
    return _rounded(sums, precision)


def _taps(lengths: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each pixel of a resized line is the weighted sum of, as torch's ``UpSampleKernel.cpp`` computes it.

    Args:
        lengths: int64 (m,), pixels of each line.
        size: S, pixels that it is to have.
        longest: No line is longer.

    Returns:
        The first pixel, int64 (m, S); the weights from there on, int32 (m, S, taps), times 2 to the power of the
        precision, int32 (m,).
    """
    scale = (lengths.double() / size)[:, None]
    support = scale.clamp(min=1.0)
    centre = scale * (torch.arange(size, device=lengths.device) + 0.5)
    first = (centre - support + 0.5).long().clamp_(min=0)
    count = torch.minimum((centre + support + 0.5).long(), lengths[:, None]) - first
    inverse = torch.where(scale >= 1, 1 / scale, 1.0)
    taps = 2 * math.ceil(max(longest / size, 1.0)) + 1
    weights = torch.zeros(*first.shape, taps, dtype=torch.float64, device=lengths.device)
    total = torch.zeros_like(centre)
    for tap in range(taps):
        weight = (1 - ((first + tap - centre + 0.5) * inverse).abs()).clamp_(min=0)
        weights[:, :, tap] = torch.where(count > tap, weight, 0.0)
        total += weights[:, :, tap]  # one after the other, to round as the kernel does
    weights /= total[:, :, None]
    # The largest precision at which the largest weight is below 2^15 when rounded.
    mantissa, exponent = torch.frexp(weights.amax((1, 2)))
    precision = (15 - exponent - (mantissa * 2**15 >= 2**15 - 0.5).int()).clamp_(max=22)
    return first, (weights * (1 << precision)[:, None, None] + 0.5).int(), precision


def _rounded(sums: Tensor, precision: Tensor) -> Tensor:
    precision = precision[:, None, None, None]
    return ((sums + (1 << (precision - 1))) >> precision).clamp_(0, 255).to(torch.uint8)


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
