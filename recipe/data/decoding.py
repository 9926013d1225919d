"""From the bytes of an image file to pixels: simplejpeg where it can, PIL for all else, and the same pixels by both."""

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_DEEP_GREY_FORMATS = ("PNG", "PPM")  # those whose 32-bit integers hold 16 bits, from 0 to 65,535
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of a TIFF
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_JPEG = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"


class DecodingError(ValueError):
    """The bytes are no image that can be trained on; ``remedy`` is what to do about it, "" where it is to be mended."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


UNREADABLE = (OSError, ValueError)
"""What makes an image a bad one: its file cannot be read or named, or is not to be decoded (``DecodingError``)."""


class Decoded(NamedTuple):
    """An image in memory."""

    pixels: Tensor
    """RGB, uint8 (height, width, 3)."""
    by_pil: bool = False
    """Whether the slower decoder had to do it, as for all that is no JPEG."""


def decode(file: bytes, reduce_to: int = 0) -> Decoded:
    """Decode an image into the pixels of torchvision's ``pil_loader``, or raise ``DecodingError``.

    simplejpeg (libjpeg-turbo) takes three quarters of PIL's time for a JPEG, and is bit for bit the same for RGB,
    progressive and grey ones. What it does not take, as CMYK, or finds fault with, is left to PIL, and so is the
    judgement of what is damaged. PIL refuses images of very many pixels, which may be an attack; of those a JPEG is
    decoded at 1/2, 1/4 or 1/8 of its size if its short side keeps at least ``reduce_to`` > 0 pixels.
    """
    if _plain_size(file):
        try:
            return Decoded(torch.from_numpy(simplejpeg.decode_jpeg(file, colorspace="RGB")))
        except MemoryError:
            raise
        except Exception:  # whatever it finds fault with, PIL judges
            pass
    if not file:
        raise DecodingError("the file is empty")
    if file.startswith(_LFS_POINTER):
        raise DecodingError("Git LFS's pointer to it: git lfs pull fetches the image")
    try:
        return Decoded(_decode_by_pil(file), by_pil=True)
    except (DecodingError, MemoryError):
        raise
    except UnidentifiedImageError:
        # PIL's own message names the place in memory, another one each time.
        raise DecodingError("cannot identify image file") from None
    except Image.DecompressionBombError:
        if reduce_to and (pixels := _reduced(file, reduce_to)) is not None:
            return Decoded(pixels)
        raise DecodingError(
            f"it has more than {2 * _largest():,} pixels, the most that PIL takes", "shrink it"
        ) from None
    except Exception as error:  # each of PIL's decoders has its own; none of them is ours
        raise DecodingError(str(error) or type(error).__name__) from error


def plain_jpeg_size(file: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG of a usual kind that ends where its data does, None for all else."""
    return _plain_size(file, ("YCbCr", "Gray")) if file.endswith(_JPEG_END) else None


def _plain_size(file: bytes, colour_spaces: Sequence[str] = ("YCbCr", "Gray", "RGB")) -> tuple[int, int] | None:
    if not file.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
    except Exception:  # whatever it finds fault with is no plain JPEG
        return None
    return (height, width) if colours in colour_spaces and height * width <= _largest() else None


def _reduced(file: bytes, short_side: int) -> Tensor | None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(file)
        for factor in (8, 4, 2):
            smaller = -(-height // factor), -(-width // factor)
            if min(smaller) >= short_side:
                break
        if smaller[0] * smaller[1] > _largest():
            return None
        least = {"min_height": smaller[0], "min_width": smaller[1], "min_factor": 1}
        return torch.from_numpy(simplejpeg.decode_jpeg(file, colorspace="RGB", **least))
    except MemoryError:
        raise
    except Exception:
        return None


def _largest() -> int:
    return Image.MAX_IMAGE_PIXELS or 2**62


def _decode_by_pil(file: bytes) -> Tensor:
    with warnings.catch_warnings():
        # PIL speaks of metadata and palettes here; the pixels are those that torchvision's users get.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(file)) as image:
            return torch.from_numpy(np.array(_in_8_bits(image).convert("RGB")))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits by the range of its type; PIL's own conversion cuts off above 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_GREY_FORMATS):
        # A TIFF tells how many of the 16 bits it uses, and whether 0 is white, for which PIL does not care here.
        tags = getattr(image, "tag_v2", {})
        white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
        grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white  # rounded to the nearest
        grey = 255 - grey.clip(0, 255) if tags.get(_PHOTOMETRIC) == 0 else grey.clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise DecodingError(f"its grey values are {kind}, whose range is not known", "convert it to 8 or 16 bits")
    return image
