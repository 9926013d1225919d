"""Invariant 6: whatever lies in the folder of a run, it goes on from the newest checkpoint that is whole."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.checkpoints.manifest import damage, find
from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT, SHORT, complete_run, events, losses, train, train_ok

pytestmark = pytest.mark.slow

WEIGHTS = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    output = tmp_path_factory.mktemp("undisturbed")
    complete_run(output)
    return losses(output)


def test_damaged_checkpoints_are_named_and_an_older_one_is_taken(tmp_path: Path, undisturbed: list[float]) -> None:
    arguments = ("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT)
    every_step = ("--set=recipe.checkpoint.every_steps=1", "--set=recipe.checkpoint.keep_last=9")
    train_ok(*arguments, *every_step)
    (tmp_path / "summary.json").unlink()
    checkpoints = tmp_path / "checkpoints"
    flipped, torn, lost = (checkpoints / f"step-0000000{step}" for step in (6, 5, 4))
    content = bytearray((flipped / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / WEIGHTS).write_bytes(content)
    os.truncate(torn / WEIGHTS, 1000)
    (lost / "plan.json").unlink()
    (checkpoints / ".unfinished/step-00000009").mkdir(parents=True)  # as a kill leaves it
    (checkpoints / "step-00000009").mkdir()
    (checkpoints / "step-00000008").mkdir()
    (checkpoints / "step-00000008/manifest.json").write_text('{"step": 8, "to')
    done = train_ok(*arguments, *every_step, "--resume", "must")
    said = done.stdout
    assert f"checkpoint {flipped} is left aside: {flipped / WEIGHTS} is not what was written" in said
    assert f"checkpoint {torn} is left aside: {torn / WEIGHTS} has 1000 bytes" in said
    assert f"checkpoint {checkpoints / 'step-00000008'} is left aside: its manifest.json cannot be read" in said
    assert f"checkpoint {lost} is left aside: {lost / 'plan.json'} is missing" in said
    assert "step-00000003, 3 steps done" in said
    assert losses(tmp_path) == undisturbed
    assert [event["step"] for event in events(tmp_path, "step")] == [0, 1, 2, 3, 4, 5]
    assert [damage(checkpoint) for checkpoint in find(checkpoints)] == [None] * 6
    assert (checkpoints / "step-00000006.aside").exists()


def test_a_damaged_checkpoint_does_not_push_out_what_is_written_after_it(tmp_path: Path) -> None:
    """Only it is there, and one is kept: the run starts over, and what it then saves is what stays."""
    arguments = ("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, "--set=recipe.checkpoint.keep_last=1")
    complete_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"checkpoints/step-0000000{step}", ignore_errors=True)
    os.truncate(tmp_path / "checkpoints/step-00000006" / WEIGHTS, 1000)
    ended = train(
        *(*arguments, "--set=recipe.checkpoint.keep_best=false"),
        script="benchmarks/killed_train.py",
        KILL_AT="step 3 0 TERM",
    )
    assert ended.returncode == 143
    assert [(checkpoint.step, damage(checkpoint)) for checkpoint in find(tmp_path / "checkpoints")] == [(1, None)]


def test_dropout_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """timm's ghostnet has dropout, whose masks come from torch's generator and from no checkpoint."""
    arguments = ("--deepspeed_config", DIGITS, *SHORT, "--output", str(tmp_path))
    arguments += (
        "--set=recipe.model.name=ghostnet_050",
        "--set=recipe.data.image_size=8",
        "--set=recipe.checkpoint.every_steps=3",
        "--set=recipe.checkpoint.keep_last=9",
    )
    train_ok(*arguments)
    whole = losses(tmp_path)
    (tmp_path / "summary.json").unlink()
    for step in (4, 6):
        (tmp_path / f"checkpoints/step-0000000{step}/manifest.json").unlink()
    done = train_ok(*arguments)
    assert "step-00000003, 3 steps done" in done.stdout
    assert losses(tmp_path) == whole


def test_a_run_that_must_resume_does_not_begin_anew(tmp_path: Path) -> None:
    arguments = ("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT)
    complete_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        os.truncate(checkpoint / WEIGHTS, 1000)
    done = train(*arguments, "--resume", "must")
    assert done.returncode == 1
    assert "CheckpointError: --resume must: no checkpoint is whole" in done.stderr
    assert not (tmp_path / "former-1").exists()
    for number, reason in ((1, "no whole checkpoint is left: training starts over\n"), (2, "")):
        before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "plan.json", "train.log")}
        anew = train_ok(*arguments)
        aside = tmp_path / f"former-{number}"
        told = f"training begins at epoch 1: no checkpoint is left of 6 steps, whose files are in {aside}\n"
        assert reason + told in anew.stdout
        assert {name: (aside / name).read_bytes() for name in before} == before
        assert [event["step"] for event in events(tmp_path, "step")] == [0, 1, 2, 3, 4, 5]
        (tmp_path / "summary.json").unlink()
        shutil.rmtree(tmp_path / "checkpoints")


def test_a_change_that_is_accepted_goes_on(tmp_path: Path, undisturbed: list[float]) -> None:
    arguments = ("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT)
    complete_run(tmp_path)
    longer = (*arguments, "--set=recipe.schedule.epochs=4")
    refused = train(*longer)
    assert refused.returncode == 2
    assert "recipe.schedule.epochs was 3, is 4" in refused.stderr
    assert "insist with --accept-changes" in refused.stderr
    done = train_ok(*longer, "--accept-changes")
    assert "resumes with changes: recipe.schedule.epochs was 3, is 4" in done.stdout
    assert losses(tmp_path)[:6] == undisturbed
    assert [event["step"] for event in events(tmp_path, "step")] == list(range(8))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB: two checkpoints of 3 MiB and the logs, but not a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoints(small_disk: Path, undisturbed: list[float]) -> None:
    output = small_disk / "run"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=recipe.checkpoint.every_steps=1")
    full = train(*arguments)
    assert full.returncode == 1
    assert f"CheckpointError: {output / 'checkpoints/step-00000003'} could not be written, with " in full.stderr
    assert "MiB free on its disk" in full.stderr
    assert "make room, and the same command resumes from the newest that is whole" in full.stderr
    assert "Traceback" not in full.stderr
    assert [(checkpoint.step, damage(checkpoint)) for checkpoint in find(output / "checkpoints")] == [
        (2, None),
        (1, None),
    ]
    assert not (output / "checkpoints/.unfinished").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train_ok(*arguments)
    assert losses(output) == undisturbed


VAL_GOES_AWAY = """
import sys

