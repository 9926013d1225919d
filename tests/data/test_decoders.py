"""Images decoded on the device against those that the workers decode: the same samples, nearly the same pixels."""

import sys
from functools import partial

import pytest
import torch
from PIL import Image

from recipe.data import BadImageError, EncodedImages, TrainLoader, ValidationLoader, open_datasets, open_decoder
from recipe.data.decoders import NvJpeg
from recipe.data.decoding import UNREADABLE, decode, plain_jpeg_size
from recipe.data.resizing import _resized_in_float as resized_in_float, resize
from tests.data.images import MEAN, STD, Pictures, assert_same, picture, pixels

CPU = torch.device("cpu")
SIZE = 16
LOADER = {"device": "cpu", "dtype": torch.float32, "mean": MEAN, "std": STD, "rank": 0, "world_size": 1}


def as_nvjpeg_does(files, mode, device):
    """A stand-in: planes of a whole batch, or an error that names none."""
    try:
        decoded = [decode(file.numpy().tobytes()) for file in files]
    except UNREADABLE as error:
        raise RuntimeError("nvjpegDecodeBatched failed") from error
    assert not any(image.by_pil for image in decoded)
    return [image.pixels.movedim(-1, 0) for image in decoded]


NVJPEG = NvJpeg(CPU, as_nvjpeg_does)


@pytest.fixture
def folder(tmp_path):
    """JPEGs of several kinds and sizes, and what no decoder but PIL takes."""
    for part in ("train", "val"):
        for label in range(2):
            (tmp_path / part / f"c{label}").mkdir(parents=True)
            save = partial(save_picture, tmp_path / part / f"c{label}", 10 * label)
            save("0.jpg", width=70, quality=95, subsampling="4:4:4")
            save("1.jpg", height=50, quality=90, subsampling="4:2:0")
            save("2.jpg", mode="L")
            save("3.jpg", width=21, progressive=True)
            save("4.jpg", mode="CMYK")
            turned = Image.Exif()
            turned[0x0112] = 6
            save("5.jpg", width=90, exif=turned)
            save("6.png")
            save("7.jpg", width=35)
            with open(tmp_path / part / f"c{label}" / "7.jpg", "ab") as file:
                file.write(b"what a camera adds")
    return tmp_path


def save_picture(folder, seed, name, *, width=40, height=30, mode="RGB", **settings):
    picture(seed + int(name[0]), width=width, height=height, mode=mode).save(folder / name, **settings)


def batches(datasets, workers=0):
    train = TrainLoader(datasets[0], global_batch=8, micro_batch=4, seed=1, workers=workers, **LOADER)
    validation = ValidationLoader(datasets[1], micro_batch=6, workers=workers, **LOADER)
    seen = [batch for epoch in (0, 3) for batch in train.epoch(epoch)] + list(validation.batches())
    train.close()
    validation.close()
    return seen


@pytest.mark.parametrize(("crop", "workers"), [("random_resized", 2), ("padded", 0), ("none", 0)])
def test_the_same_samples_come_from_the_device(folder, crop, workers):
    """To the bit, where the device has the same decoder: order, labels, weights, boxes, mirrors, sizes by epoch."""
    plain = open_datasets("imagefolder", folder, ((0, SIZE), (1, 16)), crop, True, 3, "stop", validation_image_size=20)
    on_device = [EncodedImages(part, NVJPEG, CPU) for part in plain]
    seen = batches(on_device, workers)
    assert_same(seen, batches(plain))
    # Of 8 images a class, workers decode what the device should not: CMYK, the PNG and what ends in something else.
    assert sum(batch.decoded_by_pil for batch in seen) == 3 * 2 * 3


def test_what_may_be_left_to_the_device(folder):
    sizes = [plain_jpeg_size((folder / "train" / "c0" / name).read_bytes()) for name in sorted_names(folder)]
    # As stored, whatever Exif says of turning it: (height, width).
    assert sizes == [(30, 70), (50, 40), (30, 40), (30, 21), None, (30, 90), None, None]
    assert plain_jpeg_size(b"") is plain_jpeg_size(b"\xff\xd8\xff\xd9") is None


def sorted_names(folder):
    return sorted(path.name for path in (folder / "train" / "c0").iterdir())


def test_a_batch_without_a_jpeg_is_the_data_sets():
    plain = Pictures(), Pictures()
    assert_same(batches([EncodedImages(part, None, CPU) for part in plain]), batches(plain))


