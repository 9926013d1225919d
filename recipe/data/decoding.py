"""From the bytes of an image file to pixels: simplejpeg where it can, PIL for all else, and the same pixels by both."""

import io
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for damaged files: its UnidentifiedImageError is an OSError, a broken PNG a SyntaxError."""

_JPEG = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"


class Decoded(NamedTuple):
    """An image in memory."""

    pixels: Tensor
    """RGB, uint8 (height, width, 3)."""
    by_pil: bool = False
    """Whether the slower decoder had to do it, as for all that is no JPEG."""


def decode(file: bytes) -> Decoded:
    """Decode an image into the pixels of torchvision's ``pil_loader``.

    simplejpeg (libjpeg-turbo) takes three quarters of PIL's time for a JPEG, and is bit for bit the same for RGB,
    progressive and grey ones. What it does not take, as CMYK, or finds fault with, is left to PIL, and so is the
    judgement of what is damaged.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: It is no image, damaged, or too large.
    """
    if file.startswith(_JPEG):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
            if colours in ("YCbCr", "Gray", "RGB") and height * width <= _largest():
                return Decoded(torch.from_numpy(simplejpeg.decode_jpeg(file, colorspace="RGB")))
        except ValueError:
            pass
    if not file:
        raise ValueError("the file is empty")
    try:
        return Decoded(_decode_by_pil(file), by_pil=True)
    except UnidentifiedImageError:
        # PIL's own message names the place in memory, another one each time.
        raise UnidentifiedImageError("cannot identify image file") from None


def plain_jpeg_size(file: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG of a usual kind that ends where its data does, None for all else."""
    if not file.startswith(_JPEG) or not file.endswith(_JPEG_END):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
    except ValueError:
        return None
    return (height, width) if colours in ("YCbCr", "Gray") and height * width <= _largest() else None


def _largest() -> int:
    return Image.MAX_IMAGE_PIXELS or 2**62


def _decode_by_pil(file: bytes) -> Tensor:
    with warnings.catch_warnings():
        # PIL speaks of metadata and palettes here; the pixels are those that torchvision's users get.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(file)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
