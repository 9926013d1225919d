"""``python -m recipe pack``: what it writes, that a kill loses nothing, and what it refuses."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from recipe.commands.compare import main as compare
from recipe.commands.hosts.command import format_table
from recipe.commands.hosts.probe import data as count_data
from recipe.commands.hosts.visit import Host
from recipe.commands.pack import command, shards as pack_shards
from recipe.commands.pack.command import main, pack
from recipe.data import open_datasets
from tests.data.images import picture, sample, write_folder
from tests.launch import DIGITS, ROOT, environment, events, train_ok

READ = """
import json, sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    print(json.dumps([[member.name, archive.extractfile(member).read().hex()] for member in archive]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the lock."""
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
def test_tar_and_dalis_index_give_every_image_and_label(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", classes=12, images=2)
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    shards = sorted((tmp_path / "pack/train").glob("*.tar"))
    assert len(shards) > 3
    members, indexed = [], []
    for shard in shards:
        read = subprocess.run([sys.executable, "-c", READ, shard], capture_output=True, text=True, check=True)
        members += [(name, bytes.fromhex(content)) for name, content in json.loads(read.stdout)]
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
def test_a_short_side_resizes_what_is_larger_as_torchvision_does(tmp_path: Path, raw: bool) -> None:
    write_folder(tmp_path / "images")
    originals = {"cmyk": picture(1, 90, 61, "CMYK"), "grey": picture(2, 61, 90, "L"), "png": picture(3, 70, 70)}
    for kind, image in originals.items():
        image.save(tmp_path / f"images/train/c0/{kind}.jpg", "PNG" if kind == "png" else "JPEG", quality=95)
    assert pack(tmp_path / "images", tmp_path / "pack", 48, raw=raw) == 0
    resized, _ = open_datasets("pack", tmp_path / "pack", 16, "none", False, 0, "stop")
    whole, _ = open_datasets("imagefolder", tmp_path / "images", 16, "none", False, 0, "stop")
    for index in range(len(whole)):
        image = Image.fromarray(whole.image(index).pixels.numpy())
        expected = functional.pil_to_tensor(functional.resize(image, 48) if min(image.size) > 48 else image)
        pixels = resized.image(index).pixels.movedim(-1, 0)
        assert pixels.shape == expected.shape
        # 30 × 40 stays as it is; what is encoded anew differs by what a JPEG of quality 92 loses.
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
@pytest.mark.parametrize("raw", [False, True])
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, raw: bool) -> None:
    write_folder(tmp_path / "images", classes=4, images=5)
    for workers in (1, 3):
        assert pack(tmp_path / "images", tmp_path / f"by {workers}", 20, workers, raw=raw) == 0
    assert contents(tmp_path / "by 1") == contents(tmp_path / "by 3")


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_of_an_earlier_launch_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images", classes=4, images=5)
    assert pack(tmp_path / "images", tmp_path / "undisturbed", 0) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "_index", None)
        with pytest.raises(TypeError):
            pack(tmp_path / "images", tmp_path / "pack", 0)
    shards = sorted((tmp_path / "pack/train").glob("*.tar"))
    content = bytearray(shards[1].read_bytes())
    content[700] ^= 1
    shards[1].write_bytes(content)
    before = [shard.stat().st_ino for shard in shards]
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    assert contents(tmp_path / "pack") == contents(tmp_path / "undisturbed")
    kept = [shard.stat().st_ino == inode for shard, inode in zip(shards, before, strict=True)]
    assert kept[:3] == [True, False, True]


def under_way(tmp_path: Path) -> tuple[Path, subprocess.Popen[str]]:
    """A folder of 6,012 images, and a process that has packed the first of two parts."""
    images = write_folder(tmp_path / "images")
    for number in range(6_000):
        os.link(images / "val/c0/0.jpg", images / f"val/c1/again-{number}.jpg")
    process = start(images, tmp_path / "pack", start_new_session=True)
    record = tmp_path / "pack/.unfinished/train-00000.json"
    deadline = time.monotonic() + 100
    while not record.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return images, process


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]])
def test_a_pack_that_is_ended_goes_on(tmp_path: Path, signals: list[signal.Signals]) -> None:
    images, process = under_way(tmp_path)
    for signum in signals:
        os.kill(process.pid, signum)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    if signals == [signal.SIGKILL]:
        assert process.returncode == -9
    else:  # of two that wait, Python takes either first
        heard = {143: "SIGTERM", 130: "SIGINT"}[process.returncode]
        assert said == f"recipe: ended by {heard}; the same command resumes\n"
    deadline = time.monotonic() + 100
    while group(process.pid):
        assert time.monotonic() < deadline, group(process.pid)
        time.sleep(0.05)
    assert not (tmp_path / "pack/pack.json").exists()
    with pytest.raises(ValueError, match="is not a complete pack"):
        open_datasets("pack", tmp_path / "pack", 16, "none", False, 0, "stop")
    first = (tmp_path / "pack/train/00000.tar").stat()
    assert pack(images, tmp_path / "pack", 0) == 0
    assert (tmp_path / "pack/train/00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert pack(images, tmp_path / "undisturbed", 0) == 0
    assert contents(tmp_path / "pack") == contents(tmp_path / "undisturbed")


def test_a_process_that_is_killed_ends_it_in_one_line(tmp_path: Path) -> None:
    _, process = under_way(tmp_path)
    # The server is the parent of the processes that pack, and has no parent but the command.
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
    parents = {pid: parent for pid, parent, leader in rows if leader == process.pid}
    for pid, parent in parents.items():
        if parents.get(parent) == process.pid:
            os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == "recipe: a process that packs was killed (out of memory?); the same command resumes\n"


def group(leader: int) -> list[str]:
    """The processes of a group that are not merely waiting to be buried."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in listed if line.split()[0] == str(leader) and not line.split()[1].startswith("Z")]


def test_bad_images_are_listed_and_keep_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        train, _ = open_datasets("pack", destination, 16, "none", False, 0, "skip")
        assert sample(train, (0, 1)).bad_image == f"{destination}/train/00000.tar: train/c0/1.jpg"
        assert torch.equal(sample(train, (0, 1)).image, sample(train, (0, 2)).image)


def test_verify_finds_a_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "images")
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    assert main(["--verify", str(tmp_path / "pack")]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'pack'}: 8 files, whole\n")
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
    shard.unlink()
    assert main(["--verify", str(tmp_path / "pack")]) == 1
    assert f"damaged: {shard}: No such file or directory\n" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["--verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"recipe: {tmp_path} is not a complete pack, which has a pack.json; create one with python -m recipe pack\n"
    )


def test_a_complete_pack_is_left_as_it_is_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write_folder(tmp_path / "images")), str(tmp_path / "pack")]
    assert main(words) == 0
    shards = [tmp_path / "pack" / part / "00000.tar" for part in ("train", "val")]
    size = sum(shard.stat().st_size for shard in shards) / 2**20
    assert f"2 shards, {size:.2f} MiB; 0 images" in capsys.readouterr().out
    before = contents(tmp_path / "pack")
    assert main(words) == 0
    assert "is complete already" in capsys.readouterr().out
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
        ("images", "images/pack", "DST {root}/images/pack lies in SRC {root}/images; name a folder outside of it"),
        ("images", "images", "DST {root}/images lies in SRC"),
        ("images", ".", "DST {root} holds file, images, link, and no pack; name a new or empty folder"),
        ("images", "link/pack", "DST {root}/link/pack lies in SRC"),
        ("images", "file", "DST {root}/file: {root}/file is no folder; remove it, or name another"),
        (
            "images",
            "/proc/pack",
            "DST /proc/pack: no folder can be made in /proc (No such file or directory); name",
        ),
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
    [
        [],
        ["a"],
        ["a", "b", "--short-side", "7"],
        ["a", "b", "--raw"],
        ["a", "b", "--verify", "c"],
        ["--short-side", "9"],
        ["--verify", "c", "--raw"],
    ],
)
def test_words_that_do_not_fit_together_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_a_file_that_cannot_be_read_ends_it_and_is_not_packed_as_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "images")
    gone = tmp_path / "images/train/c0/link.jpg"
    gone.symlink_to("nowhere")
    assert main([str(tmp_path / "images"), str(tmp_path / "pack")]) == 2
    assert capsys.readouterr().err == f"recipe: {gone}: No such file or directory; mend or remove it\n"


