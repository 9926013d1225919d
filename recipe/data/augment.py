"""From pixels to the square that is trained or evaluated on: pure functions of uint8 tensors (height, width, 3)."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recipe.data.resizing import resize
from recipe.data.seeds import derive_seed, uniform

Crop = Literal["random_resized", "padded", "none"]
"""What is cut out of a training image.

``random_resized``: a random part of random shape (scale and aspect-ratio augmentation, Goyal et al. §5.1).
``padded``: a shift by up to ``image_size // 8`` pixels over a black border (4 at 32 pixels, as for CIFAR).
``none``: the whole image.
"""

_AREA, _ERASED_AREA = (0.08, 1.0), (0.02, 1 / 3)
"""Of a box, as a share of the image."""
_WIDEST, _ERASED_WIDEST = 4 / 3, 1 / 0.3
"""Width ÷ height of a box, at most; at least it is the inverse."""
_TRIES = 10

# Which of a sample's numbers decides what, whatever the crop.
_AREAS, _RATIOS, _CORNER, _CHANCE = slice(_TRIES), slice(_TRIES, 2 * _TRIES), slice(2 * _TRIES, 2 * _TRIES + 2), 22
_NUMBERS = 23


class View(NamedTuple):
    """What is taken out of an image: a box of it, resized, and of that a square window; all in pixels.

    Beyond the border of the resized box the window is black. Of a batch the views are int64 (m, 9), a row for each.
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
    """1 where the device is to mirror it"""


def sample_numbers(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Return the random numbers of samples, float64 (m, 23) from 0 to below 1, on the device of ``indices``.

    They belong to seed, epoch and index: the same on any rank, in any worker and in any batch.
    """
    return _numbers("augmentation", seed, epoch, indices)


def _numbers(purpose: str, seed: int, epoch: int, indices: Tensor) -> Tensor:
    places = torch.arange(_NUMBERS, device=indices.device)
    return uniform(derive_seed(purpose, seed, epoch), indices[:, None] * _NUMBERS + places)


def random_resized_boxes(numbers: Tensor, sizes: Tensor) -> Tensor:
    """Return a box in each image of ``sizes`` (height, width), drawn as torchvision's ``RandomResizedCrop`` draws them.

    ``sizes`` and the boxes are int64 (m, 2) and (m, 4): top, left, height, width; ``numbers`` is float64 (m, 23).

    Boxes are the same to the pixel on every device and in every batch, because no last bit is left to a library. Of
    sums, products and quotients IEEE 754 prescribes it; each is an operation of its own, so that none is fused, and
    none divides by a constant, which torch's CUDA kernel would replace by its inverse. A Padé approximant, for these
    ratios less than 2e-9 off, stands for the exponential. Square roots, which MKL leaves an ulp off now and then, are
    needed in whole pixels only, and these are found by comparing squares.
    """
    sizes = sizes.double()
    height, width = sizes.split(1, dim=1)
    heights, widths = _tried_sides(numbers, height * width, _AREA, _WIDEST)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    fitting, tried = _first_that_fits(heights, widths, fits)
    # If none does, the largest part of the image within the bounds of the ratio, its centre.
    boxes = torch.where(fitting, tried, torch.minimum(sizes, (sizes.flip(1) * _WIDEST).round()))
    margins = sizes - boxes
    corners = torch.where(fitting, numbers[:, _CORNER] * (margins + 1), margins * 0.5).floor()
    return torch.cat([corners, boxes], dim=1).long()


def erased_boxes(seed: int, epoch: int, indices: Tensor, image_size: int, probability: float) -> Tensor:
    """Return a box to erase in each image, as timm's ``RandomErasing`` draws them, or an empty one.

    Boxes are int64 (m, 4): top, left, height, width. They belong to seed, epoch and index, int64 (m,).
    """
    numbers = _numbers("erasing", seed, epoch, indices)
    heights, widths = _tried_sides(numbers, image_size**2, _ERASED_AREA, _ERASED_WIDEST)
    fitting, sides = _first_that_fits(heights, widths, (heights < image_size) & (widths < image_size))
    corners = (numbers[:, _CORNER] * (image_size - sides + 1)).floor()
    is_erased = fitting & (numbers[:, _CHANCE, None] < probability)
    return (torch.cat([corners, sides], dim=1) * is_erased).long()


def _tried_sides(
    numbers: Tensor, image_area: Tensor | int, share: tuple[float, float], widest: float
) -> tuple[Tensor, Tensor]:
    """Heights and widths of the boxes to try, (m, 10) each."""
    area = image_area * (share[0] + (share[1] - share[0]) * numbers[:, _AREAS])
    # The logarithm of the ratio is uniform from -log(widest) to log(widest).
    x = 2 * math.log(widest) * (numbers[:, _RATIOS] - 0.5)
    even, odd = 120 + 12 * (x * x), x * (60 + x * x)
    ratio = (even + odd) / (even - odd)  # e^x
    return _rounded_root(area / ratio), _rounded_root(area * ratio)


def _first_that_fits(heights: Tensor, widths: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether there is a box that fits, (m, 1), and the first one's height and width, (m, 2)."""
    first = fits.byte().argmax(1, keepdim=True)
    return fits.any(1, keepdim=True), torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1)


