import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize, functional

from recipe.data.augment import cut, draw_view, evaluation_view, random_resized_box, sample_rng
from recipe.data.resizing import resize, resized_window
from tests.data.images import picture, pixels, rng_states

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def training_view(image, rng, *, image_size, crop, flip):
    view = draw_view(rng, *image.shape[:2], image_size=image_size, crop=crop, flip=flip)
    square = cut(image, view, image_size)
    return square.flip(1) if view.mirrored else square


def whole_view(image, *, image_size, crop):
    view = evaluation_view(*image.shape[:2], image_size=image_size, crop=crop)
    return cut(image, view, image_size)


def numbers(*key: int) -> list[float]:
    rng = sample_rng(*key)
    return [rng.random() for _ in range(3)]


def test_random_numbers_belong_to_seed_epoch_and_index():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 11, 1), (1, 1, 11), (11, 1, 1)]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)
    assert numbers(7, 8, 9) == numbers(7, 8, 9)


def test_the_random_numbers_of_today_are_those_of_tomorrow():
    """Of another Python version, of another machine: a resumed run draws the crops it would have drawn."""
    assert numbers(0, 0, 0) == [0.7187757753385198, 0.11211319568637135, 0.2497001870788651]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (100, 220), (32, 90)])
def test_boxes_are_distributed_as_torchvision_draws_them(height, width):
    draws = 4000
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, list(AREA), list(RATIO)) for _ in range(draws)])
    ours = np.array([random_resized_box(sample_rng(0, 0, index), height, width) for index in range(draws)])

    def features(boxes):
        top, left, h, w = boxes.T
        return {
            "area": h * w,
            "ratio": w / h,
            "top": top,
            "left": left,
            "row": top + h / 2,
            "column": left + w / 2,
        }

    for name, ours_of, theirs_of in zip(
        features(ours), features(ours).values(), features(theirs).values(), strict=True
    ):
        # The draws are fixed, so luck plays no part; 1e-3 is what it would ask for in 30 comparisons.
        assert ks_2samp(ours_of, theirs_of).pvalue > 1e-3, name


def test_boxes_lie_within_the_image_and_reach_its_edges():
    boxes = [random_resized_box(sample_rng(0, 0, index), 9, 11) for index in range(3000)]
    assert all(top >= 0 and left >= 0 and top + h <= 9 and left + w <= 11 for top, left, h, w in boxes)
    assert {top for top, *_ in boxes} >= {0, 5}
    assert {top + h for top, _, h, _ in boxes} >= {9}
    assert {left + w for _, left, _, w in boxes} >= {11}


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 500), (777, 1), (3, 100)])
def test_where_no_box_fits_the_fallback_is_torchvisions(height, width):
    with torch.random.fork_rng(devices=[]):
        theirs = RandomResizedCrop.get_params(torch.zeros(3, height, width), list(AREA), list(RATIO))
    assert random_resized_box(random.Random(0), height, width) == theirs


class Never(random.Random):
    """Draws the whole area and the widest ratio: a box that fits no image within the ratio's bounds."""

    def random(self) -> float:
        return 1.0


def test_the_fallback_for_a_usual_image_is_the_whole_image():
    assert random_resized_box(Never(), 30, 30) == (0, 0, 30, 30)


def nearly_equal(view: torch.Tensor, image: Image.Image) -> bool:
    """Whether a view is PIL's but for rounding, which moves fewer than one value in five by one."""
    difference = (view.int() - pixels(image).int()).abs()
    return view.shape == difference.shape and int(difference.max()) <= 2 and float(difference.float().mean()) < 0.2


@pytest.mark.parametrize(("height", "width"), [(24, 24), (40, 30), (7, 100), (1, 1), (300, 200)])
def test_resized_pixels_are_pils(height, width):
    for seed, image in enumerate((picture(1, width=53, height=37), picture(2, width=9, height=80), picture(3))):
        theirs = functional.resize(image, [height, width])
        assert nearly_equal(resize(pixels(image), height, width), theirs), seed
        # A part of an image, which lies in memory with gaps, and a copy of it.
        part = pixels(image)[2:9, 1:8]
        assert torch.equal(resize(part, height, width), resize(part.contiguous(), height, width))