def test_a_full_disk_is_told_in_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", images=40)
    limit = (20_000, 20_000)
    process = start(images, tmp_path / "pack", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2
    assert said == f"recipe: {tmp_path / 'pack'}: File too large; mend that, and the same command resumes\n"
    assert pack(images, tmp_path / "pack", 0) == 0


def test_two_packs_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, destination = write_folder(tmp_path / "images"), tmp_path / "pack"
    hold = "import pathlib, sys; from recipe.checkpoints import lock; file = lock(pathlib.Path(sys.argv[1]))"
    hold += "; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, destination], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main([str(images), str(destination)]) == 2
        other.communicate(b"\n")
    assert capsys.readouterr().err == (
        f"recipe: another run is writing to {destination}; wait for it, end it, or name another DST\n"
    )


def test_the_check_of_the_hosts_counts_a_pack(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    counts = {"classes": 2, "train_images": 6, "validation_images": 6}
    assert count_data(str(tmp_path / "images"), None) == counts
    assert pack(tmp_path / "images", tmp_path / "pack", 0) == 0
    found = count_data(str(tmp_path / "pack"), None)
    assert found == counts | {"pack": found["pack"]} == count_data(str(tmp_path / "pack"), "pack")
    assert f"2 classes, 6 + 6 images in pack {found['pack'][:8]}" in format_table([Host("node", 1, {"data": found})])
    with pytest.raises(ValueError, match="is not a complete pack"):
        count_data(str(tmp_path / "images"), "pack")
    with pytest.raises(ValueError, match=r"pack_short_side = 352: .* is a pack of short side 0"):
        count_data(str(tmp_path / "pack"), "pack", pack_short_side=352)
    with pytest.raises(ValueError, match=r"pack_short_side = 352: .* is a pack of short side 0"):
        open_datasets("pack", tmp_path / "pack", 32, "none", False, 0, "stop", pack_short_side=352)


@pytest.mark.slow
def test_training_from_a_pack_is_training_from_the_folder(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", images=12)
    for part in ("train", "val"):
        picture(9).save(images / part / "c1/3.jpg", "PNG")
        (images / part / "c0").rename(images / part / os.fsdecode(b"\xff 2"))
        (images / part / "c1").rename(images / part / "10")
    assert pack(images, tmp_path / "pack", 0) == 0
    for source, path in (("imagefolder", images), ("pack", tmp_path / "pack")):
        data = {"source": source, "path": str(path), "image_size": 32, "train_images": 24, "validation_images": 24}
        train_ok(
            *("--deepspeed_config", DIGITS, "--output", str(tmp_path / source)),
            *("--set=train_batch_size=8", "--set=recipe.model.num_classes=2", "--set=recipe.schedule.epochs=2"),
            *("--set=recipe.schedule.decay_epochs=[1]", "--set=recipe.schedule.warmup_epochs=0"),
            f"--set=recipe.data={json.dumps(data | {'workers': 1, 'on_device': source == 'imagefolder'})}",
        )
    told = []
    for source in ("imagefolder", "pack"):
        steps = events(tmp_path / source, "step") + events(tmp_path / source, "validation")
        told.append([(event["step"], event["loss"], event.get("top1")) for event in steps])
    assert told[0] == told[1]
    assert len(told[0]) == 8
    assert compare([str(tmp_path / "imagefolder"), str(tmp_path / "pack")]) == 0
    summaries = [json.loads((tmp_path / source / "summary.json").read_text()) for source in ("imagefolder", "pack")]
    # Two PNGs, on the device once and from the pack in each of two epochs.
    assert [summary["decoded_by_pil"] for summary in summaries] == [2, 4]
    assert [summary["classes"] for summary in summaries] == [["10", "\\udcff 2"]] * 2
    states = [
        torch.load(tmp_path / source / "checkpoints/step-00000006/mp_rank_00_model_states.pt", weights_only=True)[
            "module"
        ]
        for source in ("imagefolder", "pack")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_images_too_large_or_too_long_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 × 80,000 pixels would be resized to 256 × 68,266, which no JPEG can have."""
    source = write_folder(tmp_path / "source")
    Image.new("L", (300, 80_000), 77).save(source / "val/c0/long.png")
    Image.new("1", (14_000, 14_000)).save(source / "train/c0/large.png")
    monkeypatch.setattr(sys, "argv", ["recipe"])  # the processes that pack import this, not pytest
    assert main([str(source), str(tmp_path / "pack"), "--short-side", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kept as it is: val/c0/long.png: 68,266 pixels are too long for a JPEG" in lines
    assert "bad image: train/c0/large.png: it has more than 178,956,970 pixels, PIL's limit; shrink it" in lines
    assert "0 images resized, 1 bad" in lines[-2]
    _, held_out = open_datasets("pack", tmp_path / "pack", 16, "none", False, 0, "stop", pack_short_side=256)
    shapes = {held_out.name(index): held_out.image(index).pixels for index in range(len(held_out))}
    (long,) = (pixels for name, pixels in shapes.items() if name.endswith("long.png"))
    assert long.shape == (80_000, 300, 3)
