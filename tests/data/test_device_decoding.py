"""Images decoded on the device are the same samples as those that workers decode, with nearly the same pixels."""

import sys
from functools import partial

import pytest
import torch
from PIL import Image

from recipe.data import BadImageError, EncodedImages, open_datasets, open_decoder
from recipe.data.decoding import UNREADABLE, decode
from recipe.data.device_decoding import NvJpeg, plain_jpeg_size
from recipe.data.resizing import _resized_in_float as resized_in_float, resize
from tests.data.images import CPU, STD, Pictures, assert_same, load, picture, pixels

SIZE = 16


def as_nvjpeg(files, mode, device):
    """Decode a batch into planes, or raise an error that does not name the file."""
    try:
        decoded = [decode(file.numpy().tobytes()) for file in files]
    except UNREADABLE as error:
        raise RuntimeError("nvjpegDecodeBatched failed") from error
    assert not any(image.by_pil for image in decoded)
    return [image.pixels.movedim(-1, 0) for image in decoded]


NVJPEG = NvJpeg(CPU, as_nvjpeg)


@pytest.fixture
def folder(tmp_path):
    """JPEGs of several kinds and sizes, and files that only PIL can decode."""
    for part in ("train", "val"):
        for label in range(2):
            (tmp_path / part / f"c{label}").mkdir(parents=True)
            save = partial(save_picture, tmp_path / part / f"c{label}", 10 * label)
            save("0.jpg", width=70, quality=95, subsampling="4:4:4")
            save("1.jpg", height=50, quality=90, subsampling="4:2:0")
            save("2.jpg", mode="L")
            save("3.jpg", width=21, progressive=True)
            save("4.jpg", mode="CMYK")
            rotated = Image.Exif()
            rotated[0x0112] = 6
            save("5.jpg", width=90, exif=rotated)
            save("6.png")
            save("7.jpg", width=35)
            with open(tmp_path / part / f"c{label}" / "7.jpg", "ab") as file:
                file.write(b"data that a camera appends")
    return tmp_path


def save_picture(folder, seed, name, *, width=40, height=30, mode="RGB", **settings):
    picture(seed + int(name[0]), width=width, height=height, mode=mode).save(folder / name, **settings)


def open_folder(folder, crop="random_resized", on_bad_image="stop", size=SIZE):
    sizes = {"image_size": size, "validation_image_size": 20}
    return open_datasets("imagefolder", folder, **sizes, crop=crop, flip=True, seed=3, on_bad_image=on_bad_image)


def encoded(datasets, decoder=NVJPEG):
    return [EncodedImages(part, decoder, CPU) for part in datasets]


@pytest.mark.parametrize(("crop", "workers"), [("random_resized", 2), ("padded", 0), ("none", 0)])
def test_device_returns_the_same_samples(folder, crop, workers):
    """Bit for bit, with the same decoder: order, labels, weights, boxes, mirroring, sizes by epoch."""
    plain = open_folder(folder, crop, size=((0, 24), (1, 16)))
    seen = load(encoded(plain), (0, 3), workers)
    assert_same(seen, load(plain, (0, 3)))
    # Of the 8 images per class, workers decode three: CMYK, the PNG and the one with appended data.
    assert sum(batch.decoded_by_pil for batch in seen) == 3 * 2 * 3


def test_plain_jpegs_are_recognised(folder):
    files = sorted((folder / "train" / "c0").iterdir())
    # (height, width) as stored, whatever the EXIF rotation.
    expected = [(30, 70), (50, 40), (30, 40), (30, 21), None, (30, 90), None, None]
    assert [plain_jpeg_size(file.read_bytes()) for file in files] == expected
    assert plain_jpeg_size(b"") is plain_jpeg_size(b"\xff\xd8\xff\xd9") is None


def test_a_batch_without_jpegs_is_the_data_sets():
    plain = Pictures(), Pictures()
    assert_same(load(encoded(plain, None)), load(plain))


def damage(file):
    """Refer to a missing Huffman table, between an intact header and an intact end."""
    content = bytearray(file.read_bytes())
    content[content.index(b"\xff\xda") + 6] = 0x33
    file.write_bytes(content)
    assert plain_jpeg_size(file.read_bytes()) is not None


@pytest.mark.parametrize("bad", ["damaged", "no image"])
def test_the_data_set_judges_images_that_the_device_rejects(folder, bad):
    for part in ("train", "val"):
        file = folder / part / "c1" / "1.jpg"
        damage(file) if bad == "damaged" else file.write_bytes(b"no image")
    plain = open_folder(folder, on_bad_image="skip")
    seen = load(encoded(plain))
    assert_same(seen, load(plain))
    names = {str(folder / part / "c1" / "1.jpg") for part in ("train", "val")}
    assert {name for batch in seen for name in batch.bad_images} == names
    with pytest.raises(BadImageError, match=rf"^{folder}/train/c1/1\.jpg: not a readable image"):
        load(encoded(open_folder(folder)))


def test_images_that_only_the_device_rejects_are_decoded_and_counted(folder):
    """For example progressive JPEGs; the device still decodes the others of the batch."""
    batch_sizes = []

    def reject_progressive(files, **settings):
        batch_sizes.append(len(files))
        if any(b"\xff\xc2" in file.numpy().tobytes() for file in files):
            raise RuntimeError("not supported")
        return as_nvjpeg(files, **settings)

    plain = open_folder(folder)
    seen, expected = (load(encoded(plain, decoder)) for decoder in (NvJpeg(CPU, reject_progressive), NVJPEG))
    assert_same(seen, expected)
    by_pil = [sum(batch.decoded_by_pil for batch in batches) for batches in (seen, expected)]
    assert by_pil[0] - by_pil[1] == 2 + 2
    assert 1 in batch_sizes


@pytest.mark.parametrize(("height", "width"), [(24, 24), (40, 30), (7, 100), (300, 200)])
def test_a_gpu_resizes_to_the_same_pixels_apart_from_rounding(height, width):
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
def test_dalis_pixels_are_the_cpus_apart_from_rounding_and_edges(folder, dali, crop):
    plain = open_folder(folder, crop)
    for theirs, ours in zip(load(plain), load(encoded(plain, dali), workers=2), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.weights, theirs.weights)
        levels = (ours.images - theirs.images).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        assert float(levels.mean()) < 0.3
        if crop != "padded":
            assert float(levels[:, :, 1:-1, 1:-1].max()) < 1.01


def test_dali_continues_after_an_image_that_it_rejects(folder, dali):
    damage(folder / "train" / "c1" / "1.jpg")
    seen = load(encoded(open_folder(folder, "none", "skip"), dali), (0, 3))
    assert [name for batch in seen for name in batch.bad_images] == [str(folder / "train" / "c1" / "1.jpg")] * 2
    assert sum(batch.decoded_by_pil for batch in seen) == 3 * 2 * 3 + 2


def test_a_missing_decoder_or_device_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name, problem in {
        "gpu": 'there is no CUDA GPU; use "cpu", or "dali"$',
        "dali": ".* pip install nvidia-dali-cuda130, or use",
    }.items():
        with pytest.raises(ValueError, match=rf'^recipe\.data\.decoder = "{name}": {problem}'):
            open_decoder(name, CPU, threads=1)
