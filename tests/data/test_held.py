"""Samples cropped on the device are bit-identical to the data set's own."""

import numpy as np
import psutil
import pytest
import torch

from recipe.data import BadImageError, HeldImages, Keys, open_datasets
from recipe.data.resizing import resize, resized_boxes
from recipe.data.sampler import PADDING
from tests.data.images import CPU, Pictures, assert_same, load, picture, pixels, write_folder


def batch(samples, epoch, indices):
    """A batch as it arrives on the device."""
    return samples.on_device(samples[Keys(epoch, np.array(indices))])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 41), (9, 100)])
@pytest.mark.parametrize("size", [8, 24, 32, 57])
def test_boxes_are_resized_as_by_torch_on_a_cpu(size, height, width):
    generator = torch.Generator().manual_seed(size * width)
    images = torch.randint(256, (400, height, width, 3), generator=generator, dtype=torch.uint8)
    images[:100] = pixels(picture(width=width, height=height))
    corners = torch.rand(400, 4, generator=generator)
    heights, widths = 1 + (corners[:, 0] * height).long(), 1 + (corners[:, 1] * width).long()
    tops = (corners[:, 2] * (height - heights + 1)).long()
    lefts = (corners[:, 3] * (width - widths + 1)).long()
    boxes = torch.stack([tops, lefts, heights, widths], 1)
    for ours, image, (top, left, h, w) in zip(resized_boxes(images, boxes, size), images, boxes.tolist(), strict=True):
        assert torch.equal(ours, resize(image[top : top + h, left : left + w], size, size)), (top, left, h, w)


@pytest.mark.parametrize(
    ("crop", "workers", "size"),
    [
        *((crop, 0, ((0, 24), (2, 20))) for crop in ("random_resized", "padded", "none")),
        ("random_resized", 2, 24),
        ("padded", 0, 24),
        ("none", 0, 24),
    ],
)
def test_batches_are_the_data_sets(crop, workers, size):
    plain = open_datasets("digits", None, image_size=size, crop=crop, flip=True, seed=3, validation_image_size=28)
    held = [HeldImages(part, CPU, training=part is plain[0]) for part in plain]
    seen, expected = (load(samples, (2,), workers, global_batch=64, micro_batch=32) for samples in (held, plain))
    assert {batch.images.shape[-1] for batch in expected} == {24 if size == 24 else 20, 28}
    assert_same(seen, expected)


def test_bad_images_are_replaced_or_left_out_as_from_the_folder(tmp_path):
    folder = write_folder(tmp_path)
    for part in ("train", "val"):
        (folder / part / "c0" / "2.jpg").write_bytes(b"no image")
        picture(5).save(folder / part / "c1" / "1.jpg", "PNG")
    options = {"image_size": 16, "crop": "padded", "flip": True, "seed": 0}
    plain = open_datasets("imagefolder", folder, **options, on_bad_image="skip")
    for part in plain:
        training = part is plain[0]
        held = HeldImages(part, CPU, training=training)
        keys = (1, range(6)) if training else (None, [*range(6), PADDING])
        expected, ours = batch(part, *keys), batch(held, *keys)
        for mine, theirs in zip(ours[:4], expected[:4], strict=True):
            assert torch.equal(mine, theirs)
        assert ours.bad_images == expected.bad_images == [str(folder / ("train" if training else "val") / "c0/2.jpg")]
        assert (ours.decoded_by_pil, held.decoded_by_pil) == (0, 1)
    with pytest.raises(BadImageError, match=r"2\.jpg: not a readable image"):
        HeldImages(open_datasets("imagefolder", folder, **options)[1], CPU, training=False)


def test_images_of_several_sizes_are_refused_if_boxes_are_cut_out_of_them():
    with pytest.raises(ValueError, match=r"on_device = true: picture 1 has 30 × 21 pixels, picture 0 has 30 × 20; ran"):
        HeldImages(Pictures(), CPU, training=True)
    padded = HeldImages(Pictures(crop="padded"), CPU, training=True)
    assert batch(padded, 0, [5]).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("ranks", "share"), [(1, 0.6), (2, 0.3)])
def test_more_than_half_of_the_memory_is_refused_before_everything_is_read(monkeypatch, ranks, share):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    train = Pictures(length=int(share * psutil.virtual_memory().available / (30 * 20 * 3)))
    each = " for each of 2 ranks" if ranks > 1 else ""
    with pytest.raises(ValueError, match=rf"30 × 20 pixels take [\d.]+ GB{each}, but only [\d.]+ GB are free"):
        HeldImages(train, CPU, training=True)
