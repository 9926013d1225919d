"""From an image to the square that is trained or evaluated on, and random erasing of that square."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.data.batch import Batch
from recipe.data.resizing import resize
from recipe.data.sampler import Keys
from recipe.data.seeds import derive_seed, uniform

Crop = Literal["random_resized", "padded", "none"]
"""How training images are cropped.

``random_resized``: a random box (scale and aspect-ratio augmentation, Goyal et al. §5.1).
``padded``: a shift by up to ``image_size // 8`` pixels over a black border (4 at 32 pixels, as for CIFAR).
``none``: the whole image.
"""

_AREA, _ERASED_AREA = (0.08, 1.0), (0.02, 1 / 3)
"""Range of a box's area, as a share of the image."""
_WIDEST, _ERASED_WIDEST = 4 / 3, 1 / 0.3
"""Largest ratio of a box's width to its height; the smallest is its inverse."""
_TRIES = 10

# How a sample's random numbers are used; the positions are the same for every crop.
_AREAS, _RATIOS, _CORNER, _CHANCE = slice(_TRIES), slice(_TRIES, 2 * _TRIES), slice(2 * _TRIES, 2 * _TRIES + 2), 22
_NUMBERS = 23


class View(NamedTuple):
    """A box of an image, the size to which it is resized, and a square window of the result, in pixels.

    The window is black outside the resized box. The views of a batch are int64 (m, 9), one row per image.
    """

    top: int
    left: int
    height: int
    width: int
    resized_height: int
    resized_width: int
    window_top: int = 0
    window_left: int = 0
    mirrored: int = 0
    """1 if the device mirrors the image"""


def sample_numbers(purpose: str, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Return random numbers for samples, float64 (m, 23) in [0, 1), on the device of ``indices``.

    They depend on purpose, seed, epoch and index alone, not on rank, worker or batch.
    """
    positions = torch.arange(_NUMBERS, device=indices.device)
    return uniform(derive_seed(purpose, seed, epoch), indices[:, None] * _NUMBERS + positions)


def random_resized_boxes(numbers: Tensor, sizes: Tensor) -> Tensor:
    """Return a box in each image of ``sizes`` (height, width), drawn as by torchvision's ``RandomResizedCrop``.

    ``sizes`` and the boxes are int64 (m, 2) and (m, 4): top, left, height, width; ``numbers`` is float64 (m, 23).

    The boxes are the same to the pixel on every device and in every batch, because no result depends on a library's
    rounding. IEEE 754 defines sums, products and quotients to the last bit. Each is an operation of its own, so none is
    fused, and none divides by a constant, which torch's CUDA kernel would replace with a multiplication. A Padé
    approximant, less than 2e-9 off for these ratios, replaces the exponential. Square roots, which MKL sometimes
    rounds wrongly by one ulp, are only needed in whole pixels, and these are found by comparing squares.
    """
    sizes = sizes.double()
    height, width = sizes.split(1, dim=1)
    heights, widths = _candidate_sides(numbers, height * width, _AREA, _WIDEST)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    any_fits, sides = _first_that_fits(heights, widths, fits)
    # If none fits: the largest centred box whose ratio is within the bounds.
    boxes = torch.where(any_fits, sides, torch.minimum(sizes, (sizes.flip(1) * _WIDEST).round()))
    margins = sizes - boxes
    corners = torch.where(any_fits, numbers[:, _CORNER] * (margins + 1), margins * 0.5).floor()
    return torch.cat([corners, boxes], dim=1).long()


def erased_boxes(seed: int, epoch: int, indices: Tensor, image_size: int, probability: float) -> Tensor:
    """Return the box to erase in each image, drawn as by timm's ``RandomErasing``; empty if nothing is erased.

    Boxes are int64 (m, 4): top, left, height, width. They depend on seed, epoch and index alone.
    """
    numbers = sample_numbers("erasing", seed, epoch, indices)
    heights, widths = _candidate_sides(numbers, image_size**2, _ERASED_AREA, _ERASED_WIDEST)
    any_fits, sides = _first_that_fits(heights, widths, (heights < image_size) & (widths < image_size))
    corners = (numbers[:, _CORNER] * (image_size - sides + 1)).floor()
    is_erased = any_fits & (numbers[:, _CHANCE, None] < probability)
    return (torch.cat([corners, sides], dim=1) * is_erased).long()


def _candidate_sides(
    numbers: Tensor, image_area: Tensor | int, share: tuple[float, float], widest: float
) -> tuple[Tensor, Tensor]:
    """Return the heights and widths, (m, 10) each, of the boxes to try."""
    area = image_area * (share[0] + (share[1] - share[0]) * numbers[:, _AREAS])
    # The logarithm of the ratio is uniform from -log(widest) to log(widest).
    x = 2 * math.log(widest) * (numbers[:, _RATIOS] - 0.5)
    even, odd = 120 + 12 * (x * x), x * (60 + x * x)
    ratio = (even + odd) / (even - odd)  # e^x
    return _rounded_root(area / ratio), _rounded_root(area * ratio)


def _first_that_fits(heights: Tensor, widths: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether any box fits, (m, 1), and the height and width of the first one that does, (m, 2)."""
    first = fits.byte().argmax(1, keepdim=True)
    return fits.any(1, keepdim=True), torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)


