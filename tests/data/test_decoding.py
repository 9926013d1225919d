"""Decoded pixels are PIL's, for whatever image folders contain, including files that simplejpeg does not support."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from recipe.data import decoding as module
from recipe.data.decoding import DecodingError, decode
from tests.data.images import picture, pixels


def encoded(image: Image.Image, form: str = "JPEG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def by_pil(file: bytes) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pixels(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("quality", [30, 75, 100])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_are_bit_identical_to_pils_without_pil(monkeypatch, quality, subsampling):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
    for image in (noise, picture(1, width=83, height=61), picture(2, width=1, height=9), noise.convert("L")):
        for settings in ({}, {"progressive": True}, {"optimize": True}):
            if image.mode != "L":
                settings = settings | {"subsampling": subsampling}
            file = encoded(image, quality=quality, **settings)
            expected = by_pil(file)
            with monkeypatch.context() as patch:
                patch.setattr(module, "_decode_by_pil", None)
                for content in (file, file + b"data that a camera appends"):
                    ours = decode(content)
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
def test_pil_decodes_everything_else(file):
    ours = decode(file)
    assert torch.equal(ours.pixels, by_pil(file))
    assert ours.by_pil


def deep_grey(values: list[int], form: str, kind: type = np.uint16) -> bytes:
    return encoded(Image.fromarray(np.array([values], kind)), form)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_to_eight_bits(form):
    # By hand: v / 257 = v · 255 / 65,535, rounded to the nearest; 128 / 257 < 1/2 < 129 / 257.
    ours = decode(deep_grey([0, 128, 129, 257, 32_768, 65_407, 65_535], form)).pixels
    assert ours.tolist() == [[[grey] * 3 for grey in (0, 0, 1, 1, 128, 255, 255)]]


@pytest.mark.parametrize(
    ("bits", "photometric", "expected"), [(12, 1, [0, 128, 255]), (16, 0, [255, 247, 239]), (16, 1, [0, 8, 16])]
)
def test_grey_tiffs_are_scaled_by_the_range_in_their_tags(bits, photometric, expected):
    """0, 2,048 and 4,095 are divided by 4,095 if 12 bits are used, else by 16 times as much."""
    values = np.array([[0, 2048, 4095]], np.uint16)
    file = bytearray(encoded(Image.fromarray(values), "TIFF"))
    for tag, value in ((258, bits), (262, photometric)):
        entry = file.index(tag.to_bytes(2, "little") + b"\x03\x00\x01\x00\x00\x00")  # one value of 16 bits
        file[entry + 8 : entry + 10] = value.to_bytes(2, "little")
    if bits == 12:  # three bytes hold two values
        packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in ((0, 2048), (4095, 0)))
        start = file.index(values.tobytes())
        file[start : start + 6] = packed
    assert decode(bytes(file)).pixels[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (b"", "the file is empty"),
        (b"\xff\xd8", "cannot identify image file"),
        (b"\xff\xd8\xff\xe0 no image", "Truncated File Read"),
        (b"text", "cannot identify image file"),
        (encoded(picture())[:300], "Truncated File Read"),
        (deep_grey([0, 1], "TIFF", np.float32), "its grey values are floating-point numbers of unknown range"),
        (deep_grey([0, 70_000], "TIFF", np.int32), "its grey values are 32-bit integers of unknown range"),
    ],
)
def test_bad_images_are_refused(file, problem):
    with pytest.raises(DecodingError) as error:
        decode(file)
    assert str(error.value) == problem


def test_any_error_of_a_decoder_means_a_bad_image(monkeypatch):
    file = bytearray(encoded(picture(3, width=200, height=200), "AVIF"))
    middle = len(file) // 2
    file[middle : middle + 64] = bytes(64)
    with pytest.raises(DecodingError):  # the decoder's own error is a RuntimeError
        decode(bytes(file))

    def out_of_memory(file: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_decode_by_pil", out_of_memory)  # the machine's fault, not the image's
    with pytest.raises(MemoryError):
        decode(encoded(picture(), "PNG"))
