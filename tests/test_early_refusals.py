"""Refusals before torch is imported: real launches in which importing torch or DeepSpeed would fail."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.commands.pack.command import pack
from recipe.train import cpu_may_support_fp16
from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT, environment

GOOD = {"train/cat/.jpg": 3, "train/dog/.png": 3, "val/cat/.jpg": 2, "val/dog/.jpg": 2}
TWO_CLASSES = ("--set=recipe.model.num_classes=2", "--set=train_batch_size=4")


def fill(folder: Path, files: dict[str, int]) -> None:
    """Create empty files: 3 files ``train/cat/0.jpg`` … for ``{"train/cat/.jpg": 3}``."""
    for name, count in files.items():
        parent, _, extension = name.rpartition("/")
        (folder / parent).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / parent / f"{number}{extension}").touch()


def data(folder: Path, *, source: str = "imagefolder", train: int | str = 6, validation: int | str = 4) -> str:
    section = {"source": source, "path": str(folder), "image_size": 32}
    return f"--set=recipe.data={json.dumps(section | {'train_images': train, 'validation_images': validation})}"


def without_torch(tmp_path: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    for package in ("torch", "deepspeed"):
        (tmp_path / "stubs").mkdir(exist_ok=True)
        (tmp_path / f"stubs/{package}.py").write_text("raise SystemExit('it was imported')")
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{tmp_path / 'stubs'}:{ROOT}", **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_folder_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fill(folder, GOOD | {"train/cat/.gif": 1, "val/dog/.GIF": 1, "train/dog/.heic": 1})
    junk, level = tmp_path / "junk", tmp_path / "level"
    fill(junk, GOOD | {"train/backup/.jpg": 1, "val/backup/.jpg": 1})
    fill(level, {"train/photos/cat/.jpg": 3, "train/photos/dog/.jpg": 3, "val/photos/cat/.jpg": 4})
    packed = tmp_path / "packed"
    write_folder(tmp_path / "images", classes=2, images=3)
    assert pack(tmp_path / "images", packed, 0) == 0
    left_out, first = "left out: 2 .gif, 1 .heic", "classes (smallest first, with their training images:"
    check = "check the folder (--data); if it is the right one, set"
    cases = {
        data(tmp_path / "nowhere"): f"recipe.data.path: there is no folder {tmp_path}/nowhere; it should contain",
        data(tmp_path / ("long" * 100)): "long cannot be read: File name too long; name another folder\n",
        data(
            tmp_path / ("long" * 100), source="pack"
        ): "long cannot be read: File name too long; name another folder\n",
        data(folder, train=7): f"train_images = 7: the data has 6; {left_out}; {check} recipe.data.train_images to 6\n",
        data(junk): f"num_classes = 2: the data has 3 {first} backup (1), cat (3), dog (3)); {check} recipe.model."
        "num_classes to 3, recipe.data.train_images to 7, recipe.data.validation_images to 5\n",
        data(level): f"num_classes = 2: the data has 1 {first} photos (6)); {check} recipe.model.num_classes to 1\n",
        data(packed, source="pack", validation=7): f"validation_images = 7: the data has 6; {check} recipe.data.val",
        data(folder, source="pack"): f"recipe.data.path: {folder} is not a complete pack",
        "--set=wandb.enabled=true": "wandb.enabled = true: the package wandb is not installed; pip install wandb",
    }
    output = tmp_path / "runs/refused"
    # Every other case runs as the first of two ranks.
    places = itertools.cycle(({}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}))
    for (words, message), place in zip(cases.items(), places, strict=False):
        run = ("recipe/train.py", "--deepspeed_config", DIGITS, "--output", str(output), *TWO_CLASSES, words)
        if "wandb" in words:
            run = tuple(word for word in run if "num_classes" not in word)
        done = without_torch(tmp_path, *run, MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **place)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not output.parent.exists()


@pytest.mark.skipif(cpu_may_support_fp16(), reason="the CPU knows fp16")
def test_fp16_without_a_gpu_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    run = ("recipe/train.py", "--deepspeed_config", DIGITS, "--output", str(tmp_path / "run"))
    done = without_torch(tmp_path, *run, "--set=fp16.enabled=true", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "fp16.enabled = true: there is no GPU, and the CPU does not support it; " in done.stderr
    on_gpu = data(tmp_path).replace('"image_size"', '"decoder": "gpu", "image_size"')
    done = without_torch(tmp_path, *run, *TWO_CLASSES, on_gpu, CUDA_VISIBLE_DEVICES="")
    assert 'recipe.data.decoder = "gpu": there is no CUDA GPU; use "cpu", or "dali"' in done.stderr
    # Only torch knows whether another accelerator supports fp16.
    elsewhere = without_torch(tmp_path, *run, "--set=fp16.enabled=true", DS_ACCELERATOR="xpu")
    assert "it was imported" in elsewhere.stderr


def test_plan_counts_images_in_the_given_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fill(folder, GOOD | {"val/dog/.avif": 1200})
    (folder / "train/cat/README").touch()
    plan = ("-m", "recipe", "plan", DIGITS, *TWO_CLASSES)
    cases = [
        (data(folder, train="auto"), (), 2, 'train_images = "auto": it is unknown until the folder is read; '),
        (data(Path("x"), train="auto", validation="auto"), ("--data", str(folder)), 0, "6 training images, 4 for "),
        (data(Path("x")), ("--data", str(folder)), 0, "left out: 1,200 .avif, 1 without an extension"),
        (data(Path("x")), ("--data", str(tmp_path)), 2, f"{tmp_path} has no folder train/"),
        (data(Path("x"), train=5), ("--data", str(folder)), 2, "train_images = 5: the data has 6; left out: 1,200 "),
        (data(Path("x")), (), 0, "6 training images, 4 for validation"),
    ]
    for section, words, code, message in cases:
        done = without_torch(tmp_path, *plan, section, *words)
        assert done.returncode == code, done.stderr
        assert message in " ".join((done.stdout + done.stderr).split())
