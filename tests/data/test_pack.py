"""A pack gives the samples of the folder that it was made of, and refuses what is not as it was written."""

import errno
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from recipe.commands.pack.command import pack
from recipe.data import BadImageError, ImageFiles, TrainLoader, ValidationLoader, list_imagefolder, open_datasets
from recipe.data.decoding import Decoded
from recipe.data.pack_format import IMAGE
from tests.data.images import MEAN, STD, picture, pixels, sample, write_folder
from tests.data.test_imagefolder import spoil, write_kinds

ODD = ["two words.jpg", "naïve 'quoted' \"name\".png", "line\nbreak.jpg", os.fsdecode(b"latin-\xe9.jpg")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of every kind of image, under names of every kind, one image that is none, and val/."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root, classes=1, images=4)
    for part in ("train", "val"):
        write_kinds(root / part / "kinds of images")
        odd = root / part / os.fsdecode(b"\xffclass\n")
        odd.mkdir()
        for number, name in enumerate(ODD):
            picture(number, width=30 + number).save(odd / name)
        spoil(root / part / "c0" / "2.jpg", "truncated")
    return root


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("pack")
    assert pack(folder, destination, 0) == 0
    return destination


def open_as(source, path, on_bad_image="skip", crop="random_resized", image_size=16):
    return open_datasets(source, path, image_size, crop, True, 7, on_bad_image)


def test_every_sample_is_the_folders_bit_for_bit(folder, packed):
    for ours, theirs in zip(open_as("pack", packed), open_as("imagefolder", folder), strict=True):
        assert len(ours) == len(theirs) == 4 + 13 + len(ODD)
        assert ours.classes == theirs.classes == 3
        assert ours.digest == theirs.digest
        for index in range(len(theirs)):
            assert ours.file(index) == theirs.file(index)
            for key in (index, (0, index), (5, index)):
                mine, expected = sample(ours, key), sample(theirs, key)
                assert torch.equal(mine.image, expected.image), theirs.name(index)
                assert (mine.label, mine.weight) == (expected.label, expected.weight)
                assert bool(mine.bad_image) == bool(expected.bad_image)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_folders_whatever_the_workers(folder, packed, workers):
    common = {"micro_batch": 3, "rank": 0, "world_size": 1, "workers": workers}
    common |= {"device": "cpu", "dtype": torch.float32, "mean": MEAN, "std": STD}
    batches = []
    for source, path, own in (("pack", packed, common), ("imagefolder", folder, common | {"workers": 0})):
        train, validation = open_as(source, path)
        loaders = TrainLoader(train, global_batch=3, seed=0, **own), ValidationLoader(validation, **own)
        batches.append([*loaders[0].epoch(1), *loaders[1].batches()])
    for mine, expected in zip(*batches, strict=True):
        assert torch.equal(mine.images, expected.images)
        assert torch.equal(mine.labels, expected.labels)
        assert torch.equal(mine.weights, expected.weights)


@pytest.fixture(scope="module")
def raw(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("raw")
    assert pack(folder, destination, 24, raw=True) == 0
    return destination


class Resized(ImageFiles):
    """A folder's images, those that are larger resized as by ``torchvision.transforms.Resize``."""

    def image(self, index):
        decoded = super().image(index)
        image = Image.fromarray(decoded.pixels.numpy())
        return Decoded(pixels(functional.resize(image, 24) if min(image.size) > 24 else image))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_raw_pixels_are_those_of_the_resized_folder(folder, raw, workers):
    options = {"image_size": 16, "crop": "random_resized", "flip": True, "seed": 7, "on_bad_image": "skip"}
    resized = [Resized(part, **options) for part in list_imagefolder(folder)]
    common = {"micro_batch": 3, "rank": 0, "world_size": 1}
    common |= {"device": "cpu", "dtype": torch.float32, "mean": MEAN, "std": STD}
    batches = []
    for (train, validation), of_loader in ((open_as("pack", raw), workers), (resized, 0)):
        loaders = (
            TrainLoader(train, global_batch=3, seed=0, workers=of_loader, **common),
            ValidationLoader(validation, workers=of_loader, **common),
        )
        batches.append([*loaders[0].epoch(1), *loaders[0].epoch(2, first_step=3), *loaders[1].batches()])
        for loader in loaders:
            loader.close()
    for mine, expected in zip(*batches, strict=True):
        assert torch.equal(mine.images, expected.images)
        assert torch.equal(mine.labels, expected.labels)
        assert torch.equal(mine.weights, expected.weights)
        assert len(mine.bad_images) == len(expected.bad_images)
        assert mine.decoded_by_pil == 0


def test_raw_pixels_that_a_shard_no_longer_holds_are_noticed(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "pack")
    train, _ = open_as("pack", tmp_path / "pack", on_bad_image="stop")
    os.truncate(tmp_path / "pack/train/00000.tar", 2000)
    with pytest.raises(BadImageError, match=r"train/c0/3\.jpg, 2,304 bytes at [\d,]+: .* ends 2,304 bytes too early"):
        sample(train, (0, 3))


@pytest.mark.parametrize("stated", [False, True])
def test_a_pack_of_other_pixels_than_are_stated_is_refused(packed, raw, stated):
    with pytest.raises(
        ValueError, match=rf"pack_raw = {str(stated).lower()}: .* is a pack of (raw pixels|image files),"
    ):
        open_datasets("pack", packed if stated else raw, 16, "none", False, 0, "skip", pack_raw=stated)
    open_datasets("pack", raw if stated else packed, 16, "none", False, 0, "skip", pack_raw=stated)


@pytest.mark.parametrize("kind", ["packed", "raw"])
def test_a_name_tells_shard_and_original_on_one_line(kind, request):
    packed = request.getfixturevalue(kind)
    train, validation = open_as("pack", packed)
    shard = packed / "train" / "00000.tar"
    assert train.name(1) == f"{shard}: train/c0/1.jpg"
    assert validation.name(1) == f"{packed / 'val' / '00000.tar'}: val/c0/1.jpg"
    assert f"{shard}: train/\\udcffclass\\u000a/line\\u000abreak.jpg" in map(train.name, range(len(train)))
    assert train.class_names == ["c0", "kinds of images", "\\udcffclass\\u000a"]


def test_a_bad_image_names_shard_place_and_original(packed):
    train, _ = open_as("pack", packed, on_bad_image="stop")
    with pytest.raises(BadImageError) as error:
        sample(train, (0, 2))
    assert str(error.value).startswith(f"{packed}/train/00000.tar: train/c0/2.jpg, ")
    assert 'or set recipe.data.on_bad_image to "skip"' in str(error.value)


@pytest.mark.parametrize("how", ["cut off", "zeroed"])
def test_a_shard_that_is_damaged_in_training_is_noticed(packed, tmp_path, how):
    shutil.copytree(packed, tmp_path / "pack")
    train, _ = open_as("pack", tmp_path / "pack", on_bad_image="stop")
    shard = tmp_path / "pack/train/00000.tar"
    offset = int(shard.with_suffix(".idx").read_text().splitlines()[4].split()[1])
    content = shard.read_bytes()
    shard.write_bytes(content[: offset + 10] if how == "cut off" else content[:offset] + bytes(len(content) - offset))
    assert sample(train, (0, 1)).weight == 1
    with pytest.raises(BadImageError) as error:
        sample(train, (0, 3))
    assert str(error.value).startswith(f"{shard}: train/c0/3.jpg, ")
    assert f" at {offset:,}: not a readable image" in str(error.value)
    assert "\n" not in str(error.value)


def change(path, **changes):
    header = json.loads(path.read_text())
    for key, value in changes.items():
        section = header
        *sections, last = key.split("__")
        for part in sections:
            section = section[part]
        section[last] = value
    path.write_text(json.dumps(header))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload",)


def replace_index(pack, array):
    """Write another array in the place of an index, and have the header agree."""
    path = pack / "train/images.npy"
    np.save(path, array, allow_pickle=True)
    header = json.loads((pack / "pack.json").read_text())
    header["train"]["indices"][0] |= {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (pack / "pack.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda pack: (pack / "pack.json").unlink(), "recipe.data.path: {pack} holds no whole pack"),
        (lambda pack: (pack / "pack.json").write_text("{"), "{pack}/pack.json: line 1"),
        (lambda pack: change(pack / "pack.json", making__version=2), "{pack}/pack.json: making.version = 2: not 1;"),
        (lambda pack: change(pack / "pack.json", train__images=9), "{pack}/train/images.npy: not the index of 9 "),
        (lambda pack: change(pack / "pack.json", classes=["c0"]), "{pack}/train/images.npy: not the index of 21 "),
        (lambda pack: change(pack / "pack.json", classes=[]), "{pack}/train/images.npy: not the index of 21 "),
        (
            lambda pack: change(pack / "pack.json", train__shards=[]),
            "{pack}/train/images.npy: not the index of 21 images of 3 classes in 0 shards, of which pack.json speaks;",
        ),
        (lambda pack: change(pack / "pack.json", train__indices=[]), "{pack}/pack.json: train has no images.npy;"),
        (
            lambda pack: change(pack / "pack.json", validation=json.loads((pack / "pack.json").read_text())["train"]),
            "{pack}/pack.json: train lies in train/, validation in val/ or test/; make the pack anew",
        ),
        (lambda pack: (pack / "val/00000.tar").unlink(), "{pack}/val/00000.tar: No such file or directory; copy it"),
        (lambda pack: os.truncate(pack / "train/00000.tar", 512), "{pack}/train/00000.tar: 512 bytes, of "),
        (lambda pack: os.truncate(pack / "train/names.npy", 99), "{pack}/train/names.npy: 99 bytes, of "),
        (
            lambda pack: (pack / "train/names.npy").write_bytes(bytes((pack / "train/names.npy").stat().st_size)),
            "{pack}/train/names.npy: another SHA-256 than was written; copy it again",
        ),
        (lambda pack: replace_index(pack, np.array([Payload()])), ""),
        (lambda pack: replace_index(pack, np.zeros(21)), "{pack}/train/images.npy: an array of float64"),
        (lambda pack: replace_index(pack, np.full(21, 9, IMAGE)), "{pack}/train/images.npy: not the index of 21"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(packed, tmp_path, monkeypatch, spoilt, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed, tmp_path / "pack")
    spoilt(tmp_path / "pack")
    with pytest.raises(ValueError, match=r".") as error:
        open_as("pack", tmp_path / "pack")
    assert str(error.value).startswith(message.format(pack=tmp_path / "pack"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "payload").exists()


def test_a_pack_of_more_shards_than_the_process_may_open_is_not_to_be_made_anew(packed, monkeypatch):
    def open_no_more(path, *arguments):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(os, "open", open_no_more)
    with pytest.raises(ValueError, match=r"train/00000\.tar: Too many open files; raise ulimit -n: .* stay open$"):
        open_as("pack", packed)


def test_source_and_folder_that_do_not_fit_each_other(folder, packed):
    with pytest.raises(ValueError, match='holds a pack of images; write "source": "pack"'):
        open_as("imagefolder", packed)
    with pytest.raises(ValueError, match=r'holds no whole pack.*write "source": "imagefolder"'):
        open_as("pack", folder)


def test_images_that_are_smaller_than_validation_takes_them_are_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "pack")
    change(tmp_path / "pack/pack.json", making__short_side=255)
    with pytest.raises(ValueError, match=r"short side 255, but images of 224 px are validated at 256; pack anew"):
        open_as("pack", tmp_path / "pack", image_size=224)
    open_as("pack", tmp_path / "pack", image_size=224, crop="none")
    change(tmp_path / "pack/pack.json", making__short_side=256)
    open_as("pack", tmp_path / "pack", image_size=224)


@pytest.mark.parametrize(("short_side", "stated"), [(0, 352), (352, 0), (352, 320)])
def test_a_pack_of_another_short_side_than_is_stated_is_refused(packed, tmp_path, short_side, stated):
    shutil.copytree(packed, tmp_path / "pack")
    change(tmp_path / "pack/pack.json", making__short_side=short_side)
    opening = ("pack", tmp_path / "pack", 16, "none", False, 0, "skip")
    with pytest.raises(ValueError, match=rf"_side = {stated}: .* of short side {short_side}, .*write {short_side},"):
        open_datasets(*opening, stated)
    open_datasets(*opening, short_side)
