import pytest
import torch

from recipe.data import SyntheticLoader, TrainLoader, ValidationLoader
from tests.data.images import MEAN, STD, Pictures

pytestmark = pytest.mark.gpu


def train_batches(device: str, dtype: torch.dtype, workers: int = 0) -> list:
    loader = TrainLoader(
        Pictures(),
        global_batch=8,
        micro_batch=4,
        rank=0,
        world_size=1,
        seed=1,
        workers=workers,
        device=device,
        dtype=dtype,
        mean=MEAN,
        std=STD,
    )
    batches = list(loader.epoch(2))
    loader.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batches_are_those_of_the_cpu_to_the_bit(dtype, workers):
    on_gpu, on_cpu = train_batches("cuda", dtype, workers), train_batches("cpu", dtype)
    assert len(on_gpu) == len(on_cpu) == 4
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.images.device.type == ours.labels.device.type == ours.weights.device.type == "cuda"
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.images.cpu(), theirs.images)
        assert torch.equal(ours.labels.cpu(), theirs.labels)
        assert torch.equal(ours.weights.cpu(), theirs.weights)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_counts_every_image_once(workers):
    loader = ValidationLoader(
        Pictures(7),
        micro_batch=4,
        rank=0,
        world_size=1,
        workers=workers,
        device="cuda",
        dtype=torch.float16,
        mean=MEAN,
        std=STD,
    )
    batches = list(loader.batches())
    loader.close()
    assert torch.cat([batch.weights for batch in batches]).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


def test_synthetic_batches_are_made_on_the_gpu():
    loader = SyntheticLoader(
        train_images=16,
        validation_images=5,
        classes=3,
        image_size=16,
        global_batch=8,
        micro_batch=4,
        rank=0,
        world_size=1,
        seed=0,
        device="cuda",
        dtype=torch.float16,
        mean=MEAN,
        std=STD,
    )
    state = torch.cuda.get_rng_state()
    first, *_, last = loader.epoch(0)
    assert first.images.device.type == first.labels.device.type == first.weights.device.type == "cuda"
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first.images, last.images)
    assert sum(float(batch.weights.sum()) for batch in loader.batches()) == 5
    assert torch.equal(torch.cuda.get_rng_state(), state)
