"""From pixels to the square that is trained or evaluated on: pure functions of uint8 tensors (height, width, 3)."""

import math
import random
from typing import Literal, NamedTuple

from torch import Tensor

from recipe.data.resizing import resize, resized_window
from recipe.data.seeds import derive_seed

Crop = Literal["random_resized", "padded", "none"]
MOST_RESIZED_PIXELS = 2**24
"""What is cut out of a training image.

``random_resized``: a random part of random shape (scale and aspect-ratio augmentation, Goyal et al. §5.1).
``padded``: a shift by up to ``image_size // 8`` pixels over a black border (4 at 32 pixels, as for CIFAR).
``none``: the whole image.
"""

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """Return the random numbers of one sample in one epoch, the same on any rank and in any worker.

    Only ``random()`` is drawn from it: the one method whose sequence Python guarantees across versions.
    """
    return random.Random(derive_seed("augmentation", seed, epoch, index))


def random_resized_box(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) in pixels, drawn like torchvision's ``RandomResizedCrop``."""
    log_low, log_high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(10):
        area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * rng.random())
        ratio = math.exp(log_low + (log_high - log_low) * rng.random())
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _below(rng, height - h + 1), _below(rng, width - w + 1), h, w

    h, w = height, width
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


class View(NamedTuple):
    """What is taken out of an image: a box of it, resized, and of that a square window; all in pixels.

    Beyond the border of the resized box the window is black.
    """

    top: int
    left: int
    height: int
    width: int
    resized_height: int
    resized_width: int
    window_top: int = 0
    window_left: int = 0
    mirrored: bool = False


def draw_view(rng: random.Random, height: int, width: int, *, image_size: int, crop: Crop, flip: bool) -> View:
    """Return the view that ``rng`` draws of an image of (height, width) pixels; ``flip`` mirrors half of them."""
    box, window = (0, 0, height, width), (0, 0)
    if crop == "random_resized":
        box = random_resized_box(rng, height, width)
    elif crop == "padded":
        margin = image_size // 8
        window = _below(rng, 2 * margin + 1) - margin, _below(rng, 2 * margin + 1) - margin
    return View(*box, image_size, image_size, *window, flip and rng.random() < 0.5)


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
    if view.resized_height * view.resized_width > MOST_RESIZED_PIXELS:
        # Of an image that is far longer than it is wide: the rest would be seen by nobody, and fill the memory.
        size = view.resized_height, view.resized_width
        window = resized_window(box.cpu(), *size, rows, columns).to(box.device)
    else:
        resized = resize(box, view.resized_height, view.resized_width)
        window = resized[rows.start : rows.stop, columns.start : columns.stop]
    if window.shape[:2] == (image_size, image_size):
        return window
    top, left = max(0, -view.window_top), max(0, -view.window_left)
    padded = window.new_zeros(image_size, image_size, 3)
    padded[top : top + window.shape[0], left : left + window.shape[1]] = window
    return padded


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)
