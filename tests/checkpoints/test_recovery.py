"""Invariants 6 and 8: a run resumes from its newest intact checkpoint, and no checkpoint can execute code."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.checkpoints import manifest
from recipe.checkpoints.manifest import damage, find
from recipe.engine import start
from tests.data.images import write_folder
from tests.launch import DIGITS, ROOT, SHORT, complete_run, events, forked, losses, run_script, train, train_ok

pytestmark = pytest.mark.slow

TIMEOUT = 8  # seconds
WEIGHTS = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    output = tmp_path_factory.mktemp("undisturbed")
    complete_run(output)
    return losses(output)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def add_payload(checkpoint: Path, marker: Path) -> None:
    """Add a payload to a checkpoint's weights, and update its manifest."""
    file = checkpoint / WEIGHTS
    torch.save(torch.load(file, weights_only=True) | {"payload": Payload(marker)}, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_run_resumes_from_the_newest_intact_checkpoint(tmp_path: Path, undisturbed: list[float]) -> None:
    output, marker = tmp_path / "run", tmp_path / "marker"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    every_step = ("--set=recipe.checkpoint.every_steps=1", "--set=recipe.checkpoint.keep_last=9")
    train_ok(*arguments, *every_step)
    (output / "summary.json").unlink()
    checkpoints = output / "checkpoints"
    flipped, torn, lost, malicious = (checkpoints / f"step-0000000{step}" for step in (6, 5, 4, 3))
    content = bytearray((flipped / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / WEIGHTS).write_bytes(content)
    os.truncate(torn / WEIGHTS, 1000)
    (lost / "plan.json").unlink()
    add_payload(malicious, marker)
    payload = shutil.copy(malicious / WEIGHTS, tmp_path)
    (checkpoints / ".unfinished/step-00000009").mkdir(parents=True)  # as a kill leaves it
    (checkpoints / "step-00000009").mkdir()
    (checkpoints / "step-00000008").mkdir()
    (checkpoints / "step-00000008/manifest.json").write_text('{"step": 8, "to')
    done = train_ok(*arguments, *every_step, "--resume", "must")
    for checkpoint, problem in {
        flipped: f"{flipped / WEIGHTS} is not what was written",
        torn: f"{torn / WEIGHTS} has 1000 bytes",
        lost: f"{lost / 'plan.json'} is missing",
        malicious: "it cannot be loaded: CheckpointError: it holds more than tensors and plain values, which could",
        checkpoints / "step-00000008": "its manifest.json cannot be read",
    }.items():
        assert f"checkpoint {checkpoint} is skipped: {problem}" in done.stdout
    assert "step-00000002, 2 steps done" in done.stdout
    assert "Traceback" not in done.stderr
    assert losses(output) == undisturbed
    assert [event["step"] for event in events(output, "step")] == [0, 1, 2, 3, 4, 5]
    assert [damage(checkpoint) for checkpoint in find(checkpoints)] == [None] * 6
    assert (checkpoints / "step-00000006.aside").exists()
    # The payload works; loading with weights_only keeps it from running.
    assert not marker.exists()
    torch.load(payload, weights_only=False)
    assert marker.exists()


def test_run_fails_if_no_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    output, marker = tmp_path / "run", tmp_path / "marker"
    complete_run(output)
    (output / "summary.json").unlink()
    checkpoints = sorted((output / "checkpoints").iterdir(), reverse=True)
    for checkpoint in checkpoints:
        add_payload(checkpoint, marker)
    failed = train("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    assert failed.returncode == 1
    assert f"no checkpoint can be loaded: checkpoint {checkpoints[0]} is skipped: it cannot be loaded" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not marker.exists()


def test_dropout_masks_are_the_same_after_a_resume(tmp_path: Path) -> None:
    """timm's ghostnet has dropout, whose masks come from torch's generator and from no checkpoint."""
    arguments = ("--deepspeed_config", DIGITS, *SHORT, "--output", str(tmp_path))
    arguments += (
        "--set=recipe.model.name=ghostnet_050",
        "--set=recipe.data.image_size=8",
        '--set=recipe.schedule={"epochs": 1, "warmup_epochs": 0}',
        "--set=recipe.checkpoint.every_steps=1",
    )
    train_ok(*arguments)
    whole = losses(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "checkpoints/step-00000002/manifest.json").unlink()
    done = train_ok(*arguments)
    assert "step-00000001, 1 steps done" in done.stdout
    assert losses(tmp_path) == whole


def test_resume_must_does_not_start_over_and_auto_does(tmp_path: Path) -> None:
    arguments = ("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT)
    complete_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        os.truncate(checkpoint / WEIGHTS, 1000)
    must = train(*arguments, "--resume", "must")
    assert must.returncode == 1
    assert "CheckpointError: --resume must: no checkpoint is intact" in must.stderr
    assert not (tmp_path / "former-1").exists()
    for number, reason in ((1, "no intact checkpoint is left: training starts over\n"), (2, "")):
        before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "plan.json", "train.log")}
        anew = train_ok(*arguments)
        aside = tmp_path / f"former-{number}"
        told = f"training starts at epoch 1: no checkpoint of the earlier 6 steps is left; their files are in {aside}\n"
        assert reason + told in anew.stdout
        assert {name: (aside / name).read_bytes() for name in before} == before
        assert [event["step"] for event in events(tmp_path, "step")] == [0, 1, 2, 3, 4, 5]
        # A damaged checkpoint would count as one to keep.
        assert (tmp_path / "checkpoints/step-00000006.aside").exists() == (number == 1)
        (tmp_path / "summary.json").unlink()
        shutil.rmtree(tmp_path / "checkpoints")


def test_accepted_change_resumes(tmp_path: Path, undisturbed: list[float]) -> None:
    complete_run(tmp_path)
    longer = ("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, "--set=recipe.schedule.epochs=4")
    done = train_ok(*longer, "--accept-changes")
    assert "resumes with changes: recipe.schedule.epochs was 3, is 4" in done.stdout
    assert losses(tmp_path)[:6] == undisturbed
    assert [event["step"] for event in events(tmp_path, "step")] == list(range(8))
    # The optimizer's own settings change, too: without momentum and Nesterov, a buffer is the last gradient.
    (tmp_path / "metrics.jsonl").write_text("")
    plain = '--set=optimizer.params={"momentum": 0, "nesterov": false, "weight_decay": 0.25}'
    more = ("--set=recipe.schedule.epochs=5", "--set=recipe.ema.decay=0.999", plain)
    done = train_ok(*longer, *more, "--accept-changes")
    assert "metrics.jsonl has lines for only 0 of the 8 steps done so far" in " ".join(done.stdout.split())
    (validation,) = events(tmp_path, "validation")
    assert json.loads((tmp_path / "summary.json").read_text())["final_top1"] == validation["ema_top1"]
    (state,) = (tmp_path / "checkpoints/step-00000010").glob("mp_rank_00_model_states.pt")
    groups = torch.load(state, weights_only=True)["optimizer"]["param_groups"]
    assert [(group["momentum"], group["nesterov"], group["weight_decay"]) for group in groups] == [
        (0, False, 0.25),
        (0, False, 0),
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB: two checkpoints of 3 MiB and the logs fit, a third checkpoint does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_ends_the_run_and_spares_older_checkpoints(small_disk: Path, undisturbed: list[float]) -> None:
    output = small_disk / "run"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=recipe.checkpoint.every_steps=1")
    full = train(*arguments)
    assert full.returncode == 1
    assert f"CheckpointError: {output / 'checkpoints/step-00000003'} could not be written, with " in full.stderr
    assert "MiB free on its disk" in full.stderr
    assert "make room, and the same command resumes from the newest intact one" in full.stderr
    assert "Traceback" not in full.stderr
    assert [(found.step, damage(found)) for found in find(output / "checkpoints")] == [(2, None), (1, None)]
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
        if len(seen) > 1:  # the first one is read before training
            raise BadImageError(f"{self.name(index)}: the disk is gone")
    return read(self, index)


ImageFiles.image = image
sys.exit(main())
"""


def test_an_epoch_is_saved_if_no_validation_image_can_be_read(tmp_path: Path) -> None:
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
        f"BadImageError: no validation image could be read, from {images}/val/c0/0.jpg on; progress is saved: the same "
        "command resumes"
    )
    assert [(found.step, damage(found)) for found in find(tmp_path / "run/checkpoints")] == [(1, None)]


def test_ranks_wait_for_slow_storage(tmp_path: Path) -> None:
    complete_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints/step-00000006")
    arguments = [
        "--deepspeed_config",
        DIGITS,
        "--output",
        str(tmp_path),
        *SHORT,
        f"--set=recipe.distributed.timeout_seconds={TIMEOUT}",
    ]
    done = forked(_train_on_slow_storage, ["recipe/train.py", *arguments], ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert len(losses(tmp_path)) == 6


def _train_on_slow_storage(words: list[str]) -> None:
    """Train with a storage that takes longer for each step of reading or writing than ranks wait for each other."""

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*args: Any, **options: Any) -> Any:
            time.sleep(TIMEOUT + 3)
            return function(*args, **options)

        return slowed

    start.SLOW_STORAGE = 100e3  # the checkpoint's 4.5 MB may take 45 s
    for module, name in ((torch, "save"), (manifest, "complete"), (manifest, "damage")):
        setattr(module, name, slow(getattr(module, name)))
    run_script(words)
