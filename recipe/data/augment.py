"""From a PIL image to the square uint8 tensor that is trained or evaluated on: pure functions."""

import math
import random
from typing import Literal

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

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


def training_view(image: Image.Image, rng: random.Random, *, image_size: int, crop: Crop, flip: bool) -> Tensor:
    """Return the augmented RGB image as uint8 (3, image_size, image_size); ``flip`` mirrors half of them."""
    size = [image_size, image_size]
    if crop == "random_resized":
        image = functional.resized_crop(image, *random_resized_box(rng, image.height, image.width), size)
    else:
        image = functional.resize(image, size)
        if crop == "padded":
            margin = image_size // 8
            top, left = (_below(rng, 2 * margin + 1) - margin for _ in range(2))
            # PIL fills what lies beyond the border with zeros.
            image = functional.crop(image, top, left, image_size, image_size)
    if flip and rng.random() < 0.5:
        image = functional.hflip(image)
    return functional.pil_to_tensor(image)


def evaluation_view(image: Image.Image, *, image_size: int, crop: Crop) -> Tensor:
    """Return the RGB image as uint8 (3, image_size, image_size), nothing drawn.

    After ``random_resized`` training it is the centre of the image resized to a short side of 256/224 of
    ``image_size`` (the paper's 224 of 256); else the whole image.
    """
    if crop == "random_resized":
        image = functional.resize(image, round(image_size * 256 / 224))
        image = functional.center_crop(image, [image_size, image_size])
    else:
        image = functional.resize(image, [image_size, image_size])
    return functional.pil_to_tensor(image)


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)