def _rounded_root(squares: Tensor) -> Tensor:
    """The square roots, rounded to whole numbers; the squares of halves below 2^25 are exact."""
    below = (squares.sqrt() - 1).floor().clamp(min=0)  # by up to two
    return below + ((below + 0.5).square() <= squares) + ((below + 1.5).square() <= squares)


def draw_views(
    seed: int, epoch: int, indices: Tensor, sizes: Tensor, *, image_size: int, crop: Crop, flip: bool
) -> Tensor:
    """Return what an epoch sees of the images at ``indices``, int64 (m,), of ``sizes`` (height, width), int64 (m, 2).

    ``flip`` mirrors half of them.
    """
    numbers = sample_numbers(seed, epoch, indices)
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
    """Return the pixels by which a ``padded`` crop is shifted at most."""
    return image_size // 8


def evaluation_short_side(image_size: int, crop: Crop) -> int:
    """Return the short side, in pixels, to which ``evaluation_view`` resizes an image before it cuts."""
    return round(image_size * 256 / 224) if crop == "random_resized" else image_size


def evaluation_view(height: int, width: int, *, image_size: int, crop: Crop) -> View:
    """Return what evaluation sees of an image of (height, width) pixels.

    After ``random_resized`` training it is the centre of the image resized to a short side of 256/224 of
    ``image_size`` (the paper's 224 of 256); else the whole image.
    """
    if crop != "random_resized":
        return View(0, 0, height, width, image_size, image_size)
    short_side = evaluation_short_side(image_size, crop)
    # As torchvision's Resize and CenterCrop count: the long side is cut off, the margin rounded.
    resized_height, resized_width = (
        int(short_side * side / min(height, width)) if side > min(height, width) else short_side
        for side in (height, width)
    )
    top, left = (round((side - image_size) / 2) for side in (resized_height, resized_width))
    return View(0, 0, height, width, resized_height, resized_width, top, left)


def cut(pixels: Tensor, view: View, image_size: int) -> Tensor:
    """Return the view of an image, uint8 (image_size, image_size, 3). Mirroring is left to the device."""
    box = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    rows = range(max(0, view.window_top), min(view.window_top + image_size, view.resized_height))
    columns = range(max(0, view.window_left), min(view.window_left + image_size, view.resized_width))
    resized = resize(box, view.resized_height, view.resized_width)
    window = resized[rows.start : rows.stop, columns.start : columns.stop]
    if window.shape[:2] == (image_size, image_size):
        return window
    top, left = max(0, -view.window_top), max(0, -view.window_left)
    padded = window.new_zeros(image_size, image_size, 3)
    padded[top : top + window.shape[0], left : left + window.shape[1]] = window
    return padded
