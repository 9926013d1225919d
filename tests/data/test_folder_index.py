import hashlib
import os
import random
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder, folder as torchvision_folder

from recipe.data import folder_index
from recipe.data.folder_index import FolderIndex, index_folder, list_imagefolder
from tests.data.images import write_folder

# Spaces, line breaks, other alphabets, bytes that are no UTF-8 (as Python names them), hidden, and nearly an image.
NAMES = [
    "a",
    "B",
    "ä ö",
    "日本",
    "new\nline",
    "\udcff\udc80",
    "z\udcc3",
    "-rf",
    "a-b",
    "a.b",
    "~",
    "'\"",
    "😀",
    "0 1",
    "._x",
]
ENDINGS = [".jpg", ".JPEG", ".png", ".webp", ".txt", ".jpg.txt", ""]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Keep indices in an empty folder, of small folders too, and of such as have just been made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(folder_index, "SMALLEST_KEPT_IMAGES", 0)
    monkeypatch.setattr(folder_index, "SETTLED_SECONDS", -60)
    return tmp_path / "caches" / "large-batch-recipe"


@pytest.fixture
def scans(monkeypatch):
    """The folders that are scanned."""
    scanned, scan = [], folder_index.scan

    def counting(root):
        scanned.append(root)
        return scan(root)

    monkeypatch.setattr(folder_index, "scan", counting)
    return scanned


def content(index: FolderIndex):
    return index.classes, [(index.path(number), label) for number, label in enumerate(index.labels.tolist())]


def torchvisions(root):
    """What torchvision finds, but for what is hidden, and for what it finds again in a circle of links."""

    def is_shown(path):
        path = path.removeprefix(str(root))
        return "/." not in path and "/circle/" not in path

    folder = ImageFolder(root, allow_empty=True)
    classes = [name for name in folder.classes if not name.startswith(".")]
    names = folder.classes
    return classes, [(path, classes.index(names[label])) for path, label in folder.samples if is_shown(path)]


def some_folder(root: Path, dice: random.Random) -> Path:
    """Folders within folders, files of odd names, and links: to files, to folders, to nowhere, in a circle."""
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


def test_scan_and_cache_give_what_torchvision_finds(tmp_path, scans):
    for seed in range(20):
        root = str(some_folder(tmp_path / str(seed) / "images", random.Random(seed)))
        expected = torchvisions(root)
        assert content(index_folder(root)) == expected, seed
        kept = index_folder(root)
        assert content(kept) == expected, seed
        assert len(kept) == len(expected[1])
        assert kept.labels.dtype == kept.counts.dtype == np.int64
        assert scans == [root], seed
        scans.clear()


