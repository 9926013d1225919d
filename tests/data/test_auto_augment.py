import pytest
import torch
from torchvision.transforms import v2

from recipe.data.auto_augment import AutoAugment
from recipe.data.seeds import derive_seed
from tests.data.images import Pictures, picture, pixels, rng_states, train_loader

KINDS = {"trivial": (None, v2.TrivialAugmentWide()), "rand": (23, v2.RandAugment(magnitude=23))}


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_torchvisions_and_differ_between_samples(kind):
    magnitude, theirs = KINDS[kind]
    indices, image = torch.arange(7, 107), pixels(picture(width=32, height=32))
    before = rng_states()
    ours = list(AutoAugment(kind, magnitude, seed=5)([image] * len(indices), 2, indices))
    assert rng_states() == before
    for index, changed in zip(indices.tolist(), ours, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("operations", 5, 2, index))
            assert torch.equal(changed, theirs(image.movedim(-1, 0)).movedim(0, -1))
        assert changed.is_contiguous()
    # Few operations change nothing, and few samples get the same operation and magnitude.
    assert len({changed.numpy().tobytes() for changed in ours}) > 60


def test_augmented_samples_are_the_same_for_every_rank_worker_and_batch_and_differ_between_epochs():
    def images(world_size=1, epoch=3, **changes):
        batches = []
        for rank in range(world_size):
            dataset = Pictures(augment=AutoAugment("trivial", None, 5))
            options = {"global_batch": 16, "micro_batch": 8} | changes
            loader = train_loader(dataset, rank=rank, world_size=world_size, **options)
            batches.append(list(loader.epoch(epoch)))
            loader.close()
        return torch.cat([batch.images for together in zip(*batches, strict=True) for batch in together])

    one = images()
    assert not torch.equal(one, images(epoch=2))
    for changes in ({"workers": 2}, {"world_size": 2}, {"micro_batch": 2}, {"world_size": 4, "micro_batch": 1}):
        assert torch.equal(images(**changes), one), changes
