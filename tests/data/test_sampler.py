import pytest
import torch

from recipe.data.sampler import PADDING, TrainSampler, ValidationSampler, epoch_permutation

# (ranks, micro-batch)
SPLITS = [(1, 24), (1, 8), (1, 1), (2, 12), (2, 4), (3, 8), (4, 6), (4, 3), (8, 1), (24, 1)]


def train_sampler(rank: int, world_size: int, micro_batch: int, *, length: int = 100, global_batch=24):
    split = {"global_batch": global_batch, "micro_batch": micro_batch, "rank": rank, "world_size": world_size}
    return TrainSampler(length, **split, seed=3)


def taken(sampler):
    """The batches of a pass as (epoch, indices)."""
    return [(epoch, indices.tolist()) for epoch, indices in sampler]


def test_epochs_and_seeds_have_permutations_of_their_own():
    first = epoch_permutation(0, 0, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert torch.equal(first, epoch_permutation(0, 0, 1000))
    others = [epoch_permutation(seed, epoch, 1000) for seed, epoch in [(0, 1), (1, 0), (1, 1)]]
    assert not any(torch.equal(first, other) for other in others)


def test_the_permutation_is_stable():
    """A run that is resumed with different versions must see the same order."""
    assert epoch_permutation(0, 0, 10).tolist() == [6, 9, 8, 5, 1, 7, 3, 4, 0, 2]


def test_training_batches_by_hand(monkeypatch):
    """13 samples in order, 2 ranks × accumulation 2 × micro-batch 2 = 8; five samples are dropped."""
    monkeypatch.setattr("recipe.data.sampler.epoch_permutation", lambda seed, epoch, length: torch.arange(length))
    kwargs = {"length": 13, "global_batch": 8}
    assert taken(train_sampler(0, 2, 2, **kwargs)) == [(0, [0, 1]), (0, [4, 5])]
    assert taken(train_sampler(1, 2, 2, **kwargs)) == [(0, [2, 3]), (0, [6, 7])]


@pytest.mark.parametrize(("world_size", "micro_batch"), SPLITS)
def test_every_split_has_the_same_sequence_in_the_same_step(world_size, micro_batch):
    permutation = epoch_permutation(3, 2, 100).tolist()
    batches = []
    for rank in range(world_size):
        sampler = train_sampler(rank, world_size, micro_batch)
        sampler.set_epoch(2)
        batches.append(taken(sampler))
        assert len(batches[rank]) == len(sampler) == 4 * sampler.accumulation
        assert all((epoch, len(indices)) == (2, micro_batch) for epoch, indices in batches[rank])

    # By round, then by rank: each step has the same samples in the same order.
    rounds = zip(*batches, strict=True)
    assert [index for of_ranks in rounds for _, indices in of_ranks for index in indices] == permutation[:96]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 4), (4, 6)])
def test_a_resumed_epoch_is_the_rest_of_the_epoch(world_size, micro_batch):
    sampler = train_sampler(world_size - 1, world_size, micro_batch)
    sampler.set_epoch(1)
    whole = taken(sampler)
    for first_step in range(5):
        sampler.set_epoch(1, first_step)
        assert len(sampler) == (4 - first_step) * sampler.accumulation
        assert taken(sampler) == whole[first_step * sampler.accumulation :]


def test_the_global_batch_follows_the_epoch():
    sampler = train_sampler(0, 2, 4, global_batch=((0, 8), (2, 24)))
    found = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        found.append((sampler.accumulation, len(taken(sampler))))
    assert found == [(1, 12), (1, 12), (3, 4 * 3), (3, 4 * 3)]


def test_validation_batches_by_hand():
    batches = [taken(ValidationSampler(7, micro_batch=2, rank=rank, world_size=3)) for rank in range(3)]
    indices = [[[0, 1], [6, -1]], [[2, 3], [-1, -1]], [[4, 5], [-1, -1]]]
    assert batches == [[(None, of_batch) for of_batch in of_rank] for of_rank in indices]


@pytest.mark.parametrize("length", [1, 30, 97])
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_validation_has_every_sample_once(length, world_size, micro_batch):
    samplers = [
        ValidationSampler(length, micro_batch=micro_batch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = [[indices for _, indices in taken(sampler)] for sampler in samplers]
    assert {len(of_rank) for of_rank in batches} == {len(samplers[0])} == {-(-length // (world_size * micro_batch))}
    assert {len(batch) for of_rank in batches for batch in of_rank} == {micro_batch}
    indices = [index for of_rank in batches for batch in of_rank for index in batch]
    assert sorted(index for index in indices if index != PADDING) == list(range(length))