def damage(file):
    """Have its data refer to a Huffman table that is not there, behind a sound header and before a sound end."""
    content = bytearray(file.read_bytes())
    content[content.index(b"\xff\xda") + 6] = 0x33
    file.write_bytes(content)
    assert plain_jpeg_size(file.read_bytes()) is not None


@pytest.mark.parametrize("bad", ["damaged", "no image"])
def test_the_data_set_judges_what_the_device_refuses(folder, bad):
    for part in ("train", "val"):
        file = folder / part / "c1" / "1.jpg"
        damage(file) if bad == "damaged" else file.write_bytes(b"no image")
    for on_bad_image in ("skip", "stop"):
        plain = open_datasets("imagefolder", folder, SIZE, "random_resized", True, 3, on_bad_image)
        on_device = [EncodedImages(part, NVJPEG, CPU) for part in plain]
        if on_bad_image == "skip":
            seen = batches(on_device)
            assert_same(seen, batches(plain))
            assert {name for batch in seen for name in batch.bad_images} == {
                str(folder / part / "c1" / "1.jpg") for part in ("train", "val")
            }
        else:
            with pytest.raises(BadImageError, match=rf"^{folder}/train/c1/1\.jpg: not a readable image"):
                batches(on_device)


def test_what_the_device_alone_refuses_is_decoded_and_counted(folder):
    """As nvJPEG may refuse a progressive JPEG; the others of its batch stay the device's."""
    asked = []

    def refuse_progressive(files, **settings):
        asked.append(len(files))
        if any(b"\xff\xc2" in file.numpy().tobytes() for file in files):
            raise RuntimeError("not supported")
        return as_nvjpeg_does(files, **settings)

    plain = open_datasets("imagefolder", folder, SIZE, "random_resized", True, 3, "stop")
    refused = [EncodedImages(part, NvJpeg(CPU, refuse_progressive), CPU) for part in plain]
    taken = [EncodedImages(part, NVJPEG, CPU) for part in plain]
    seen, expected = batches(refused), batches(taken)
    assert_same(seen, expected)
    by_pil = [sum(batch.decoded_by_pil for batch in batches) for batches in (seen, expected)]
    assert by_pil[0] - by_pil[1] == 2 * 2 + 2
    assert 1 in asked


@pytest.mark.parametrize(("height", "width"), [(24, 24), (40, 30), (7, 100), (300, 200)])
def test_a_gpu_resizes_to_the_same_but_for_rounding(height, width):
    image = pixels(picture(1, width=53, height=37))
    planes = image.movedim(-1, 0).unsqueeze(0)
    difference = resized_in_float(planes, height, width)[0].movedim(0, -1).int() - resize(image, height, width).int()
    assert int(difference.abs().max()) <= 1
    assert float(difference.abs().float().mean()) < 0.2


@pytest.fixture
def dali():
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    return open_decoder("dali", CPU, threads=2)


@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
def test_dalis_pixels_are_those_of_the_cpu_but_for_rounding_and_the_rim(folder, dali, crop):
    plain = open_datasets("imagefolder", folder, SIZE, crop, True, 3, "stop")
    on_device = [EncodedImages(part, dali, CPU) for part in plain]
    for theirs, ours in zip(batches(plain), batches(on_device, workers=2), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.weights, theirs.weights)
        levels = (ours.images - theirs.images).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        assert float(levels.mean()) < 0.3
        if crop != "padded":
            assert float(levels[:, :, 1:-1, 1:-1].max()) < 1.01


def test_dali_goes_on_after_an_image_that_it_refuses(folder, dali):
    damage(folder / "train" / "c1" / "1.jpg")
    plain = open_datasets("imagefolder", folder, SIZE, "none", False, 3, "skip")
    seen = batches([EncodedImages(part, dali, CPU) for part in plain])
    assert [name for batch in seen for name in batch.bad_images] == [str(folder / "train" / "c1" / "1.jpg")] * 2
    assert sum(batch.decoded_by_pil for batch in seen) == 3 * 2 * 3 + 2


def test_what_a_decoder_lacks_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name, problem in {
        "gpu": 'there is no CUDA GPU; write "cpu", or "dali"$',
        "dali": ".* pip install nvidia-dali-cuda130, or write",
    }.items():
        with pytest.raises(ValueError, match=rf'^recipe\.data\.decoder = "{name}": {problem}'):
            open_decoder(name, CPU, threads=1)
