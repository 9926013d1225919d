"""Images are augmented as by torchvision when it draws the same numbers."""

from collections import Counter

import pytest
import torch
from torchvision.transforms import v2

from recipe.data.auto_augment import AutoAugment
from recipe.data.seeds import derive_seed, uniform
from tests.data.images import Pictures, picture, pixels, rng_states, train_loader

KINDS = {"trivial": (None, v2.TrivialAugmentWide()), "rand": (23, v2.RandAugment(magnitude=23))}
OPERATIONS, MAGNITUDES = 14, 31


class Drawn:
    """Replaces torch's draws of an operation, its magnitude and its sign."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def randint(self, high, size):
        if high == OPERATIONS:
            self.row = next(self.rows)
        else:
            assert high == MAGNITUDES
        return torch.tensor(int(self.row[high == MAGNITUDES] * high))

    def rand(self, size):
        return torch.tensor(self.row[2])


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_torchvisions(monkeypatch, kind):
    magnitude, theirs = KINDS[kind]
    times, indices, image = 2 if kind == "rand" else 1, torch.arange(7, 307), pixels(picture(width=32, height=32))
    positions = indices[:, None] * 3 * times + torch.arange(3 * times)
    rows = uniform(derive_seed("operations", 5, 2), positions).view(-1, 3).tolist()
    drawn, seen, before = Drawn(rows), Counter(), rng_states()
    ours = list(AutoAugment(kind, magnitude, seed=5)([image] * len(indices), 2, indices))
    assert rng_states() == before
    monkeypatch.setattr(torch, "randint", drawn.randint)
    monkeypatch.setattr(torch, "rand", drawn.rand)
    for changed in ours:
        expected = theirs(image.movedim(-1, 0)).movedim(0, -1)
        assert torch.equal(changed, expected)
        assert changed.is_contiguous()
        seen[torch.equal(changed, image)] += 1
    assert next(drawn.rows, None) is None
    # One operation in 14 changes nothing, and neither do some with magnitude 0.
    assert seen[False] > 0.75 * len(indices)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_magnitudes_and_signs_are_drawn_evenly(monkeypatch, kind):
    applied = []
    augment = AutoAugment(kind, KINDS[kind][0], 0)
    monkeypatch.setattr(
        type(augment._transform),
        "_apply_image_or_video_transform",
        lambda self, planes, name, magnitude, **settings: applied.append((name, magnitude)) or planes,
    )
    blank = torch.zeros(331, 331, 3, dtype=torch.uint8)
    count = 6000
    assert len(list(augment([blank] * count, 0, torch.arange(count)))) == count
    names = Counter(name for name, _ in applied)
    assert len(names) == OPERATIONS
    assert min(names.values()) > 0.8 * len(applied) / OPERATIONS
    rotations = Counter(magnitude for name, magnitude in applied if name == "Rotate")
    if kind == "rand":
        assert set(rotations) == {23.0, -23.0}  # of 30 steps to 30 degrees
    else:
        assert len(rotations) == 2 * MAGNITUDES - 1
        assert max(rotations) == -min(rotations) == 135
    assert abs(sum(angle > 0 for angle in rotations.elements()) / rotations.total() - 0.5) < 0.1


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
