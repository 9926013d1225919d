"""From pixels to the square that is trained or evaluated on: pure functions of uint8 tensors (height, width, 3)."""

import math
import random
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.data.seeds import derive_seed

Crop = Literal["random_resized", "padded", "none"]
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
    """What one epoch takes out of a training image: a box, and whether it is mirrored.

    For the crop ``random_resized`` the box lies in the image, in its pixels, and is resized to ``image_size``; for the
    others it is a square of ``image_size`` in the resized image, beyond whose border all is black.
    """

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def draw_view(rng: random.Random, height: int, width: int, *, image_size: int, crop: Crop, flip: bool) -> View:
    """Return the view that ``rng`` draws of an image of (height, width) pixels; ``flip`` mirrors half of them."""
    top, left, box_height, box_width = 0, 0, image_size, image_size
    if crop == "random_resized":
        top, left, box_height, box_width = random_resized_box(rng, height, width)
    elif crop == "padded":
        margin = image_size // 8
        top, left = (_below(rng, 2 * margin + 1) - margin for _ in range(2))
    return View(top, left, box_height, box_width, flip and rng.random() < 0.5)


def cut(pixels: Tensor, view: View, *, image_size: int, crop: Crop) -> Tensor:
    """Return the view, uint8 (image_size, image_size, 3). Mirroring is left to the device."""
    if crop == "random_resized":
        top, left, height, width, _ = view
        return resize(pixels[top : top + height, left : left + width], image_size, image_size)
    resized = resize(pixels, image_size, image_size)
    return resized if crop == "none" else _shifted(resized, view.top, view.left)


def evaluation_short_side(image_size: int, crop: Crop) -> int:
    """Return the short side, in pixels, to which ``evaluation_view`` resizes an image before it cuts."""
    return round(image_size * 256 / 224) if crop == "random_resized" else image_size


def evaluation_view(pixels: Tensor, *, image_size: int, crop: Crop) -> Tensor:
    """Return the image, uint8 (image_size, image_size, 3), nothing drawn.

    After ``random_resized`` training it is the centre of the image resized to a short side of 256/224 of
    ``image_size`` (the paper's 224 of 256); else the whole image.
    """
    if crop != "random_resized":
        return resize(pixels, image_size, image_size)
    height, width = pixels.shape[:2]
    short_side = evaluation_short_side(image_size, crop)
    # As torchvision's Resize and CenterCrop count: the long side is cut off, the margin rounded.
    height, width = (
        int(short_side * side / min(height, width)) if side > min(height, width) else short_side
        for side in (height, width)
    )
    view = resize(pixels, height, width)
    top, left = (round((side - image_size) / 2) for side in (height, width))
    return view[top : top + image_size, left : left + image_size]


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (h, w, 3) as PIL does, bilinear with antialiasing; now and then a value differs by one."""
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = pixels.unsqueeze(0).permute(0, 3, 1, 2)  # in memory as it was: channels_last, which torch's kernel likes
    resized = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).squeeze(0)


def _shifted(pixels: Tensor, top: int, left: int) -> Tensor:
    """What a window as large as ``pixels`` sees from (top, left): black beyond the border."""
    height, width = pixels.shape[:2]
    view = torch.zeros_like(pixels)
    view[max(0, -top) : height - max(0, top), max(0, -left) : width - max(0, left)] = pixels[
        max(0, top) : height + min(0, top), max(0, left) : width + min(0, left)
    ]
    return view


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)
