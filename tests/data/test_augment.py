import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize, functional

from recipe.data.augment import (
    View,
    _rounded_root as rounded_root,
    cut,
    draw_views,
    evaluation_view,
    random_resized_boxes,
    sample_numbers,
)
from recipe.data.resizing import resize
from recipe.data.seeds import splitmix64
from tests.data.images import picture, pixels

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def views_of(image, count, *, image_size, crop, flip):
    """The views of one image in ``count`` samples, cut and mirrored, each with its ``View``."""
    sizes = torch.tensor([image.shape[:2]]).expand(count, 2)
    rows = draw_views(0, 0, torch.arange(count), sizes, image_size=image_size, crop=crop, flip=flip)
    views = [View(*row) for row in rows.tolist()]
    squares = (cut(image, view, image_size) for view in views)
    return [(square.flip(1) if view.mirrored else square, view) for square, view in zip(squares, views, strict=True)]


def whole_view(image, *, image_size, crop):
    view = evaluation_view(*image.shape[:2], image_size=image_size, crop=crop)
    return cut(image, view, image_size)


def boxes(count, height, width):
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    return random_resized_boxes(sample_numbers("test", 0, 0, torch.arange(count)), sizes).numpy()


@pytest.mark.parametrize(
    ("seed", "numbers"),
    [
        # Rosetta Code, "Pseudo-random numbers/Splitmix64", and the author's own program for seed 0.
        (
            1234567,
            (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821),
        ),
        (0, (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B)),
    ],
)
def test_splitmix64_gives_its_published_numbers(seed, numbers):
    assert [bits % 2**64 for bits in splitmix64(seed, torch.arange(5)).tolist()] == list(numbers)


def test_random_numbers_of_samples_are_uniform_and_independent():
    numbers = sample_numbers("test", 1, 2, torch.arange(20_000)).numpy()
    assert ((numbers >= 0) & (numbers < 1)).all()
    # The numbers are fixed, so the test is deterministic; the bounds allow for 23 and 253 comparisons.
    assert min(kstest(column, "uniform").pvalue for column in numbers.T) > 1e-3
    correlations = np.corrcoef(np.column_stack([numbers, np.roll(numbers[:, 0], 1)]).T) - np.eye(24)
    assert abs(correlations).max() < 4.5 / math.sqrt(20_000)


def test_random_numbers_are_a_function_of_seed_epoch_and_index():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 11, 1), (1, 1, 11), (11, 1, 1)]
    numbers = [tuple(sample_numbers("test", *key[:2], torch.tensor([key[2]]))[0].tolist()) for key in keys]
    assert len({number for of_key in numbers for number in of_key}) == 23 * len(keys)
    together = sample_numbers("test", 1, 1, torch.tensor([5, 11, 1]))
    assert tuple(together[1].tolist()) == numbers[5]


def test_views_are_the_same_in_every_batch():
    """For 1 to 64 samples at once, and images of all sizes, whatever the vector lanes and threads."""
    indices = torch.arange(5000)
    sizes = torch.randint(1, 700, (5000, 2), generator=torch.Generator().manual_seed(0))
    options = {"image_size": 24, "crop": "random_resized", "flip": True}
    whole = draw_views(3, 4, indices, sizes, **options)
    for size in (1, 7, 8, 31, 64):
        parts = zip(indices[:320].split(size), sizes[:320].split(size), strict=True)
        assert torch.equal(torch.cat([draw_views(3, 4, *part, **options) for part in parts]), whole[:320]), size


@pytest.mark.parametrize("towards", [None, 0.0, math.inf])
def test_boxes_do_not_depend_on_the_last_bit_of_a_root(monkeypatch, towards):
    """MKL's square root is sometimes one ulp off, a GPU's is not; halves are rounded up with either."""
    root = torch.Tensor.sqrt
    if towards is not None:
        monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x).nextafter(torch.full_like(x, towards)))
    whole = torch.cat([torch.arange(1, 1000), 2**24 - torch.arange(1000)]).double()
    halves = (whole - 0.5).square()
    assert torch.equal(rounded_root(halves), whole)
    assert torch.equal(rounded_root(halves.nextafter(torch.zeros(1, dtype=torch.float64))), whole - 1)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (100, 220), (32, 90)])