def test_hidden_files_do_not_count_and_files_of_other_kinds_are_counted(tmp_path, scans):
    root = tmp_path / "images"
    for file in (
        *("a/1.jpg", "a/2.JPG", "b/1.webp"),
        *("a/._1.jpg", "b/.DS_Store", "b/.x/1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", ".cache/a/1.jpg"),
        *("a/1.gif", "b/2.GIF", "b/deep/er/3.gif", "a/1.heic", "a/1.jpg.txt", "b/2.tar.txt", "a/README", "b/dot."),
        *("outside.gif", "1.jpg"),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    for _ in range(2):
        index = index_folder(str(root))
        assert content(index) == (
            ["a", "b"],
            [(f"{root}/{x}", "ab".index(x[0])) for x in ("a/1.jpg", "a/2.JPG", "b/1.webp")],
        )
        assert list(index.left_out.items()) == [(".gif", 3), (".txt", 2), ("", 1), (".", 1), (".heic", 1)]
    assert len(scans) == 1


def test_it_takes_the_extensions_of_torchvision_and_does_not_import_it():
    assert folder_index.IMG_EXTENSIONS == torchvision_folder.IMG_EXTENSIONS
    program = "import recipe.data.folder_index, sys; print([name for name in sys.modules if name.startswith('torch')])"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


def test_links_in_a_circle_are_followed_once(tmp_path):
    make(tmp_path / "images")
    root = tmp_path / "images"
    for link, target in (("a/circle", "a"), ("a/deep/er/up", "a/deep"), ("a/root", "."), ("b/itself", "b/itself")):
        (root / link).symlink_to(root / target)
    # From one class into the other and back: the images of both are in each, but no image is twice in one.
    (root / "a/to b").symlink_to(root / "b")
    (root / "b/to a").symlink_to(root / "a")
    found = [path.removeprefix(f"{root}/") for path, _ in content(index_folder(str(root)))[1]]
    of_a = ["1.jpg", "2.jpg", "deep/er/3.jpg"]
    assert found == [
        *(f"a/{path}" for path in (*of_a, "to b/1.jpg")),
        *(f"b/{path}" for path in ("1.jpg", *(f"to a/{path}" for path in of_a))),
        "linked/1.jpg",
    ]


def test_what_is_no_file_is_refused_by_name_and_a_link_to_nowhere_is_left_to_the_reader(tmp_path):
    write_folder(tmp_path)
    image = tmp_path / "val/c1/new\nline.jpg"
    refusal = re.escape(f"{tmp_path}/val/c1/new\\u000aline.jpg: not a regular file; remove it")
    for make_it in (
        lambda: os.mkfifo(image),
        lambda: os.mknod(image, stat.S_IFSOCK),
        lambda: image.symlink_to("/dev/zero"),
    ):
        make_it()
        with pytest.raises(ValueError, match=f"^{refusal}$"):
            list_imagefolder(tmp_path)
        image.unlink()
    image.symlink_to("nowhere")
    assert (str(image), 1) in content(list_imagefolder(tmp_path)[1])[1]


def make(root: Path) -> None:
    for file in ("a/1.jpg", "a/2.jpg", "a/deep/er/3.jpg", "b/1.jpg", "b/notes.txt"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (root / "a/empty").mkdir()
    for elsewhere in ("disk", "other disk"):
        (root.parent / elsewhere).mkdir()
        (root.parent / elsewhere / "1.jpg").touch()
    (root / "linked").symlink_to(root.parent / "disk")
    (root / "unmounted").symlink_to(root.parent / "unmounted")
    (root / "b/unmounted").symlink_to(root.parent / "unmounted too")


def keep_times(root: Path) -> None:
    """Change a name and set the folder's time back, as tar and rsync do."""
    status = os.stat(root / "a")
    (root / "a/2.jpg").rename(root / "a/3.jpg")
    os.utime(root / "a", ns=(status.st_atime_ns, status.st_mtime_ns))


def link_anew(root: Path) -> None:
    (root / "linked").unlink()
    (root / "linked").symlink_to(root.parent / "other disk")


def mount(folder: Path) -> None:
    folder.mkdir()
    (folder / "1.jpg").touch()


def make_folder_of_image(root: Path) -> None:
    (root / "a/2.jpg").unlink()
    mount(root / "a/2.jpg")


CHANGES = {
    "a file comes": lambda root: (root / "b/2.jpg").touch(),
    "a file goes": lambda root: (root / "a/2.jpg").unlink(),
    "a file is renamed": lambda root: (root / "a/2.jpg").rename(root / "a/0.jpg"),
    "a file moves to another class": lambda root: (root / "a/2.jpg").rename(root / "b/2.jpg"),
    "deep down": lambda root: (root / "a/deep/er/4.jpg").touch(),
    "in a folder that was empty": lambda root: (root / "a/empty/4.jpg").touch(),
    "a class comes": lambda root: (root / "c").mkdir(),
    "a class is renamed": lambda root: (root / "a").rename(root / "c"),
    "behind a link": lambda root: (root.parent / "disk/2.jpg").touch(),
    "a link leads elsewhere": link_anew,
    "a link's folder comes": lambda root: mount(root.parent / "unmounted"),
    "a deep link's folder comes": lambda root: mount(root.parent / "unmounted too"),
    "a link's folder goes": lambda root: (root.parent / "disk").rename(root.parent / "gone"),
    "an image becomes a folder": make_folder_of_image,
    "times are set back": keep_times,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_names_is_seen(tmp_path, scans, change):
    root = tmp_path / "images"
    make(root)
    before = content(index_folder(str(root)))
    (root / "a/1.jpg").write_bytes(b"another image of the same name")
    assert content(index_folder(str(root))) == before
    assert len(scans) == 1
    time.sleep(0.02)  # more than the granularity of the times
    CHANGES[change](root)
    for _ in range(2):
        assert content(index_folder(str(root))) == torchvisions(root)
    assert len(scans) == 2


def test_the_name_of_the_folder_is_the_callers(tmp_path, scans, monkeypatch):
    make(tmp_path / "images")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    for root in ("images", "link", str(tmp_path / "images")):
        assert content(index_folder(root)) == torchvisions(root)
    assert scans == ["images"]
    # Another host may have another disk at that path.
    monkeypatch.setattr(folder_index.socket, "gethostname", lambda: "node-1")
    index_folder("images")
    assert len(scans) == 2


def test_only_a_folder_at_rest_is_kept_and_only_a_large_one_and_by_one_rank(tmp_path, monkeypatch, caches):
    root = tmp_path / "images"
    make(root)
    changed = max(os.stat(folder).st_ctime_ns for folder, _, _ in os.walk(root, followlinks=True))
    monkeypatch.setattr(folder_index, "SETTLED_SECONDS", 2.0)

    def is_kept(seconds_later: float) -> bool:
        monkeypatch.setattr(folder_index.time, "time_ns", lambda: changed + int(seconds_later * 1e9))
        index_folder(str(root))
        return caches.is_dir() and any(caches.iterdir())

    assert not is_kept(1.99)
    monkeypatch.setattr(folder_index, "SMALLEST_KEPT_IMAGES", 7)
    assert len(index_folder(str(root))) == 6 - 1
    assert not is_kept(3)
    monkeypatch.setattr(folder_index, "SMALLEST_KEPT_IMAGES", 5)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_kept(3)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert is_kept(3)


def test_what_is_damaged_or_something_else_is_made_anew(tmp_path, caches):
    root = tmp_path / "images"
    make(root)
    expected = content(index_folder(str(root)))
    (kept,) = caches.iterdir()
    (plain := tmp_path / "plain").touch()
    assert kept.stat().st_mode == plain.stat().st_mode
    good = kept.read_bytes()
    flips = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(0, len(good), 8)]
    cuts = [good[:length] for length in range(0, len(good), 100)]
    for bad in (*flips, *cuts, b"no index\n", bytes(len(good))):
        kept.write_bytes(bad)
        assert content(index_folder(str(root))) == expected
    assert kept.read_bytes() == good

    np.save(tmp_path / "objects.npy", np.array([Path("x")], object))
    (tmp_path / "objects.npy").replace(kept)
    assert content(index_folder(str(root))) == expected
    assert kept.read_bytes() == good
    kept.unlink()
    kept.mkdir()
    assert content(index_folder(str(root))) == expected
    assert list(caches.iterdir()) == [kept]


def test_without_a_place_to_keep_it_a_folder_is_scanned_each_time(tmp_path, scans, monkeypatch):
    root = tmp_path / "images"
    make(root)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert content(index_folder(str(root))) == torchvisions(root)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert content(index_folder(str(root))) == torchvisions(root)
    assert len(scans) == 3


def test_many_at_once_do_not_disturb_each_other(tmp_path, caches):
    root = tmp_path / "images"
    make(root)
    expected, wrong = torchvisions(root), []

    def work(number: int) -> None:
        for turn in range(20):
            if turn % 8 == number:
                for kept in caches.glob("*.npz"):
                    kept.unlink(missing_ok=True)
            found = content(index_folder(str(root)))
            if found != expected:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path.suffix for path in caches.iterdir()] == [".npz"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    for part in ("train", "val"):
        make(tmp_path / part / "images")
    scandir = os.scandir

    def locked(path):
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    root = tmp_path / "train"
    with pytest.raises(ValueError, match=f"^{root} cannot be listed: .*Permission denied: '{root}/images/a/deep'$"):
        list_imagefolder(tmp_path)


def test_a_share_of_each_class_is_held_out_by_the_names_alone(tmp_path):
    def images(count: int, name: str) -> list[str]:
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number}.png").touch()
        return [f"{name}/{number}.png" for number in range(count)]

    names = {"cat": images(20, "cat"), "dog": images(3, "dog")}
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
    # The same folder elsewhere, as another host mounts it, is split alike.
    os.rename(tmp_path / "data", tmp_path / "train")
    again = list_imagefolder(tmp_path, 0.1)[1]
    assert {os.path.relpath(again.path(index), tmp_path / "train") for index in range(3)} == by_hand

    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"val is there; remove recipe\.data\.validation_share"):
        list_imagefolder(tmp_path, 0.1)
    (tmp_path / "val").rmdir()
    (tmp_path / "train/owl").mkdir()
    (tmp_path / "train/owl/0.png").touch()
    with pytest.raises(ValueError, match="holds a single image of owl, which cannot be split"):
        list_imagefolder(tmp_path, 0.1)


def test_a_link_to_a_folder_above_the_classes_is_not_followed(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/c0/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "train/c0/over").symlink_to("/", target_is_directory=True)
    (tmp_path / "train/c9").symlink_to(tmp_path, target_is_directory=True)
    index, _ = folder_index.scan(str(tmp_path / "train"))
    assert index.classes == ["c0", "c1"]
    assert index.counts.tolist() == [3, 3]
