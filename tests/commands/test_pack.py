"""``python -m recipe pack``: the files it writes, how it resumes, and its refusals."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from recipe.commands.compare import main as compare
from recipe.commands.hosts import format_table
from recipe.commands.hosts.probe import data as count_data
from recipe.commands.hosts.visit import Host
from recipe.commands.pack import command, main, shards as pack_shards
from recipe.commands.pack.command import pack
from recipe.data import open_datasets
from tests.data.images import picture, sample, write_folder
from tests.launch import DIGITS, ROOT, environment, train_ok, wait_until


@pytest.fixture(autouse=True)
def _default_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """``main`` blocks signals, and the processes that later tests start would inherit that."""
    monkeypatch.setattr("recipe.commands.pack.listen", lambda: None)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "recipe", "pack", *map(str, arguments)]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_shards, "SMALLEST_SHARD_BYTES", 8192)


@pytest.mark.usefixtures("small_shards")
def test_tar_and_dali_index_hold_every_image_and_label(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", classes=12, images=2)
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    shards = sorted((tmp_path / "pack/train").glob("*.tar"))
    assert len(shards) > 3
    members, indexed = [], []
    for shard in shards:
        with tarfile.open(shard) as archive:
            members += [(member.name, archive.extractfile(member).read()) for member in archive]
        version, *lines = shard.with_suffix(".idx").read_text().splitlines()
        assert version == f"v1.2 {len(lines)}"
        for line in lines:
            image, label = line.split()[:4], line.split()[4:]
            for kind, offset, size, name in (image, label):
                assert name.partition(".")[2] == kind
                indexed.append((name, shard.read_bytes()[int(offset) : int(offset) + int(size)]))
    expected = []
    for index, (path, label) in enumerate(ImageFolder(tmp_path / "images/train").samples):
        expected += [(f"{index:08}.jpg", Path(path).read_bytes()), (f"{index:08}.cls", str(label).encode())]
    assert members == expected
    assert indexed == expected


@pytest.mark.parametrize("raw", [False, True])
def test_larger_images_are_resized_to_the_short_side_as_by_torchvision(tmp_path: Path, raw: bool) -> None:
    write_folder(tmp_path / "images")
    originals = {"cmyk": picture(1, 90, 61, "CMYK"), "grey": picture(2, 61, 90, "L"), "png": picture(3, 70, 70)}
    for kind, image in originals.items():
        image.save(tmp_path / f"images/train/c0/{kind}.jpg", "PNG" if kind == "png" else "JPEG", quality=95)
    assert pack(tmp_path / "images", tmp_path / "pack", 48, raw=raw) == 0
    resized, _ = open_datasets("pack", tmp_path / "pack", image_size=16, crop="none", flip=False, seed=0)
    whole, _ = open_datasets("imagefolder", tmp_path / "images", image_size=16, crop="none", flip=False, seed=0)
    for index in range(len(whole)):
        image = Image.fromarray(whole.image(index).pixels.numpy())
        expected = functional.pil_to_tensor(functional.resize(image, 48) if min(image.size) > 48 else image)
        pixels = resized.image(index).pixels.movedim(-1, 0)
        assert pixels.shape == expected.shape
        # 30 × 40 is unchanged; re-encoded images differ by the loss of a JPEG of quality 92.
        difference = float((pixels.int() - expected.int()).abs().float().mean())
        assert difference == 0 if raw or min(image.size) <= 48 else 0 < difference < 3
    header = json.loads((tmp_path / "pack/pack.json").read_text())
    assert header["making"]["short_side"] == 48
    assert (header["train"]["resized"], header["validation"]["resized"]) == (3, 0)
    (index,) = (index for index in range(len(whole)) if whole.name(index).endswith("cmyk.jpg"))
    extract = ["tar", "xOf", tmp_path / "pack/train/00000.tar", f"{index:08}.{'npy' if raw else 'jpg'}"]
    member = io.BytesIO(subprocess.run(extract, capture_output=True, check=True).stdout)
    if raw:
        assert np.array_equal(np.load(member, allow_pickle=False), resized.image(index).pixels)
    else:
        with Image.open(member) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (70, 48), "RGB")


@pytest.mark.usefixtures("small_shards")
def test_damaged_shard_of_an_earlier_launch_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a pack depend neither on that nor on the number of processes."""
    write_folder(tmp_path / "images", classes=4, images=5)
    assert pack(tmp_path / "images", tmp_path / "undisturbed", 20, workers=1) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "_index", None)
        with pytest.raises(TypeError):
            pack(tmp_path / "images", tmp_path / "pack", 20, workers=3)
    shards = sorted((tmp_path / "pack/train").glob("*.tar"))
    content = bytearray(shards[1].read_bytes())
    content[700] ^= 1
    shards[1].write_bytes(content)
    before = [shard.stat().st_ino for shard in shards]
    assert pack(tmp_path / "images", tmp_path / "pack", 20, workers=3) == 0
    assert contents(tmp_path / "pack") == contents(tmp_path / "undisturbed")
    kept = [shard.stat().st_ino == inode for shard, inode in zip(shards, before, strict=True)]
    assert kept[:3] == [True, False, True]


