import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder, folder as torchvision_folder

from recipe.data import IMG_EXTENSIONS, FolderIndex, index_folder, list_imagefolder

# Spaces, line breaks, other alphabets, bytes that are not UTF-8 (as Python represents them), and a hidden name.
NAMES = ["a", "B", "ä ö", "日本", "new\nline", "\udcff\udc80", "z\udcc3", "-rf", "a.b", "'\"", "😀", "0 1", "._x"]
ENDINGS = [".jpg", ".JPEG", ".png", ".webp", ".txt", ".jpg.txt", ""]


def content(index: FolderIndex):
    return index.classes, [(index.path(number), label) for number, label in enumerate(index.labels.tolist())]


def torchvisions(root):
    """The images that torchvision finds, except hidden ones and those found again through a circular link."""

    def is_shown(path):
        path = path.removeprefix(str(root))
        return "/." not in path and "/circle/" not in path

    folder = ImageFolder(root, allow_empty=True)
    classes = [name for name in folder.classes if not name.startswith(".")]
    names = folder.classes
    return classes, [(path, classes.index(names[label])) for path, label in folder.samples if is_shown(path)]


def some_folder(root: Path, dice: random.Random) -> Path:
    """Nested folders, files with odd names, and links to files, to folders, to nowhere, and in a circle."""
    folders = [root / "class"]
    folders[0].mkdir(parents=True)
    for _ in range(dice.randint(3, 12)):
        folder = dice.choice([root, *folders]) / dice.choice(NAMES)
        if not os.path.lexists(folder):
            folder.mkdir()
            folders.append(folder)
    for _ in range(dice.randint(5, 60)):
        file = dice.choice([root, *folders]) / (dice.choice(NAMES) + dice.choice(ENDINGS))
        if os.path.lexists(file):
            continue
        kind = dice.choice(["file"] * 8 + ["to a file", "to a folder", "to nowhere"])
        if kind == "file":
            file.touch()
        else:
            elsewhere = root.parent / f"elsewhere{dice.random()}"
            if kind == "to a folder":
                elsewhere.mkdir()
                (elsewhere / "x.jpg").touch()
            elif kind == "to a file":
                elsewhere.touch()
            file.symlink_to(elsewhere)
    if dice.random() < 0.2:
        (root / "class" / "circle").symlink_to(root / "class")
    return root


def test_the_images_are_torchvisions(tmp_path):
    for seed in range(20):
        root = str(some_folder(tmp_path / str(seed) / "images", random.Random(seed)))
        found = index_folder(root)
        assert content(found) == torchvisions(root), seed
        assert found.labels.dtype == found.counts.dtype == np.int64


def test_hidden_files_are_ignored_and_other_kinds_are_counted(tmp_path):
    root = tmp_path / "images"
    touch(
        root,
        *("a/1.jpg", "a/2.JPG", "b/1.webp"),
        *("a/._1.jpg", "b/.DS_Store", "b/.x/1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", ".cache/a/1.jpg"),
        *("a/1.gif", "b/2.GIF", "b/deep/er/3.gif", "a/1.heic", "a/1.jpg.txt", "b/2.tar.txt", "a/README", "b/dot."),
        *("outside.gif", "1.jpg"),
    )
    index = index_folder(str(root))
    images = ("a/1.jpg", "a/2.JPG", "b/1.webp")
    assert content(index) == (["a", "b"], [(f"{root}/{image}", "ab".index(image[0])) for image in images])
    assert list(index.left_out.items()) == [(".gif", 3), (".txt", 2), ("", 1), (".", 1), (".heic", 1)]


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def test_extensions_are_torchvisions_without_importing_it():
    assert IMG_EXTENSIONS == torchvision_folder.IMG_EXTENSIONS
    program = "import recipe.data.folder_index, sys; print([name for name in sys.modules if name.startswith('torch')])"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


def test_links_are_followed_except_to_a_folder_that_contains_them(tmp_path):
    root = tmp_path / "images"
    touch(root, "a/1.jpg", "a/deep/er/3.jpg", "b/1.jpg")
    touch(tmp_path, "disk/1.jpg")
    links = {"a/circle": "a", "a/deep/er/up": "a/deep", "a/root": ".", "a/above": "..", "b/itself": "b/itself"}
    # Links between two classes: each has the images of both, but none twice.
    for link, target in (links | {"above": "..", "a/to b": "b", "b/to a": "a", "linked": "../disk"}).items():
        (root / link).symlink_to(root / target)
    (root / "a/everything").symlink_to("/")
    found = [path.removeprefix(f"{root}/") for path, _ in content(index_folder(str(root)))[1]]
    assert found == [
        *("a/1.jpg", "a/deep/er/3.jpg", "a/to b/1.jpg"),
        *("b/1.jpg", "b/to a/1.jpg", "b/to a/deep/er/3.jpg"),
        "linked/1.jpg",
    ]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for part in ("train", "val"):
        touch(tmp_path / part, "images/a/deep/er/3.jpg")
    scandir = os.scandir

    def locked(path):
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    root = tmp_path / "train"
    with pytest.raises(ValueError, match=f"^{root} cannot be listed: .*Permission denied: '{root}/images/a/deep'$"):
        list_imagefolder(tmp_path)


def test_a_share_of_each_class_is_held_out_by_name_alone(tmp_path):
    names = {name: [f"{name}/{number}.png" for number in range(count)] for name, count in (("cat", 20), ("dog", 3))}
    touch(tmp_path / "data", *names["cat"], *names["dog"])
    train, validation = list_imagefolder(tmp_path / "data", 0.1)
    assert train.classes == validation.classes == ["cat", "dog"]
    assert (train.counts.tolist(), validation.counts.tolist()) == ([18, 2], [2, 1])
    held_out = {os.path.relpath(validation.path(index), tmp_path / "data") for index in range(3)}
    by_hand = {
        name
        for of_class, share in ((names["cat"], 2), (names["dog"], 1))
        for name in sorted(of_class, key=lambda one: hashlib.sha256(one.encode()).hexdigest())[:share]
    }
    assert held_out == by_hand
    trained = [os.path.relpath(train.path(index), tmp_path / "data") for index in range(20)]
    assert trained == [name for name in sorted(names["cat"]) + names["dog"] if name not in by_hand]
    assert train.labels.tolist() == [0] * 18 + [1] * 2
    # The same folder elsewhere, as mounted on another host, is split in the same way.
    os.rename(tmp_path / "data", tmp_path / "train")
    again = list_imagefolder(tmp_path, 0.1)[1]
    assert {os.path.relpath(again.path(index), tmp_path / "train") for index in range(3)} == by_hand

    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"val exists; remove recipe\.data\.validation_share"):
        list_imagefolder(tmp_path, 0.1)
    (tmp_path / "val").rmdir()
    touch(tmp_path / "train", "owl/0.png")
    with pytest.raises(ValueError, match="has a single image of owl, which cannot be split"):
        list_imagefolder(tmp_path, 0.1)