from recipe.data.datasets import BadImageError
from recipe.data.image_files import ImageFiles
from recipe.train import main

read, seen = ImageFiles.image, []


def image(self, index):
    if "/val/" in self.name(index):
        seen.append(index)
        if len(seen) > 1:  # the first look, before training
            raise BadImageError(f"{self.name(index)}: the disk is gone")
    return read(self, index)


ImageFiles.image = image
sys.exit(main())
"""


def test_an_epoch_is_saved_where_none_of_the_validation_images_can_be_read_any_more(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", images=8)
    data = {"source": "imagefolder", "path": str(images), "image_size": 32, "train_images": 16, "validation_images": 16}
    data |= {"on_bad_image": "skip", "workers": 0}
    arguments = ("--deepspeed_config", DIGITS, "--output", str(tmp_path / "run"), *SHORT, "--set=train_batch_size=16")
    arguments += ("--set=recipe.model.num_classes=2", "--set=recipe.max_micro_batch_size=8")
    arguments += (f"--set=recipe.data={json.dumps(data)}",)
    program = tmp_path / "val_goes_away.py"
    program.write_text(VAL_GOES_AWAY)
    failed = train(*arguments, script=str(program), PYTHONPATH=str(ROOT))
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].endswith(
        f"BadImageError: no validation image could be read, from {images}/val/c0/0.jpg on; what was trained is saved: "
        "the same command resumes"
    )
    assert "resumed from" in train_ok(*arguments).stdout
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [0, 1, 2]
    assert [event["step"] for event in events(tmp_path / "run", "validation")] == [0, 1, 2]
