import torch

from recipe.data import SyntheticImages, TrainLoader, ValidationLoader
from tests.data.images import CPU, MEAN, STD, rng_states, train_loader, validation_loader


def loaders(*, seed: int = 0, **sizes) -> tuple[TrainLoader, ValidationLoader]:
    train, validation = (SyntheticImages(length, classes=7, **sizes, seed=seed, device=CPU) for length in (100, 23))
    return train_loader(train, global_batch=24), validation_loader(validation)


def test_every_training_batch_is_the_same_random_batch():
    before = rng_states()
    loader, _ = loaders(image_size=16)
    batches = list(loader.epoch(0))
    assert rng_states() == before
    assert len(batches) == 4 * 6
    first, last = batches[0], batches[-1]
    assert set(first.labels.tolist()) <= set(range(7))
    assert first.weights.tolist() == [1, 1, 1, 1]
    assert torch.equal(first.images, last.images)
    assert torch.equal(first.labels, last.labels)
    assert first.images.data_ptr() != last.images.data_ptr()
    pixels = first.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert abs(float(pixels.mean()) - 0.5) < 0.02
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6
    assert not torch.equal(first.images, next(loaders(image_size=16, seed=1)[0].epoch(0)).images)


def test_sizes_follow_the_epoch_and_validation_counts_every_image_once():
    train, validation = loaders(image_size=((0, 8), (2, 16)), validation_image_size=24)
    shapes = [next(train.epoch(epoch)).images.shape for epoch in range(4)]
    batches = list(validation.batches())
    assert [*shapes, batches[0].images.shape] == [(4, 3, size, size) for size in (8, 8, 16, 16, 24)]
    assert sum(float(batch.weights.sum()) for batch in batches) == 23
