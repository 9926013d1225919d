import pytest
import torch

from recipe.data import SyntheticLoader
from tests.data.images import MEAN, STD, rng_states


def synthetic(
    *, rank: int = 0, world_size: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32, image_size=16, **size
):
    return SyntheticLoader(
        train_images=100,
        validation_images=23,
        classes=7,
        image_size=image_size,
        **size,
        global_batch=24,
        micro_batch=4,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device="cpu",
        dtype=dtype,
        mean=MEAN,
        std=STD,
    )


def test_training_batches_are_one_random_batch_over_and_over():
    loader = synthetic()
    assert loader.steps_per_epoch == 4
    batches = list(loader.epoch(0))
    assert len(batches) == 4 * 6
    assert len(list(loader.epoch(5, first_step=3))) == 6
    first, last = batches[0], batches[-1]
    assert first.images.shape == (4, 3, 16, 16)
    assert first.labels.dtype == torch.int64
    assert set(first.labels.tolist()) <= set(range(7))
    assert first.weights.tolist() == [1, 1, 1, 1]
    assert torch.equal(first.images, last.images)
    assert first.images.data_ptr() != last.images.data_ptr()
    pixels = first.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert abs(float(pixels.mean()) - 0.5) < 0.02
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6


def test_sizes_follow_the_epoch():
    loader = synthetic(image_size=((0, 8), (2, 16)), validation_image_size=24)
    shapes = [next(loader.epoch(epoch)).images.shape[-2:] for epoch in range(4)]
    assert [*shapes, next(loader.batches()).images.shape[-2:]] == [(8, 8), (8, 8), (16, 16), (16, 16), (24, 24)]


def test_seed_and_rank_decide():
    def images(**kwargs):
        return next(synthetic(**kwargs).epoch(0)).images

    assert torch.equal(images(), images())
    assert not torch.equal(images(), images(seed=1))
    assert not torch.equal(images(world_size=2), images(world_size=2, rank=1))
    assert images(dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("world_size", [1, 2, 6])
def test_validation_counts_exactly(world_size):
    of_ranks = [list(synthetic(rank=rank, world_size=world_size).batches()) for rank in range(world_size)]
    assert {len(batches) for batches in of_ranks} == {-(-23 // (4 * world_size))}
    assert sum(float(batch.weights.sum()) for batches in of_ranks for batch in batches) == 23


def test_global_random_states_are_left_alone():
    before = rng_states()
    next(synthetic().epoch(0))
    assert rng_states() == before