def test_boxes_have_torchvisions_distribution(height, width):
    draws = 4000
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, list(AREA), list(RATIO)) for _ in range(draws)])

    def features(boxes):
        top, left, h, w = boxes.T
        return h * w, w / h, top, left, top + h / 2, left + w / 2

    for mine, expected in zip(features(boxes(draws, height, width)), features(theirs), strict=True):
        # The draws are fixed, so the test is deterministic; the bound allows for 30 comparisons.
        assert ks_2samp(mine, expected).pvalue > 1e-3


def test_boxes_are_within_the_image_and_reach_its_edges():
    top, left, h, w = boxes(3000, 9, 11).T
    assert (min(top.min(), left.min()), max((top + h).max() - 9, (left + w).max() - 11)) == (0, 0)
    assert set(top) >= {0, 5}


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 1), (1, 500), (777, 1), (3, 100), (300, 400), (400, 300)])
def test_fallback_if_no_box_fits_is_torchvisions(size):
    """All ten tries have the full area and the worst ratio here, and twice the area in torchvision."""
    numbers = torch.zeros(1, 23, dtype=torch.float64)
    numbers[:, :10] = 1
    numbers[:, 10:20] = size[0] > size[1]
    with torch.random.fork_rng(devices=[]):
        theirs = RandomResizedCrop.get_params(torch.zeros(3, *size), [2.0, 2.0], list(RATIO))
    assert tuple(random_resized_boxes(numbers, torch.tensor([size]))[0].tolist()) == theirs


def nearly_equal(view: torch.Tensor, image: Image.Image) -> bool:
    """Whether a view equals PIL's image apart from rounding, which changes less than one value in five by one."""
    difference = (view.int() - pixels(image).int()).abs()
    return view.shape == difference.shape and int(difference.max()) <= 2 and float(difference.float().mean()) < 0.2


@pytest.mark.parametrize(("height", "width"), [(24, 24), (40, 30), (7, 100), (1, 1), (300, 200)])
def test_resized_pixels_are_pils(height, width):
    for seed, image in enumerate((picture(1, width=53, height=37), picture(2, width=9, height=80), picture(3))):
        theirs = functional.resize(image, [height, width])
        assert nearly_equal(resize(pixels(image), height, width), theirs), seed
        # A part of an image, which is not contiguous in memory, and a copy of it.
        part = pixels(image)[2:9, 1:8]
        assert torch.equal(resize(part, height, width), resize(part.contiguous(), height, width))


@pytest.mark.parametrize("flip", [False, True])
def test_random_resized_pixels_are_torchvisions(flip):
    image = picture(1, width=53, height=37)
    flips = 0
    for square, view in views_of(pixels(image), 40, image_size=24, crop="random_resized", flip=flip):
        expected = functional.resized_crop(image, *view[:4], [24, 24])
        assert square.dtype == torch.uint8
        assert square.shape == (24, 24, 3)
        flipped = not nearly_equal(square, expected)
        assert nearly_equal(square, functional.hflip(expected) if flipped else expected)
        flips += flipped
    assert 10 < flips < 30 if flip else flips == 0


def test_padded_crops_shift_by_up_to_an_eighth_over_black():
    image = picture(2, width=32, height=32)
    padded = pixels(functional.pad(image, [4, 4, 4, 4]))
    windows = {(top, left): padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
    seen = set()
    for square, _ in views_of(pixels(image), 600, image_size=32, crop="padded", flip=False):
        (match,) = [place for place, window in windows.items() if torch.equal(square, window)]
        seen.add(match)
    assert seen == set(windows)


@pytest.mark.parametrize("crop", ["padded", "none"])
def test_images_of_a_different_size_are_resized_whole(crop):
    image = picture(3, width=50, height=20)
    whole = Resize((16, 16))(image)
    assert nearly_equal(whole_view(pixels(image), image_size=16, crop=crop), whole)
    if crop == "none":
        ((square, _),) = views_of(pixels(image), 1, image_size=16, crop=crop, flip=False)
        assert nearly_equal(square, whole)


@pytest.mark.parametrize(("image_size", "short_side"), [(224, 256), (32, 37), (64, 73)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (40, 30), (31, 31)])
def test_evaluation_after_random_resized_training_takes_the_centre(image_size, short_side, width, height):
    image = picture(4, width=width, height=height)
    expected = CenterCrop(image_size)(Resize(short_side)(image))
    assert nearly_equal(whole_view(pixels(image), image_size=image_size, crop="random_resized"), expected)
