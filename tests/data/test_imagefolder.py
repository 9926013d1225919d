import pickle
import warnings

import pytest
import torch
from PIL import Image
from torchvision import datasets

from recipe.commands.pack.command import pack
from recipe.data import BadImageError, open_datasets
from recipe.data.pack_format import read_header
from tests.data.images import picture, pixels, sample, spoil, train_loader, validation_loader, write_folder, write_kinds


def open_folder(path, on_bad_image="stop", crop="none"):
    return open_datasets("imagefolder", path, image_size=16, crop=crop, flip=False, seed=0, on_bad_image=on_bad_image)


def loaders(path, on_bad_image, workers):
    train, validation = open_folder(path, on_bad_image)
    options = {"micro_batch": 2, "workers": workers}
    return train_loader(train, global_batch=2, **options), validation_loader(validation, **options)


def test_images_of_every_kind_are_read_as_by_torchvision(tmp_path):
    write_kinds(tmp_path / "train" / "a")
    write_kinds(tmp_path / "val" / "a")
    train, validation = open_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [(pixels(image), label) for image, label in datasets.ImageFolder(tmp_path / "train")]
    assert len(train) == len(theirs) == 13
    (deep,) = [index for index in range(13) if train.name(index).endswith("deep.png")]
    # Except for 16-bit grey values, which torchvision clips at 255.
    values = torch.arange(1200).reshape(30, 40, 1).expand(-1, -1, 3) * 50
    theirs[deep] = (((values + 128) // 257).to(torch.uint8), 0)
    for index, (expected, label) in enumerate(theirs):
        assert torch.equal(train.image(index).pixels, expected), train.name(index)
        assert sample(train, (0, index)).label == sample(validation, index).label == label


def test_a_huge_image_is_read_and_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    train, _ = open_folder(write_folder(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1,200 pixels: more than the limit, less than twice that
    assert train.image(0).pixels.shape == (30, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(
        BadImageError, match=r"0\.jpg: .* \(it has more than 1,000 pixels, PIL's limit\); shrink it, or set"
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


def test_classes_are_sorted_as_text_and_hidden_files_ignored_in_folder_and_pack(tmp_path):
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
        train, _ = open_datasets(source, tmp_path / folder, image_size=16, crop="none", flip=False, seed=0)
        assert (train.class_names, len(train)) == (expected, 12)
        assert all(torch.equal(train.image(i).pixels, pixels(picture(int(name)))) for i, name in enumerate(expected))


def test_the_digest_depends_on_names_and_classes_and_not_on_the_folders_path(tmp_path):
    def digests(root):
        return [part.digest for part in open_folder(root)]

    root = write_folder(tmp_path / "images")
    before = digests(root)
    root = root.rename(tmp_path / "elsewhere")
    assert digests(root) == before
    (root / "train/c0/0.jpg").rename(root / "train/c0/1a.jpg")  # the same number per class, in a different order
    train, validation = digests(root)
    assert train != before[0]
    assert validation == before[1]
    (root / "train/c0/1a.jpg").rename(root / "train/c0/0.jpg")
    assert digests(root) == before
    for one, other in (("c0/0", "c1/9"), ("c1/0", "c0/9")):
        (root / f"train/{one}.jpg").rename(root / f"train/{other}.jpg")
    assert digests(root)[0] != before[0]


def test_val_takes_precedence_over_test(tmp_path):
    write_folder(tmp_path, parts=("train", "test"))
    assert "/test/" in open_folder(tmp_path)[1].name(0)
    write_folder(tmp_path, parts=("val",))
    assert "/val/" in open_folder(tmp_path)[1].name(0)


def test_unsuitable_folders_are_refused(tmp_path):
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
    assert f"{tmp_path / 'train'} has no classes" in refusal()
    for label in range(8):
        (tmp_path / "train" / f"c{label}").mkdir()
    (tmp_path / "train" / "c0" / "readme.txt").touch()
    assert f"{tmp_path / 'train'} has no images of c0, c1, c2, c3, c4 and 3 more" in refusal()


@pytest.mark.parametrize(("here", "there"), [("train", "val"), ("val", "train")])
def test_classes_that_differ_are_named(tmp_path, here, there):
    write_folder(tmp_path)
    (tmp_path / here / "otters").mkdir()
    picture().save(tmp_path / here / "otters" / "0.jpg")
    message = f"{tmp_path / there} lacks classes that {tmp_path / here} has: otters"
    with pytest.raises(ValueError, match=f"recipe.data.path: {message}$"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("ours", "theirs"), [("caf\u00e9", "cafe\u0301"), ("cat", "Cat "), ("cat", "cat\u200b")])
def test_classes_that_look_the_same_are_distinguished(tmp_path, ours, theirs):
    write_folder(tmp_path)
    (tmp_path / "train" / "c1").rename(tmp_path / "train" / ours)
    (tmp_path / "val" / "c1").rename(tmp_path / "val" / theirs)
    with pytest.raises(ValueError, match=r"lacks classes") as error:
        open_folder(tmp_path)
    assert str(error.value) == (
        f"recipe.data.path: {tmp_path}/val lacks classes that {tmp_path}/train has: {ours}; {ours!a} looks like "
        f"{theirs!a}, which it has: give both the same name"
    )


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "broken PNG", "directory in its place"])
def test_a_bad_image_is_named_with_a_remedy(tmp_path, how):
    train, validation = open_folder(write_folder(tmp_path))
    for part, dataset, key in (("train", train, (0, 1)), ("val", validation, 1)):
        bad = tmp_path / part / "c0" / "1.jpg"
        spoil(bad, how)
        with pytest.raises(BadImageError) as error:
            sample(dataset, key)
        assert str(error.value).startswith(f"{bad}: not a readable image")
        assert str(error.value).endswith('set recipe.data.on_bad_image to "skip"')
        again = pickle.loads(pickle.dumps(error.value))
        assert isinstance(again, BadImageError)
        assert str(again) == str(error.value)


def test_stop_ends_an_epoch_with_a_single_line(tmp_path):
    train, validation = loaders(write_folder(tmp_path), "stop", workers=2)
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
    # The last image of c0 is replaced by the first of c1, and the last of all by the first of all.
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]

    batches = list(validation.batches())
    assert [path for batch in batches for path in batch.bad_images] == [str(path) for path in bad[2:]]
    assert torch.cat([batch.weights for batch in batches]).tolist() == [1, 1, 0, 1, 1, 0]

    # Still a function of (seed, epoch, index): the next image, with the crop of the bad one.
    dataset, _ = open_folder(tmp_path, "skip", crop="random_resized")
    replaced = sample(dataset, (4, 2))
    assert replaced.bad_image == str(bad[0])
    assert replaced.label == 1
    assert torch.equal(replaced.image, sample(dataset, (4, 2)).image)
    assert not torch.equal(replaced.image, sample(good, (4, 3)).image)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_a_readable_image_is_refused_when_it_is_opened(tmp_path, part):
    write_folder(tmp_path / "images")
    for path in (tmp_path / "images" / part).glob("*/*"):
        path.write_bytes(LFS_POINTER)
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    first = f"{part}/c0/0.jpg"
    assert read_header(tmp_path / "pack").parts[part == "val"].bad_images[0].name == first
    for source, folder, name in (
        ("imagefolder", "images", f"{tmp_path}/images/{first}"),
        ("pack", "pack", f"{tmp_path}/pack/{part}/00000.tar: {first}"),
    ):
        for on_bad_image, what in (("stop", "not a readable image"), ("skip", "cannot be read")):
            with pytest.raises(BadImageError) as error:
                open_datasets(
                    source, tmp_path / folder, image_size=16, crop="none", flip=False, seed=0, on_bad_image=on_bad_image
                )
            assert str(error.value).startswith(name)
            assert f"{what} (it is a Git LFS pointer; git lfs pull fetches the image)" in str(error.value)
            assert "\n" not in str(error.value)
    # A single readable image is enough.
    picture().save(tmp_path / "images" / part / "c1" / "2.jpg")
    open_folder(tmp_path / "images", "skip")
