"""From the bytes of an image file to pixels: simplejpeg where it can, PIL for all else, and the same pixels by both."""

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for damaged files: its UnidentifiedImageError is an OSError, a broken PNG a SyntaxError."""

_JPEG = b"\xff\xd8"


def decode(file: bytes) -> Tensor:
    """Decode an image into RGB pixels, uint8 (height, width, 3), as torchvision's ``pil_loader`` does.

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
                return torch.from_numpy(simplejpeg.decode_jpeg(file, colorspace="RGB"))
        except ValueError:
            pass
    return _decode_by_pil(file)


def _largest() -> int:
    return Image.MAX_IMAGE_PIXELS or 2**62


def _decode_by_pil(file: bytes) -> Tensor:
    with warnings.catch_warnings():
        # PIL speaks of metadata and palettes here; the pixels are those that torchvision's users get.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(file)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