@pytest.mark.parametrize("flip", [False, True])
def test_random_resized_pixels_are_torchvisions(flip):
    image = picture(1, width=53, height=37)
    flips = 0
    for index in range(20):
        view = training_view(pixels(image), sample_rng(0, 0, index), image_size=24, crop="random_resized", flip=flip)
        box = random_resized_box(sample_rng(0, 0, index), 37, 53)
        expected = functional.resized_crop(image, *box, [24, 24])
        assert view.dtype == torch.uint8
        assert view.shape == (24, 24, 3)
        flipped = not nearly_equal(view, expected)
        assert nearly_equal(view, functional.hflip(expected) if flipped else expected)
        flips += flipped
    assert 4 < flips < 16 if flip else flips == 0


def test_padded_crops_shift_by_up_to_an_eighth_over_black():
    image = picture(2, width=32, height=32)
    padded = pixels(functional.pad(image, [4, 4, 4, 4]))
    windows = {(top, left): padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
    seen = set()
    for index in range(600):
        view = training_view(pixels(image), sample_rng(0, 0, index), image_size=32, crop="padded", flip=False)
        (match,) = [place for place, window in windows.items() if torch.equal(view, window)]
        seen.add(match)
    assert seen == set(windows)


@pytest.mark.parametrize("crop", ["padded", "none"])
def test_images_of_another_size_are_resized_whole(crop):
    image = picture(3, width=50, height=20)
    whole = Resize((16, 16))(image)
    assert nearly_equal(whole_view(pixels(image), image_size=16, crop=crop), whole)
    if crop == "none":
        view = training_view(pixels(image), sample_rng(0, 0, 0), image_size=16, crop=crop, flip=False)
        assert nearly_equal(view, whole)


@pytest.mark.parametrize(("image_size", "short_side"), [(224, 256), (32, 37), (64, 73)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (40, 30), (31, 31)])
def test_evaluation_of_random_resized_training_is_the_centre(image_size, short_side, width, height):
    image = picture(4, width=width, height=height)
    expected = CenterCrop(image_size)(Resize(short_side)(image))
    assert nearly_equal(whole_view(pixels(image), image_size=image_size, crop="random_resized"), expected)


def test_half_of_the_images_are_mirrored():
    plain = image = pixels(picture(5, width=8, height=8))
    mirrored = sum(
        not torch.equal(plain, training_view(image, sample_rng(0, 0, i), image_size=8, crop="none", flip=True))
        for i in range(2000)
    )
    assert abs(mirrored - 1000) < 4 * math.sqrt(2000 / 4)


def test_global_random_states_are_left_alone():
    before = rng_states()
    for crop in ("random_resized", "padded", "none"):
        training_view(pixels(picture()), sample_rng(0, 0, 0), image_size=16, crop=crop, flip=True)
        whole_view(pixels(picture()), image_size=16, crop=crop)
    assert rng_states() == before


@pytest.mark.parametrize("size", [(1, 700), (2, 300), (700, 1), (300, 40), (3, 3)])
def test_a_window_is_cut_from_what_resize_makes(size):
    height, width = size
    image = pixels(picture(3, width=width, height=height))
    view = evaluation_view(height, width, image_size=32, crop="random_resized")
    whole = resize(image, view.resized_height, view.resized_width)
    rows, columns = (range(start, start + 32) for start in (view.window_top, view.window_left))
    ours = resized_window(image, view.resized_height, view.resized_width, rows, columns)
    assert torch.equal(ours, whole[rows.start : rows.stop, columns.start : columns.stop])


def test_of_a_very_long_image_only_what_is_seen_is_made(monkeypatch):
    image = pixels(picture(3, width=60_000, height=1))
    view = evaluation_view(1, 60_000, image_size=224, crop="random_resized")
    assert view.resized_height * view.resized_width == 256 * 15_360_000
    # Sharper than a pixel in 256: the seen 224 columns lie within one pixel of the image, or two.
    seen = cut(image, view, 224)
    assert seen.shape == (224, 224, 3)
    middle = image[0, 29_998:30_002].float()
    assert (seen.float().amin((0, 1)) >= middle.amin(0) - 1).all()
    assert (seen.float().amax((0, 1)) <= middle.amax(0) + 1).all()
