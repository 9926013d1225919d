"""A pack gives the same samples as the folder that was packed, and is refused if it has been changed."""

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
from recipe.data import BadImageError, ImageFiles, list_imagefolder, open_datasets
from recipe.data.decoding import Decoded
from recipe.data.pack_format import IMAGE
from tests.data.images import assert_same, load, picture, pixels, sample, spoil, write_folder, write_kinds

ODD = ["two words.jpg", "naïve 'quoted' \"name\".png", "line\nbreak.jpg", os.fsdecode(b"latin-\xe9.jpg")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes with every kind of image and of name, and a truncated image in each part."""
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
    return open_datasets(source, path, image_size=image_size, crop=crop, flip=True, seed=7, on_bad_image=on_bad_image)


def test_samples_are_bit_identical_to_the_folders(folder, packed):
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


@pytest.fixture(scope="module")
def raw(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("raw")
    assert pack(folder, destination, 24, raw=True) == 0
    return destination


class Resized(ImageFiles):
    """A folder's images, the larger ones resized with ``torchvision.transforms.Resize``."""

    def image(self, index):
        decoded = super().image(index)
        image = Image.fromarray(decoded.pixels.numpy())
        return Decoded(pixels(functional.resize(image, 24) if min(image.size) > 24 else image))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_folders_and_raw_ones_the_resized_folders(folder, packed, raw, workers):
    options = {"image_size": 16, "crop": "random_resized", "flip": True, "seed": 7, "on_bad_image": "skip"}
    resized = [Resized(part, **options) for part in list_imagefolder(folder)]
    loading = {"global_batch": 4, "epochs": (1, 2)}
    assert_same(
        load(open_as("pack", packed), workers=workers, **loading), load(open_as("imagefolder", folder), **loading)
    )
    batches = load(open_as("pack", raw), workers=workers, **loading)
    assert_same(batches, load(resized, **loading))
    assert all(batch.decoded_by_pil == 0 for batch in batches)


def test_missing_raw_pixels_are_noticed(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "pack")
    train, _ = open_as("pack", tmp_path / "pack", on_bad_image="stop")
    os.truncate(tmp_path / "pack/train/00000.tar", 2000)
    with pytest.raises(BadImageError, match=r"train/c0/3\.jpg, 2,304 bytes at [\d,]+: .* ends 2,304 bytes too early"):
        sample(train, (0, 3))


def test_names_contain_shard_and_original_on_a_single_line(packed):
    train, validation = open_as("pack", packed)
    shard = packed / "train" / "00000.tar"
    assert train.name(1) == f"{shard}: train/c0/1.jpg"
    assert validation.name(1) == f"{packed / 'val' / '00000.tar'}: val/c0/1.jpg"
    assert f"{shard}: train/\\udcffclass\\u000a/line\\u000abreak.jpg" in map(train.name, range(len(train)))
    assert train.class_names == ["c0", "kinds of images", "\\udcffclass\\u000a"]


@pytest.mark.parametrize("how", ["cut off", "zeroed"])
def test_damage_to_a_shard_during_training_is_noticed(packed, tmp_path, how):
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
    assert 'or set recipe.data.on_bad_image to "skip"' in str(error.value)
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
    """Replace an index with a different array, and update the header to match."""
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
        (lambda pack: (pack / "pack.json").unlink(), "{pack} is not a complete pack"),
        (lambda pack: (pack / "pack.json").write_text("{"), "{pack}/pack.json: line 1"),
        (lambda pack: change(pack / "pack.json", making__version=2), "{pack}/pack.json: making.version = 2: not 1;"),
        (lambda pack: change(pack / "pack.json", train__images=9), "{pack}/train/images.npy: not the index of the 9 "),
        (lambda pack: change(pack / "pack.json", classes=["c0"]), "{pack}/train/images.npy: not the index of the 21 "),
        (lambda pack: change(pack / "pack.json", classes=[]), "{pack}/train/images.npy: not the index of the 21 "),
        (
            lambda pack: change(pack / "pack.json", train__shards=[]),
            "{pack}/train/images.npy: not the index of the 21 images of 3 classes in 0 shards that pack.json lists;",
        ),
        (lambda pack: change(pack / "pack.json", train__indices=[]), "{pack}/pack.json: train has no images.npy;"),
        (
            lambda pack: change(pack / "pack.json", validation=json.loads((pack / "pack.json").read_text())["train"]),
            "{pack}/pack.json: train must be in train/, validation in val/ or test/; recreate the pack",
        ),
        (lambda pack: (pack / "val/00000.tar").unlink(), "{pack}/val/00000.tar: No such file or directory; copy it"),
        (lambda pack: os.truncate(pack / "train/00000.tar", 512), "{pack}/train/00000.tar: 512 bytes instead of "),
        (lambda pack: os.truncate(pack / "train/names.npy", 99), "{pack}/train/names.npy: 99 bytes instead of "),
        (
            lambda pack: (pack / "train/names.npy").write_bytes(bytes((pack / "train/names.npy").stat().st_size)),
            "{pack}/train/names.npy: its SHA-256 differs from the original's; copy it again",
        ),
        (lambda pack: replace_index(pack, np.array([Payload()])), ""),
        (lambda pack: replace_index(pack, np.zeros(21)), "{pack}/train/images.npy: an array of float64"),
        (lambda pack: replace_index(pack, np.full(21, 9, IMAGE)), "{pack}/train/images.npy: not the index of the 21"),
    ],
)
def test_a_changed_pack_is_refused(packed, tmp_path, monkeypatch, spoilt, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed, tmp_path / "pack")
    spoilt(tmp_path / "pack")
    with pytest.raises(ValueError, match=r".") as error:
        open_as("pack", tmp_path / "pack")
    assert str(error.value).startswith(f"recipe.data.path: {message.format(pack=tmp_path / 'pack')}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "payload").exists()


def test_a_source_that_does_not_match_the_folder_is_refused(folder, packed):
    with pytest.raises(ValueError, match='contains a pack of images; use "source": "pack"'):
        open_as("imagefolder", packed)
    with pytest.raises(ValueError, match=r'is not a complete pack.*use "source": "imagefolder"'):
        open_as("pack", folder)


@pytest.mark.parametrize(
    ("making", "options", "message"),
    [
        (
            {"short_side": 0},
            {"pack_short_side": 352},
            "of short side 0, but recipe.data.pack_short_side = 352, .* set it to 0,",
        ),
        (
            {"short_side": 352},
            {"pack_short_side": 0},
            "of short side 352, but recipe.data.pack_short_side = 0, .* set it to 352,",
        ),
        ({"raw": False}, {"pack_raw": True}, "of image files, but recipe.data.pack_raw = true, .* set it to false,"),
        ({"raw": True}, {"pack_raw": False}, "of raw pixels, but recipe.data.pack_raw = false, .* set it to true,"),
        (
            {"short_side": 255},
            {"image_size": 224, "crop": "random_resized"},
            "short side 255, but validation at 224 px resizes to 256; recreate the pack with --short-side 256",
        ),
    ],
)
def test_a_pack_that_does_not_match_the_config_is_refused(packed, tmp_path, making, options, message):
    shutil.copytree(packed, tmp_path / "pack")
    change(tmp_path / "pack/pack.json", **{f"making__{key}": value for key, value in making.items()})
    options = {"image_size": 16, "crop": "none", "flip": False, "seed": 0, "on_bad_image": "skip"} | options
    with pytest.raises(ValueError, match=message):
        open_datasets("pack", tmp_path / "pack", **options)


def test_a_pack_that_matches_the_config_is_opened(packed, raw):
    for path, short_side in ((packed, 0), (raw, 24)):
        matching = {"pack_short_side": short_side, "pack_raw": path == raw}
        # Validation at 21 px resizes to 24.
        open_datasets(
            "pack", path, image_size=21, crop="random_resized", flip=False, seed=0, on_bad_image="skip", **matching
        )
