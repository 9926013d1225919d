import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from recipe.commands.pack.command import pack
from recipe.data import BadImageError, TrainLoader, ValidationLoader, open_datasets
from recipe.data.pack_format import read_header
from tests.data.images import MEAN, STD, picture, pixels, sample, write_folder


def open_folder(path, on_bad_image="stop", crop="none"):
    return open_datasets("imagefolder", path, 16, crop, False, 0, on_bad_image)


def loaders(path, on_bad_image, workers):
    train, validation = open_folder(path, on_bad_image)
    common = {"micro_batch": 2, "rank": 0, "world_size": 1, "workers": workers}
    common |= {"device": "cpu", "dtype": torch.float32, "mean": MEAN, "std": STD}
    return TrainLoader(train, global_batch=2, seed=0, **common), ValidationLoader(validation, **common)


def palette_with_transparency() -> Image.Image:
    image = picture(8).convert("P")
    image.info["transparency"] = bytes([0, 100, 200])
    return image


def rotated_by_exif() -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(9), exif


def write_kinds(folder):
    """Write what a collection from the web holds, and what PIL warns of."""
    folder.mkdir(parents=True)
    picture(0).save(folder / "colour.jpg")
    picture(1).save(folder / "progressive.JPEG", progressive=True)
    picture(2, mode="L").save(folder / "grey.jpg")
    picture(3, mode="CMYK").save(folder / "cmyk.jpeg")
    picture(4).save(folder / "really_a.JPEG", "PNG")
    picture(5, mode="RGBA").save(folder / "alpha.png")
    picture(6, mode="1").save(folder / "bits.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    picture(7).save(folder / "lossless.webp", lossless=True)
    palette_with_transparency().save(folder / "palette.png")
    image, exif = rotated_by_exif()
    image.save(folder / "rotated.jpg", exif=exif)
    damaged = exif.tobytes()[:-6] + b"\xff" * 6
    image.save(folder / "damaged_exif.jpg", exif=damaged)
    picture(10).save(folder / "naïve name.jpg")


def test_images_of_any_kind_are_read_as_torchvision_reads_them(tmp_path):
    write_kinds(tmp_path / "train" / "a")
    write_kinds(tmp_path / "val" / "a")
    train, validation = open_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [(pixels(image), label) for image, label in datasets.ImageFolder(tmp_path / "train")]
    assert len(train) == len(theirs) == 13
    # But for 16 bits of grey, of which torchvision's 255 is all that is 255 and more.
    deep = torch.arange(1200).reshape(30, 40, 1).expand(-1, -1, 3) * 50
    theirs[train_index(train, "deep.png")] = (((deep + 128) // 257).to(torch.uint8), 0)
    for index, (expected, label) in enumerate(theirs):
        assert torch.equal(train.image(index).pixels, expected), train.name(index)
        assert sample(train, (0, index)).label == sample(validation, index).label == label
    assert train.image(train_index(train, "rotated.jpg")).pixels.shape == (30, 40, 3)


def train_index(dataset, name):
    (index,) = [index for index in range(len(dataset)) if dataset.name(index).endswith(name)]
    return index


def test_a_huge_image_is_read_and_a_bomb_is_refused(tmp_path, monkeypatch):
    train, _ = open_folder(write_folder(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1,200 pixels: more than the limit, less than twice
    assert train.image(0).pixels.shape == (30, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(
        BadImageError, match=r"0\.jpg: .* \(it has more than 1,000 pixels, the most that PIL takes\); shrink it, or set"
    ):
        train.image(0)


def test_order_labels_and_classes_are_torchvisions(tmp_path):
    write_folder(tmp_path, classes=3, images=4)
    (tmp_path / "train" / "c1" / "deeper").mkdir()
    picture(1).save(tmp_path / "train" / "c1" / "deeper" / "x.png")
    (tmp_path / "train" / "c1" / "notes.txt").write_text("no image")
    train, validation = open_folder(tmp_path)
    theirs = datasets.ImageFolder(tmp_path / "train")
    ours = [(train.name(index), sample(train, (0, index)).label) for index in range(len(train))]
    assert ours == theirs.samples
    assert (len(train), len(validation)) == (13, 12)
    assert train.classes == 3
    assert train.class_names == ["c0", "c1", "c2"]


def test_classes_are_sorted_as_text_and_nothing_hidden_counts_in_the_folder_and_in_its_pack(tmp_path):
    for part in ("train", "val"):
        for name in range(12):
            (tmp_path / "images" / part / str(name)).mkdir(parents=True)
            picture(name).save(tmp_path / "images" / part / str(name) / "0.png")
    expected = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
    assert datasets.ImageFolder(tmp_path / "images" / "train").classes == expected
    for hidden in (".ipynb_checkpoints/0.png", "0/._0.png", "0/.DS_Store"):
        (tmp_path / "images" / "train" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / "train" / hidden).write_bytes(b"no image")
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    assert list(read_header(tmp_path / "pack").classes) == expected
    for source, folder in (("imagefolder", "images"), ("pack", "pack")):
        train, _ = open_datasets(source, tmp_path / folder, 16, "none", False, 0, "stop")
        assert (train.class_names, len(train)) == (expected, 12)
        assert all(torch.equal(train.image(i).pixels, pixels(picture(int(name)))) for i, name in enumerate(expected))


def test_the_digest_changes_with_the_class_or_the_split_of_an_image_and_not_with_the_place_of_the_folder(tmp_path):
    def digests(root):
        return [part.digest for part in open_datasets("imagefolder", root, 8, "none", False, 0, "stop")]

    root = write_folder(tmp_path / "images")
    before = digests(root)
    assert digests(root.rename(tmp_path / "elsewhere")) == before
    root = tmp_path / "elsewhere"
    (root / "train/c0/0.jpg").rename(root / "train/c0/1a.jpg")  # as many images of each class, in another order
    train, validation = digests(root)
    assert train != before[0]
    assert validation == before[1]
    (root / "train/c0/1a.jpg").rename(root / "train/c0/0.jpg")
    assert digests(root) == before
    for one, other in (("c0/0", "c1/9"), ("c1/0", "c0/9")):
        (root / f"train/{one}.jpg").rename(root / f"train/{other}.jpg")
    assert digests(root)[0] != before[0]


def test_val_comes_before_test(tmp_path):
    write_folder(tmp_path, parts=("train", "test"))
    assert "/test/" in open_folder(tmp_path)[1].name(0)
    write_folder(tmp_path, parts=("val",))
    assert "/val/" in open_folder(tmp_path)[1].name(0)


def test_a_folder_that_will_not_do_is_refused(tmp_path):
    def refusal(path=tmp_path) -> str:
        with pytest.raises(ValueError, match=r"^recipe\.data\.path: ") as error:
            open_folder(path)
        return str(error.value)

    assert "missing" in refusal(None)
    assert f"there is no folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")
    assert f"{tmp_path} has no folder train/" in refusal()
    (tmp_path / "train").mkdir()
    assert f"{tmp_path} has neither val/ nor test/" in refusal()
    (tmp_path / "val").mkdir()
    assert f"{tmp_path / 'train'} holds no class" in refusal()
    write_folder(tmp_path / "good")
    for label in range(8):
        (tmp_path / "train" / f"c{label}").mkdir()
    (tmp_path / "train" / "c0" / "readme.txt").touch()
    assert f"{tmp_path / 'train'} holds no image of c0, c1, c2, c3, c4 and 3 more" in refusal()


@pytest.mark.parametrize(("here", "there"), [("train", "val"), ("val", "train")])
def test_classes_that_differ_are_named(tmp_path, here, there):
    write_folder(tmp_path)
    (tmp_path / here / "otters").mkdir()
    picture().save(tmp_path / here / "otters" / "0.jpg")
    message = f"{tmp_path / there} lacks classes that {tmp_path / here} has: otters"
    with pytest.raises(ValueError, match=f"recipe.data.path: {message}$"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("ours", "theirs"), [("caf\u00e9", "cafe\u0301"), ("cat", "Cat "), ("cat", "cat\u200b")])
def test_classes_that_look_the_same_are_told_apart(tmp_path, ours, theirs):
    write_folder(tmp_path)
    (tmp_path / "train" / "c1").rename(tmp_path / "train" / ours)
    (tmp_path / "val" / "c1").rename(tmp_path / "val" / theirs)
    with pytest.raises(ValueError, match=r"lacks classes") as error:
        open_folder(tmp_path)
    assert str(error.value) == (
        f"recipe.data.path: {tmp_path}/val lacks classes that {tmp_path}/train has: {ours}; {ours!a} looks like "
        f"{theirs!a}, which it has: give both the same name"
    )


def spoil(path, how: str) -> None:
    good = path.read_bytes()
    if how == "directory in its place":
        path.unlink()
        path.symlink_to(path.parent, target_is_directory=True)
        return
    png = io.BytesIO()
    picture().save(png, "PNG")
    broken_png = png.getvalue()[:40] + bytes([png.getvalue()[40] ^ 0xFF]) + png.getvalue()[41:]
    contents = {"truncated": good[: len(good) // 2], "text": b"no image\n", "empty": b"", "broken PNG": broken_png}
    path.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "broken PNG", "directory in its place"])
def test_a_bad_image_names_its_path_and_the_remedy(tmp_path, how):
    train, validation = open_folder(write_folder(tmp_path))
    for part, dataset, key in (("train", train, (0, 1)), ("val", validation, 1)):
        bad = tmp_path / part / "c0" / "1.jpg"
        spoil(bad, how)
        with pytest.raises(BadImageError) as error:
            sample(dataset, key)
        assert str(error.value).startswith(f"{bad}: ")
        assert str(error.value).endswith('set recipe.data.on_bad_image to "skip"')
        again = pickle.loads(pickle.dumps(error.value))
        assert isinstance(again, BadImageError)
        assert str(again) == str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_ends_an_epoch_with_one_clear_line(tmp_path, workers):
    train, validation = loaders(write_folder(tmp_path), "stop", workers)
    for part, batches in (("train", train.epoch(0)), ("val", validation.batches())):
        bad = tmp_path / part / "c1" / "2.jpg"
        spoil(bad, "text")
        with pytest.raises(BadImageError) as error:
            list(batches)
        assert str(error.value).startswith(f"{bad}: not a readable image")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_replaces_in_training_and_leaves_out_in_validation(tmp_path, workers):
    write_folder(tmp_path)
    good, _ = open_folder(tmp_path, crop="random_resized")
    bad = [tmp_path / part / folder for part in ("train", "val") for folder in ("c0/2.jpg", "c1/2.jpg")]
    for path in bad:
        spoil(path, "truncated")
    train, validation = loaders(tmp_path, "skip", workers)

    batches = list(train.epoch(0))
    assert sorted(path for batch in batches for path in batch.bad_images) == [str(path) for path in bad[:2]]
    assert all(torch.equal(batch.weights, torch.ones(2)) for batch in batches)
    # The last image of c0 gave its place to the first of c1, the last of all to the first of all.
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]

    batches = list(validation.batches())
    assert [path for batch in batches for path in batch.bad_images] == [str(path) for path in bad[2:]]
    assert torch.cat([batch.weights for batch in batches]).tolist() == [1, 1, 0, 1, 1, 0]

    # A function of (seed, epoch, index) still: the crop that the bad image would have had, of the next image.
    dataset, _ = open_folder(tmp_path, "skip", crop="random_resized")
    replaced = sample(dataset, (4, 2))
    assert replaced.bad_image == str(bad[0])
    assert replaced.label == 1
    assert torch.equal(replaced.image, sample(dataset, (4, 2)).image)
    assert not torch.equal(replaced.image, sample(good, (4, 3)).image)


def test_skip_gives_up_where_nothing_can_be_read(tmp_path):
    write_folder(tmp_path)
    train, _ = open_folder(tmp_path, "skip")
    for path in (tmp_path / "train").glob("*/*"):
        path.unlink()
    with pytest.raises(
        BadImageError, match=r"c1/1\.jpg: cannot be read \(.*No such file.*\), nor can any of the images that follow"
    ):
        sample(train, (0, 4))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_that_cannot_be_read_at_all_is_refused_before_anything_is_trained(tmp_path, part):
    write_folder(tmp_path / "images")
    for path in (tmp_path / "images" / part).glob("*/*"):
        path.write_bytes(LFS_POINTER)
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    first = f"{part}/c0/0.jpg"
    assert read_header(tmp_path / "pack").parts[part == "val"].bad_images[0].name == first
    for source, path in (
        ("imagefolder", f"{tmp_path}/images/{first}"),
        ("pack", f"{tmp_path}/pack/{part}/00000.tar: {first}"),
    ):
        for on_bad_image, what in (("stop", "not a readable image"), ("skip", "cannot be read")):
            with pytest.raises(BadImageError) as error:
                open_datasets(
                    source, tmp_path / source.replace("imagefolder", "images"), 16, "none", False, 0, on_bad_image
                )
            assert str(error.value).startswith(path)
            assert f"{what} (Git LFS's pointer to it: git lfs pull fetches the image)" in str(error.value)
            assert "\n" not in str(error.value)
    # One that can be read is enough.
    picture().save(tmp_path / "images" / part / "c1" / "2.jpg")
    open_folder(tmp_path / "images", "skip")
