"""Decoded pixels against PIL's, of what image folders hold and of what simplejpeg does not take."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from recipe.data import decode as module
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
