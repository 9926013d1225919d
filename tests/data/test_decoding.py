"""Decoded pixels against PIL's, of what image folders hold and of what simplejpeg does not take."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from recipe.data import decoding as module
from recipe.data.decoding import decode
from tests.data.images import picture, pixels


def encoded(image: Image.Image, form: str = "JPEG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))


def by_pil(file: bytes) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pixels(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("quality", [30, 75, 100])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_are_pils_bit_for_bit_without_pil(monkeypatch, quality, subsampling):
    for image in (noise(), picture(1, width=83, height=61), picture(2, width=1, height=9), noise().convert("L")):
        for settings in ({}, {"progressive": True}, {"optimize": True}):
            if image.mode != "L":
                settings = settings | {"subsampling": subsampling}
            file = encoded(image, quality=quality, **settings)
            expected = by_pil(file)
            with monkeypatch.context() as patch:
                patch.setattr(module, "_decode_by_pil", None)
                ours = decode(file)
                assert torch.equal(ours.pixels, expected)
                assert not ours.by_pil


@pytest.mark.parametrize(
    "file",
    [
        encoded(picture(3, mode="CMYK")),
        encoded(picture(4), "PNG"),
        encoded(picture(5, mode="RGBA"), "PNG"),
        encoded(picture(6).convert("P"), "GIF"),
        encoded(picture(7), "WEBP", lossless=True),
    ],
    ids=["cmyk", "png", "alpha", "palette", "webp"],
)
def test_what_simplejpeg_does_not_take_is_pils_too(file):
    ours = decode(file)
    assert torch.equal(ours.pixels, by_pil(file))
    assert ours.by_pil


def test_what_a_camera_adds_behind_a_jpeg_is_ignored():
    file = encoded(picture(9))
    assert torch.equal(decode(file + b"what a camera adds").pixels, by_pil(file))


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (b"", "the file is empty"),
        (b"\xff\xd8", "cannot identify image file"),
        (b"\xff\xd8\xff\xe0 no image", "Truncated File Read"),
        (b"text", "cannot identify image file"),
        (encoded(picture())[:300], "Truncated File Read"),
    ],
)
def test_what_is_no_image_is_refused(file, problem):
    with pytest.raises(module.UNREADABLE) as error:
        decode(file)
    assert str(error.value) == problem


def deep_grey(values: list[int], form: str, kind: type = np.uint16) -> bytes:
    return encoded(Image.fromarray(np.array([values], kind)), form)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(form):
    # By hand: v / 257 = v · 255 / 65,535, rounded to the nearest; 128 / 257 < 1/2 < 129 / 257.
    ours = decode(deep_grey([0, 128, 129, 257, 32_768, 65_407, 65_535], form)).pixels
    assert ours.tolist() == [[[grey] * 3 for grey in (0, 0, 1, 1, 128, 255, 255)]]


@pytest.mark.parametrize(
    ("values", "kind", "problem"),
    [
        (
            [0, 1],
            np.float32,
            "its grey values are floating-point numbers, whose range is not known",
        ),
        (
            [0, 70_000],
            np.int32,
            "its grey values are 32-bit integers, whose range is not known",
        ),
    ],
)
def test_grey_of_an_unknown_range_is_refused(values, kind, problem):
    with pytest.raises(module.DecodingError) as error:
        decode(deep_grey(values, "TIFF", kind))
    assert str(error.value) == problem


def test_whatever_a_decoder_raises_is_a_bad_image(monkeypatch):
    file = bytearray(encoded(picture(3, width=200, height=200), "AVIF"))
    middle = len(file) // 2
    file[middle : middle + 64] = bytes(64)
    with pytest.raises(module.DecodingError):  # the decoder's own is a RuntimeError
        decode(bytes(file))

    def broken(file: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "_decode_by_pil", broken)
    with pytest.raises(module.DecodingError, match="ZeroDivisionError"):
        decode(encoded(picture(), "PNG"))

    def full(file: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_decode_by_pil", full)  # the machine's fault, not the image's
    with pytest.raises(MemoryError):
        decode(encoded(picture(), "PNG"))


def test_an_image_beyond_pils_limit_is_to_be_shrunk(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(module.DecodingError, match=r"^it has more than 1,000 pixels, the most that PIL takes$"):
        decode(encoded(picture(), "PNG"))


@pytest.mark.parametrize(
    ("bits", "photometric", "expected"), [(12, 1, [0, 128, 255]), (16, 0, [255, 247, 239]), (16, 1, [0, 8, 16])]
)
def test_a_tiff_tells_its_own_range(bits, photometric, expected):
    """Of 0, 2,048 and 4,095: by 4,095 where 12 bits are used; 65,535 is 16 times as much, but for rounding."""
    values = np.array([[0, 2048, 4095]], np.uint16)
    file = bytearray(encoded(Image.fromarray(values), "TIFF"))
    for tag, value in ((258, bits), (262, photometric)):
        entry = file.index(tag.to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00")  # one value of 16 bits
        file[entry + 8 : entry + 10] = value.to_bytes(2, "little")
    if bits == 12:  # PIL unpacks them: three bytes hold two values
        packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in ((0, 2048), (4095, 0)))
        at = file.index(values.tobytes())
        file[at : at + 6] = packed
    assert decode(bytes(file)).pixels[0, :, 0].tolist() == expected