def start_large_pack(tmp_path: Path) -> tuple[Path, subprocess.Popen[str]]:
    """A folder of 3,012 images, and a process that has packed the first of its two parts."""
    images = write_folder(tmp_path / "images")
    for number in range(3_000):
        os.link(images / "val/c0/0.jpg", images / f"val/c1/again-{number}.jpg")
    process = start(images, tmp_path / "pack", start_new_session=True)
    wait_until((tmp_path / "pack/.unfinished/train-00000.json").exists)
    return images, process


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]])
def test_interrupted_pack_resumes(tmp_path: Path, signals: list[signal.Signals]) -> None:
    images, process = start_large_pack(tmp_path)
    for signum in signals:
        if signum == signal.SIGKILL:
            os.kill(process.pid, signum)
        else:  # Ctrl-C at a terminal reaches the packing processes, too
            os.killpg(process.pid, signum)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    if signals == [signal.SIGKILL]:
        assert process.returncode == -9
    else:  # either can be taken first
        heard = {143: "SIGTERM", 130: "SIGINT"}[process.returncode]
        assert said == f"recipe: {heard}: ended at once; the same command resumes\n"
    wait_until(lambda: not group(process.pid))
    assert not (tmp_path / "pack/pack.json").exists()
    with pytest.raises(ValueError, match="is not a complete pack"):
        open_datasets("pack", tmp_path / "pack", image_size=16, crop="none", flip=False, seed=0)
    first = (tmp_path / "pack/train/00000.tar").stat()
    assert pack(images, tmp_path / "pack", 0) == 0
    assert (tmp_path / "pack/train/00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert pack(images, tmp_path / "undisturbed", 0) == 0
    assert contents(tmp_path / "pack") == contents(tmp_path / "undisturbed")


def test_killed_packing_process_is_reported_on_one_line(tmp_path: Path) -> None:
    _, process = start_large_pack(tmp_path)
    # The packing processes are children of the fork server, which is a child of the command.
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
    parents = {pid: parent for pid, parent, leader in rows if leader == process.pid}
    for pid, parent in parents.items():
        if parents.get(parent) == process.pid:
            os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == "recipe: a packing process was killed (out of memory?); the same command resumes\n"


def group(leader: int) -> list[str]:
    """The processes of a group, without zombies."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(leader) and not line.split()[1].startswith("Z")]


def test_bad_images_are_listed_and_keep_their_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "images")
    (tmp_path / "images/train/c0/1.jpg").write_text("no image")
    (tmp_path / "images/val/c1/new\nline.jpg").write_bytes(b"")
    for number, words in enumerate(([], ["--short-side=20"], ["--short-side=20", "--raw"])):
        destination = tmp_path / f"{number}"
        assert main([str(tmp_path / "images"), str(destination), *words]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "bad image: train/c0/1.jpg: cannot identify image file"
        assert printed[1] == "bad image: val/c1/new\\u000aline.jpg: the file is empty"
        assert printed[2].endswith("2 bad")
        header = json.loads((destination / "pack.json").read_text())
        assert [image["name"] for image in header["train"]["bad_images"]] == ["train/c0/1.jpg"]
        train, _ = open_datasets(
            "pack", destination, image_size=16, crop="none", flip=False, seed=0, on_bad_image="skip"
        )
        assert sample(train, (0, 1)).bad_image == f"{destination}/train/00000.tar: train/c0/1.jpg"
        assert torch.equal(sample(train, (0, 1)).image, sample(train, (0, 2)).image)


def test_verify_finds_a_flipped_bit_and_a_wrong_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "images")
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    assert main(["--verify", str(tmp_path / "pack")]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'pack'}: all 8 files are intact\n")
    header = tmp_path / "pack/pack.json"
    text = header.read_text()
    header.write_text(text.replace('"images": 6', '"images": 7'))
    assert main(["--verify", str(tmp_path / "pack")]) == 1
    assert f"damaged: {tmp_path}/pack/train/images.npy: not the index of the 7 images of 2" in capsys.readouterr().out
    header.write_text(text)
    shard = tmp_path / "pack/val/00000.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["--verify", str(tmp_path / "pack")]) == 1
    assert f"damaged: {shard}: its SHA-256 differs from the original's\n" in capsys.readouterr().out
    assert main(["--verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"recipe: {tmp_path} is not a complete pack, which has a pack.json; create one with python -m recipe pack\n"
    )


def test_complete_pack_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(write_folder(tmp_path / "images")), str(tmp_path / "pack")]
    assert main(words) == 0
    shards = [tmp_path / "pack" / part / "00000.tar" for part in ("train", "val")]
    size = sum(shard.stat().st_size for shard in shards) / 2**20
    assert f"2 shards, {size:.2f} MiB; 0 images" in capsys.readouterr().out
    before = contents(tmp_path / "pack")
    assert main(words) == 0
    assert "is already complete" in capsys.readouterr().out
    assert main([*words, "--short-side", "20"]) == 2
    assert capsys.readouterr().err == (
        f"recipe: {words[1]} is a pack with short_side 0, not 20; name another DST, or remove this one\n"
    )
    picture(9).save(tmp_path / "images/train/c0/0.jpg")
    assert main(words) == 2
    assert "is a pack of other files than are in SRC now" in capsys.readouterr().err
    assert contents(tmp_path / "pack") == before


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("nowhere", "pack", "there is no folder {root}/nowhere; it should contain train/ and val/"),
        ("images", ".", "DST {root} holds file, images, link, and no pack; name a new or empty folder"),
        ("images", "link/pack", "DST {root}/link/pack is inside SRC {root}/images; name a folder outside of it"),
        ("images", "file", "DST {root}/file: {root}/file is not a folder; remove it, or name another folder"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, destination: str, message: str
) -> None:
    write_folder(tmp_path / "images")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("images")
    assert main([str(tmp_path / source), str(tmp_path / destination)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("recipe: " + message.format(root=tmp_path))
    assert said.count("\n") == 1
    assert not (tmp_path / "images/pack").exists()


@pytest.mark.parametrize(
    "words",
    ["", "a", "a b --short-side 7", "a b --raw", "a b --verify c", "--short-side 9", "--verify c --raw"],
)
def test_contradicting_options_are_refused(words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())


def test_unreadable_file_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "images")
    gone = tmp_path / "images/train/c0/link.jpg"
    gone.symlink_to("nowhere")
    assert main([str(tmp_path / "images"), str(tmp_path / "pack")]) == 2
    assert capsys.readouterr().err == f"recipe: {gone}: No such file or directory; fix or remove it\n"


def test_full_disk_is_reported_and_the_same_command_resumes(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", images=40)
    limit = (20_000, 20_000)
    process = start(images, tmp_path / "pack", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said == f"recipe: {tmp_path / 'pack'}: File too large; fix that, and the same command resumes\n"
    assert pack(images, tmp_path / "pack", 0) == 0


def test_hosts_command_counts_the_images_of_a_pack(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    counts = {"classes": 2, "train_images": 6, "validation_images": 6}
    assert count_data(str(tmp_path / "images"), None) == counts
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    found = count_data(str(tmp_path / "pack"), None)
    assert found == counts | {"pack": found["pack"]} == count_data(str(tmp_path / "pack"), "pack")
    assert f"2 classes, 6 + 6 images in pack {found['pack'][:8]}" in format_table([Host("node", 1, {"data": found})])
    with pytest.raises(ValueError, match="is not a complete pack"):
        count_data(str(tmp_path / "images"), "pack")
    with pytest.raises(ValueError, match=r"is a pack of short side 0, but recipe\.data\.pack_short_side = 352"):
        count_data(str(tmp_path / "pack"), "pack", pack_short_side=352)


@pytest.mark.slow
def test_training_from_a_pack_is_bit_identical_to_training_from_the_folder(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", images=12)
    assert pack(images, tmp_path / "pack", 0) == 0
    for source, path in (("imagefolder", images), ("pack", tmp_path / "pack")):
        data = {"source": source, "path": str(path), "image_size": 32, "train_images": 24, "validation_images": 24}
        train_ok(
            *("--deepspeed_config", DIGITS, "--output", str(tmp_path / source)),
            *("--set=train_batch_size=8", "--set=recipe.model.num_classes=2", "--set=recipe.schedule.epochs=2"),
            *("--set=recipe.schedule.decay_epochs=[1]", "--set=recipe.schedule.warmup_epochs=0"),
            f"--set=recipe.data={json.dumps(data | {'workers': 1, 'on_device': source == 'imagefolder'})}",
        )
    assert compare([str(tmp_path / "imagefolder"), str(tmp_path / "pack")]) == 0


def test_images_too_large_or_too_long_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 × 80,000 pixels would be resized to 256 × 68,266, which no JPEG can have."""
    source = write_folder(tmp_path / "source")
    Image.new("L", (300, 80_000), 77).save(source / "val/c0/long.png")
    Image.new("1", (14_000, 14_000)).save(source / "train/c0/large.png")
    monkeypatch.setattr(sys, "argv", ["recipe"])  # the packing processes import this, not pytest
    assert main([str(source), str(tmp_path / "pack"), "--short-side", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kept as it is: val/c0/long.png: 68,266 pixels are too long for a JPEG" in lines
    assert "bad image: train/c0/large.png: it has more than 178,956,970 pixels, PIL's limit; shrink it" in lines
    assert "0 images resized, 1 bad" in lines[-2]
    _, held_out = open_datasets(
        "pack", tmp_path / "pack", image_size=16, crop="none", flip=False, seed=0, pack_short_side=256
    )
    shapes = {held_out.name(index): held_out.image(index).pixels for index in range(len(held_out))}
    (long,) = (pixels for name, pixels in shapes.items() if name.endswith("long.png"))
    assert long.shape == (80_000, 300, 3)
