"""A Hugging Face data set gives the same samples as a folder of the same files, or is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from recipe.commands.export import data_name
from recipe.commands.hosts import probe
from recipe.data import BadImageError, EncodedImages, Keys, list_imagefolder, look
from recipe.data.huggingface_index import list_huggingface
from recipe.data.sources import open_datasets, open_validation
from tests.data.images import CPU, assert_same, load, spoil, write_folder, write_kinds
from tests.launch import DIGITS, losses, train_ok
from tests.test_early_refusals import without_torch

IMAGE = {"bytes": b"", "path": None}


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Use neither the user's cache nor the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with every kind of image and a truncated one."""
    root = write_folder(tmp_path_factory.mktemp("images"), classes=1, images=4)
    for part in ("train", "val"):
        write_kinds(root / part / "kinds of images")
        spoil(root / part / "c0/2.jpg", "truncated")
    return root


def rows(labels: list[int | None], names: tuple[str, ...] = ("cat", "dog"), **columns: Any) -> datasets.Dataset:
    """A split of empty image files with these labels; ``columns`` are the features of additional columns."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))} | columns
    values = {"image": IMAGE, **dict.fromkeys(columns, IMAGE)}
    content = {name: [values[name]] * len(labels) for name in features if name in values} | {"label": labels}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def of_folder(folder: Path) -> datasets.DatasetDict:
    """The files of an imagefolder, in its order."""
    splits = {}
    for name, part in zip(("train", "validation"), list_imagefolder(folder), strict=True):
        paths = [Path(part.path(index)) for index in range(len(part))]
        content = {"label": part.labels, "image": [{"bytes": p.read_bytes(), "path": p.name} for p in paths]}
        features = {"label": datasets.ClassLabel(names=part.classes), "image": datasets.Image()}
        splits[name] = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    return datasets.DatasetDict(splits)


def save(splits: datasets.DatasetDict, destination: Path) -> Path:
    # The last output format is saved, too.
    splits.with_format("numpy").save_to_disk(destination)
    return destination


def write_parquet(splits: datasets.DatasetDict, destination: Path) -> Path:
    """Write the files as on the hub."""
    (destination / "data").mkdir(parents=True)
    for name, split in splits.items():
        for shard in range(2):
            part = split.shard(2, shard, contiguous=True)
            part.to_parquet(destination / f"data/{name}-{shard:05}-of-00002.parquet")
    return destination


WRITERS = (save, write_parquet)


def open_as(source: str, path: Path, on_bad_image: str = "skip", crop: str = "random_resized", **more: Any) -> Any:
    return open_datasets(source, path, image_size=16, crop=crop, flip=True, seed=7, on_bad_image=on_bad_image, **more)


@pytest.mark.parametrize("write", WRITERS)
def test_samples_are_bit_identical_to_the_folders(
    folder: Path, tmp_path: Path, write: Callable[[datasets.DatasetDict, Path], Path]
) -> None:
    path = write(of_folder(folder), tmp_path / "hub")
    for ours, theirs in zip(open_as("huggingface", path), open_as("imagefolder", folder), strict=True):
        assert len(ours) == len(theirs) == 4 + 13
        assert ours.class_names == theirs.class_names == ["c0", "kinds of images"]
        everything = range(len(theirs))
        assert [ours.file(index) for index in everything] == [theirs.file(index) for index in everything]
        for epoch in (None, 0, 5):
            mine, expected = (images[Keys(epoch, np.array(everything))] for images in (ours, theirs))
            for name in ("images", "labels", "weights", "mirrored"):
                assert torch.equal(getattr(mine, name), getattr(expected, name)), name
            assert len(mine.bad_images) == len(expected.bad_images)
    train, _ = open_as("huggingface", path, on_bad_image="stop")
    assert train.name(2) == f"{path}: train[2] (2.jpg)"
    with pytest.raises(BadImageError) as error:
        train[Keys(0, np.array([2]))]
    assert str(error.value).startswith(f"{path}: train[2] (2.jpg): not a readable image")


def test_workers_read_the_same_batches_as_from_the_folder(folder: Path, tmp_path: Path) -> None:
    path = save(of_folder(folder), tmp_path / "hub")
    ours = load(open_as("huggingface", path), workers=2)
    assert_same(ours, load(open_as("imagefolder", folder)))


@pytest.mark.slow
def test_run_from_parquet_equals_a_run_from_the_folder_and_resumes(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", images=12)
    hub = write_parquet(of_folder(images), tmp_path / "hub")

    def run(source: str, path: Path) -> list[float]:
        data = {"source": source, "path": str(path), "image_size": 32, "workers": 1}
        train_ok(
            *("--deepspeed_config", DIGITS, "--output", str(tmp_path / source)),
            *("--set=train_batch_size=8", "--set=recipe.model.num_classes=2", "--set=recipe.schedule.epochs=2"),
            *("--set=recipe.schedule.decay_epochs=[1]", "--set=recipe.schedule.warmup_epochs=0"),
            f"--set=recipe.data={json.dumps(data)}",
            HF_HOME=str(tmp_path / "home"),
        )
        return losses(tmp_path / source)

    expected = run("imagefolder", images)
    assert len(expected) == 6
    assert run("huggingface", hub) == expected
    shutil.rmtree(tmp_path / "huggingface/checkpoints/step-00000006")
    assert run("huggingface", hub) == expected


def test_a_share_of_each_class_is_held_out_by_row(tmp_path: Path) -> None:
    labels = [0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    rows(labels).save_to_disk(tmp_path / "hub")  # no DatasetDict
    train, validation = list_huggingface(str(tmp_path / "hub"), 0.3)
    order = sorted(range(len(labels)), key=lambda row: hashlib.sha256(str(row).encode()).digest())
    expected = [row for row in order if not labels[row]][:1] + [row for row in order if labels[row]][:3]
    assert validation.rows.tolist() == sorted(expected)
    assert sorted([*train.rows, *validation.rows]) == list(range(len(labels)))
    for part in (train, validation):
        assert part.labels.tolist() == [labels[row] for row in part.rows]


def test_a_plan_counts_without_torch_and_names_a_missing_package(tmp_path: Path) -> None:
    hub = write_parquet(datasets.DatasetDict(train=rows([0, 1, 1, 1]), validation=rows([0, 1])), tmp_path / "hub")
    found = look("huggingface", str(hub))
    assert (found.classes, found.train_images, found.validation_images) == ((("cat", 1), ("dog", 3)), 4, 2)
    plan = ("-m", "recipe", "plan", DIGITS, "--set=train_batch_size=4", "--data", str(hub))
    plan += (f"--set=recipe.data={json.dumps({'source': 'huggingface', 'image_size': 32, 'path': 'x'})}",)
    done = without_torch(tmp_path, *plan, "--set=recipe.model.num_classes=2", HF_HOME=str(tmp_path / "home"))
    assert "4 training images, 2 for validation; 1 (cat) to 3 (dog)" in " ".join(done.stdout.split()), done.stderr
    (tmp_path / "stubs/datasets.py").write_text("raise ImportError('No module named pyarrow')")
    done = without_torch(tmp_path, *plan, "--set=recipe.model.num_classes=2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"recipe.data.path: {hub} is read by the package datasets, which cannot be imported (No module named pyarrow); "
        "pip install datasets"
    )


def test_a_name_without_a_folder_is_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^there is no folder own/cats, nor can this name be loaded from the hub: "):
        list_huggingface("own/cats")
    with pytest.raises(ValueError, match=r"^there is no folder cats; a data set on the hub is called owner/name$"):
        list_huggingface("cats")
    splits = datasets.DatasetDict(train=rows([0, 1, 1]), test=rows([0, 1]))
    monkeypatch.setattr(datasets, "load_dataset", {"own/cats": splits}.__getitem__)
    assert [len(part) for part in list_huggingface("own/cats")] == [3, 2]
    assert len(open_validation("own/cats", image_size=16, crop="none", on_bad_image="skip")) == 2
    assert data_name("huggingface", "own/cats") == "own/cats"
    (tmp_path / "own/cats").mkdir(parents=True)
    assert data_name("huggingface", "own/cats") == data_name("imagefolder", "/own/cats/") == "cats"
    assert data_name("digits", None) == "digits"


def test_evaluation_uses_the_held_out_split_or_the_only_one(folder: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"image_size": 16, "crop": "none", "on_bad_image": "skip"}
    splits = of_folder(folder)
    splits["train"].select([0]).save_to_disk(tmp_path / "one")
    assert open_validation(tmp_path / "one", **common).name(0) == f"{tmp_path}/one: train[0] (0.jpg)"
    for write in WRITERS:
        path = write(splits, tmp_path / write.__name__)
        assert probe.data(str(path)) == {"classes": 2, "train_images": 17, "validation_images": 17}
        assert open_validation(path, **common).name(0) == f"{path}: validation[0] (0.jpg)"
        held_out = open_validation(path, "huggingface", **common)
        assert np.array_equal(held_out.labels, splits["validation"].with_format(None)["label"][:])


def test_an_image_can_be_a_separate_file_or_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"image_size": 16, "crop": "none", "on_bad_image": "stop"}
    named = open_validation(folder, "huggingface", **common)  # datasets lists a folder of images, too
    files = sorted(path.read_bytes() for path in (folder / "val").glob("*/*"))
    assert sorted(map(named.file, range(len(named)))) == files
    bad = [
        (None, r"train\[0\]: not a readable image \(the file is empty\)"),
        (
            {"bytes": None, "path": "a\0b.jpg"},
            r"train\[1\] \(a\\u0000b.jpg\): not a readable image \(embedded null byte\)",
        ),
    ]
    features = rows([]).features
    images = {"image": [image for image, _ in bad], "label": [0, 1]}
    splits = {"train": datasets.Dataset.from_dict(images, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", {"own/odd": splits}.__getitem__)
    ours = open_validation("own/odd", **common)
    for index, (_, message) in enumerate(bad):
        with pytest.raises(BadImageError, match=message):
            ours.image(index)
        with pytest.raises(BadImageError, match=message):  # as a worker that leaves JPEGs to the device reads it
            EncodedImages(ours, lambda *_: [], CPU)[Keys(None, np.array([index]))]


REFUSED: list[tuple[dict[str, datasets.Dataset], float | None, str]] = [
    ({"validation": rows([0])}, None, r" has no split train, only validation$"),
    ({"train": rows([0])}, None, r" has no split validation or val or test; set recipe.data.validation_share to 0.1$"),
    ({"train": rows([0]), "test": rows([0])}, 0.1, r" has a split test; remove recipe.data.validation_share$"),
    ({"train": rows([0, 1, 1])}, 0.5, r": train has a single image of cat, which cannot be split; add some$"),
    (
        {"train": rows([0, 1]), "test": rows([-1, -1])},
        None,
        r": 2 of the 2 images of the split test have no class: their label is not from 0 to 1",
    ),
    ({"train": rows([0, None, 1]), "test": rows([0])}, None, r": 1 of the 3 images of the split train have no class"),
    (
        {"train": rows([0], mask=datasets.Image()), "test": rows([0])},
        None,
        r": the split train has 2 columns \(image, mask\) of type Image, but needs exactly one; its columns are ",
    ),
    (
        {"train": rows([0]).remove_columns("label"), "test": rows([0])},
        None,
        r": the split train has no column of type ClassLabel, but needs exactly one; its columns are image; ",
    ),
    (
        {"train": rows([0]), "test": rows([0], names=("dog", "cat"))},
        None,
        r": the classes of the splits train and test differ, in names or in order$",
    ),
]


@pytest.mark.parametrize(("splits", "share", "message"), REFUSED)
def test_unsuitable_data_sets_are_refused(
    tmp_path: Path, splits: dict[str, datasets.Dataset], share: float | None, message: str
) -> None:
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    with pytest.raises(ValueError, match=rf"^recipe\.data\.path: {tmp_path}/hub{message}") as error:
        open_as("huggingface", tmp_path / "hub", validation_share=share)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    saved = save(datasets.DatasetDict(train=rows([0]), test=rows([0])), tmp_path / "saved")
    arrow = saved / "train/data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    for path in (saved, tmp_path / "empty"):
        with pytest.raises(ValueError, match=rf"^{path}: ") as error:
            list_huggingface(str(path))
        assert "\n" not in str(error.value)
