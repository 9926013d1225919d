"""Decodes image files into pixels: with simplejpeg where possible, otherwise with PIL, and with the same result."""

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_DEEP_GREY_FORMATS = ("PNG", "PPM")  # formats whose 32-bit integers hold 16 bits, from 0 to 65,535
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Tags of a TIFF."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_JPEG = b"\xff\xd8"


class DecodingError(ValueError):
    """The bytes are not an image to train on; ``remedy`` is "" if the file simply has to be fixed."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


UNREADABLE = (OSError, ValueError)
"""The errors of a bad image: its file cannot be read, has an impossible name, or cannot be decoded."""


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: Tensor
    """RGB, uint8 (height, width, 3)"""
    by_pil: bool = False
    """whether PIL decoded it, which is slower; it decodes everything that is not a JPEG"""


def decode(file: bytes) -> Decoded:
    """Decode an image into the pixels of torchvision's ``pil_loader``, or raise ``DecodingError``.

    simplejpeg (libjpeg-turbo) takes three quarters of PIL's time for a JPEG and gives the same bits for RGB,
    progressive and grey ones. PIL decodes whatever it does not support, such as CMYK, or rejects. PIL also decides what
    is damaged, and what has so many pixels that it may be an attack.
    """
    if jpeg_size(file, ("YCbCr", "Gray", "RGB")):
        try:
            return Decoded(torch.from_numpy(simplejpeg.decode_jpeg(file, colorspace="RGB")))
        except MemoryError:
            raise
        except Exception:  # PIL judges whatever simplejpeg rejects
            pass
    if not file:
        raise DecodingError("the file is empty")
    if file.startswith(_LFS_POINTER):
        raise DecodingError("it is a Git LFS pointer; git lfs pull fetches the image")
    try:
        return Decoded(_decode_by_pil(file), by_pil=True)
    except (DecodingError, MemoryError):
        raise
    except UnidentifiedImageError:
        # PIL's own message contains a memory address, which changes every time.
        raise DecodingError("cannot identify image file") from None
    except Image.DecompressionBombError:
        raise DecodingError(f"it has more than {2 * _largest():,} pixels, PIL's limit", "shrink it") from None
    except Exception as error:  # each of PIL's decoders raises its own kind
        raise DecodingError(str(error) or type(error).__name__) from error


def jpeg_size(file: bytes, colour_spaces: Sequence[str]) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG in one of these colour spaces within PIL's pixel limit, None for other files."""
    if not file.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
    except Exception:  # not a JPEG that simplejpeg can decode
        return None
    return (height, width) if colours in colour_spaces and height * width <= _largest() else None


def _largest() -> int:
    return Image.MAX_IMAGE_PIXELS or 2**62


def _decode_by_pil(file: bytes) -> Tensor:
    with warnings.catch_warnings():
        # PIL's warnings concern metadata and palettes; the pixels are the ones that torchvision's users get.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(file)) as image:
            return torch.from_numpy(np.array(_in_8_bits(image).convert("RGB")))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey images with more than 8 bits by the range of their type; PIL's own conversion clips at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_GREY_FORMATS):
        # A TIFF's tags say how many of the 16 bits it uses, and whether 0 is white; PIL ignores both here.
        tags = getattr(image, "tag_v2", {})
        white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        grey = ((np.asarray(image).astype(np.uint32) * 255 + white // 2) // white).clip(0, 255)  # rounded to nearest
        if tags.get(_PHOTOMETRIC) == 0:
            grey = 255 - grey
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise DecodingError(f"its grey values are {kind} of unknown range", "convert it to 8 or 16 bits")
    return image
