import numpy as np
import pytest
import torch

from recipe.data import (
    EncodedImages,
    HeldImages,
    Keys,
    SyntheticImages,
    TrainLoader,
    ValidationLoader,
    draw_views,
    open_datasets,
    open_decoder,
)
from tests.data.images import MEAN, STD, Pictures, picture

pytestmark = pytest.mark.gpu

COMMON = {"micro_batch": 4, "rank": 0, "world_size": 1, "mean": MEAN, "std": STD}


def train_batches(device: str, dtype: torch.dtype, workers: int = 0) -> list:
    loader = TrainLoader(Pictures(), global_batch=8, seed=1, workers=workers, device=device, dtype=dtype, **COMMON)
    batches = list(loader.epoch(2))
    loader.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_batches_equal_those_of_the_cpu_bit_for_bit(dtype, workers):
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
    loader = ValidationLoader(Pictures(7), workers=workers, device="cuda", dtype=torch.float16, **COMMON)
    batches = list(loader.batches())
    loader.close()
    assert torch.cat([batch.weights for batch in batches]).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
def test_held_batches_cropped_on_the_gpu_equal_those_of_the_cpu_bit_for_bit(crop):
    dataset = open_datasets("digits", None, image_size=24, crop=crop, flip=True, seed=3)[0]
    held = HeldImages(dataset, torch.device("cuda"), training=True)
    keys = Keys(7, np.arange(len(dataset)))
    ours, theirs = held.on_device(held[keys]), dataset[keys]
    assert torch.equal(ours.images.cpu(), theirs.images)
    assert torch.equal(ours.mirrored.cpu(), theirs.mirrored)


@pytest.mark.parametrize("largest", [3, 700, 12_000])
def test_views_drawn_on_the_gpu_equal_those_of_the_cpu(largest):
    indices = torch.arange(100_000)
    sizes = torch.randint(1, largest + 1, (100_000, 2), generator=torch.Generator().manual_seed(largest))
    options = {"image_size": 224, "crop": "random_resized", "flip": True}
    ours = draw_views(3, 5, indices.cuda(), sizes.cuda(), **options)
    assert torch.equal(ours.cpu(), draw_views(3, 5, indices, sizes, **options))


def test_synthetic_batches_are_generated_on_the_gpu():
    images = SyntheticImages(16, classes=3, image_size=16, seed=0, device=torch.device("cuda"))
    loader = TrainLoader(
        images,
        global_batch=8,
        seed=0,
        workers=0,
        device="cuda",
        dtype=torch.float16,
        **COMMON,
    )
    state = torch.cuda.get_rng_state()
    first, *_, last = loader.epoch(0)
    assert first.images.device.type == first.labels.device.type == first.weights.device.type == "cuda"
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first.images, last.images)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    reserved = torch.cuda.memory_reserved()
    for epoch in range(1, 6):
        assert len(list(loader.epoch(epoch))) == 2
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.filterwarnings("ignore:.*image decoding and encoding capabilities:DeprecationWarning")
@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
@pytest.mark.parametrize(("name", "subsampling", "mean", "most"), [
    ("gpu", "4:4:4", 0.7, 4),
    ("gpu", "4:2:0", 2, 16),  # nvJPEG repeats chroma; libjpeg-turbo doing so differs by 0.9 on average, by at most 4
    ("dali", "4:4:4", 0.7, 40),  # the border differs most
    ("dali", "4:2:0", 1, 40),
])  # fmt: skip
def test_pixels_decoded_on_the_gpu_are_close_to_those_of_the_cpu(tmp_path, name, subsampling, mean, most, crop):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    for part in ("train", "val"):
        (tmp_path / part / "c0").mkdir(parents=True)
        for number in range(9):
            image = picture(number, width=200, height=150 + number, mode="L" if number == 8 else "RGB")
            settings = {"progressive": number == 7} | ({"subsampling": subsampling} if number < 8 else {})
            image.save(tmp_path / part / "c0" / f"{number}.jpg", quality=90, **settings)
    plain = open_datasets("imagefolder", tmp_path, image_size=32, crop=crop, flip=True, seed=0)
    device = torch.device("cuda")
    decoder = open_decoder(name, device, threads=2)
    for part, epoch in zip(plain, (0, None), strict=True):
        on_gpu, keys = EncodedImages(part, decoder, device), Keys(epoch, np.arange(9))
        ours, theirs = on_gpu.on_device(on_gpu[keys]), part[keys]
        assert ours.images.device.type == "cuda"
        assert ours.decoded_by_pil == 0
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.mirrored, theirs.mirrored)
        difference = (ours.images.cpu().int() - theirs.images.int()).abs()
        assert float(difference.float().mean()) < mean
        assert int(difference.max()) <= most


@pytest.mark.filterwarnings("ignore:.*image decoding and encoding capabilities:DeprecationWarning")
@pytest.mark.parametrize("name", ["gpu", "dali"])
def test_loaders_return_images_decoded_on_the_gpu(tmp_path, name):
    """On a separate stream, with workers and pinned memory; the CPU decodes what the GPU decoder refuses."""
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    for part in ("train", "val"):
        (tmp_path / part / "c0").mkdir(parents=True)
        for number in range(12):
            picture(number, width=200, height=150).save(tmp_path / part / "c0" / f"{number}.jpg", subsampling="4:4:4")
        picture(12, mode="CMYK").save(tmp_path / part / "c0" / "12.jpg")
    plain = open_datasets("imagefolder", tmp_path, image_size=32, crop="random_resized", flip=True, seed=0)
    device = torch.device("cuda")
    decoder = open_decoder(name, device, threads=2)
    common = COMMON | {"dtype": torch.float32}
    seen = []
    for datasets, workers in ((plain, 0), ([EncodedImages(part, decoder, device) for part in plain], 2)):
        train = TrainLoader(datasets[0], global_batch=4, seed=1, workers=workers, device="cuda", **common)
        validation = ValidationLoader(datasets[1], workers=workers, device="cuda", **common)
        seen.append([batch for epoch in range(5) for batch in train.epoch(epoch)] + list(validation.batches()))
        train.close()
        validation.close()
    for theirs, ours in zip(*seen, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.weights, theirs.weights)
        levels = (ours.images - theirs.images).abs() * 255 * torch.tensor(STD, device=device).view(3, 1, 1)
        assert float(levels.mean()) < 0.7