def _rounded_root(squares: Tensor) -> Tensor:
    """Return the square roots, rounded to whole numbers; squares of half-integers below 2^25 are exact."""
    below = (squares.sqrt() - 1).floor().clamp(min=0)  # too small by up to two
    return below + ((below + 0.5).square() <= squares) + ((below + 1.5).square() <= squares)


def draw_views(
    seed: int, epoch: int, indices: Tensor, sizes: Tensor, *, image_size: int, crop: Crop, flip: bool
) -> Tensor:
    """Return the views of training images at ``indices``, int64 (m,), with ``sizes`` (height, width), int64 (m, 2).

    ``flip`` mirrors half of them.
    """
    numbers = sample_numbers("augmentation", seed, epoch, indices)
    views = torch.zeros(len(indices), len(View._fields), dtype=torch.int64, device=indices.device)
    views[:, 2:4] = sizes
    views[:, 4:6] = image_size
    if crop == "random_resized":
        views[:, :4] = random_resized_boxes(numbers, sizes)
    elif crop == "padded":
        margin = padded_margin(image_size)
        views[:, 6:8] = (numbers[:, _CORNER] * (2 * margin + 1)).long() - margin
    if flip:
        views[:, 8] = numbers[:, _CHANCE] < 0.5
    return views


def padded_margin(image_size: int) -> int:
    """Return the largest shift of a ``padded`` crop, in pixels."""
    return image_size // 8


def evaluation_short_side(image_size: int, crop: Crop) -> int:
    """Return the short side, in pixels, to which ``evaluation_view`` resizes an image before cropping."""
    return round(image_size * 256 / 224) if crop == "random_resized" else image_size


def evaluation_view(height: int, width: int, *, image_size: int, crop: Crop) -> View:
    """Return the view that evaluation takes of an image of (height, width) pixels.

    After ``random_resized`` training, that is the centre of the image resized to a short side of 256/224 of
    ``image_size`` (the paper's 224 of 256), otherwise the whole image.
    """
    if crop != "random_resized":
        return View(0, 0, height, width, image_size, image_size)
    short_side = evaluation_short_side(image_size, crop)
    # Like torchvision's Resize and CenterCrop: the long side is truncated, the margin rounded.
    resized_height, resized_width = (
        int(short_side * side / min(height, width)) if side > min(height, width) else short_side
        for side in (height, width)
    )
    top, left = (round((side - image_size) / 2) for side in (resized_height, resized_width))
    return View(0, 0, height, width, resized_height, resized_width, top, left)


def cut(pixels: Tensor, view: View, image_size: int) -> Tensor:
    """Return the view of an image, uint8 (image_size, image_size, 3), not yet mirrored."""
    box = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    resized = resize(box, view.resized_height, view.resized_width)
    bottom, right = view.window_top + image_size, view.window_left + image_size
    # Negative padding crops.
    columns = (-view.window_left, right - view.resized_width)
    rows = (-view.window_top, bottom - view.resized_height)
    return F.pad(resized, (0, 0, *columns, *rows))


@dataclass(frozen=True)
class Erasing:
    """Random erasing on the device (Zhong et al. 2020): fills a box of some training images with the mean colour."""

    probability: float
    seed: int

    def erase(self, batch: Batch, keys: Keys) -> Batch:
        """Return the batch, whose samples are those of ``keys``, with boxes erased."""
        assert keys.epoch is not None, "validation erases nothing"
        indices, size = torch.from_numpy(keys.indices), batch.images.shape[-1]
        boxes = erased_boxes(self.seed, keys.epoch, indices, size, self.probability)
        return replace(batch, images=fill_boxes(batch.images, boxes.to(batch.images.device, non_blocking=True)))


def fill_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each image, (m, 3, S, S), to 0, which is the mean colour after normalisation.

    ``boxes`` is int64 (m, 4): top, left, height, width.
    """
    along = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows, columns = (top <= along) & (along < top + height), (left <= along) & (along < left + width)
    # Unlike masked_fill, where() keeps the images channels_last.
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], 0, images)
