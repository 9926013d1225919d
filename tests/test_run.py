"""What is checked before ranks meet, where a whole run would need another machine to show it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from recipe.checkpoints.locking import is_locked, lock
from recipe.config.schema import read_config
from recipe.distributed import listen
from recipe.engine.device import choose_device
from recipe.plan.plan import Plan, make_plan
from recipe.plan.text import format_plan
from recipe.run import prepare
from tests.launch import environment
from tests.ranks import fork

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "ds_configs/digits_b512.json"


def plan(*overrides: str, world_size: int = 1) -> Plan:
    return make_plan(read_config(DIGITS, overrides), world_size)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_device_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Some CPUs know fp16 and some do not: the accelerator's word is what counts."""
    for name, answer in (("is_fp16_supported", precision != "fp16"), ("is_bf16_supported", precision != "bf16")):
        monkeypatch.setattr(get_accelerator(), name, lambda answer=answer: answer)
    with pytest.raises(ValueError, match=rf"{precision}\.enabled = true: .* does not support it; .* train in fp32"):
        choose_device(precision)
    if not torch.cuda.is_available():
        assert choose_device("fp32") == torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ['recipe.model.name="vit_tiny_patch16_224"'],
            "recipe.data.image_size = 32: the model does not accept images of this size",
        ),
        (
            [
                'recipe.model.name="vit_tiny_patch16_224"',
                "recipe.data.image_size=[[0, 224], [1, 192]]",
            ],
            "recipe.data.image_size = 192: the model does not accept images of this size",
        ),
        (
            [
                'recipe.model.name="vit_tiny_patch16_224"',
                "recipe.data.image_size=224",
                "recipe.data.validation_image_size=256",
            ],
            "recipe.data.validation_image_size = 256: the model does not accept images of this size",
        ),
        (['recipe.model.name="resnet5O"'], 'recipe.model.name = "resnet5O": timm has no such model; did you mean'),
        (
            [
                'recipe.data={"source": "imagefolder", "path": "nowhere", "image_size": 32, "train_images": 1442, '
                '"validation_images": 355}'
            ],
            "recipe.data.path: there is no folder nowhere",
        ),
        pytest.param(
            [
                'recipe.data={"source": "imagefolder", "path": "nowhere", "image_size": 32, "train_images": 1442, '
                '"validation_images": 355, "decoder": "gpu"}'
            ],
            'recipe.data.decoder = "gpu": there is no CUDA GPU; write "cpu", or "dali"',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        # test_resnet halves an image five times.
        (
            ["recipe.data.image_size=16", "recipe.max_micro_batch_size=1"],
            "recipe.data.image_size = 16: batch norm over 1 image averages over a single value",
        ),
    ],
)
def test_what_model_and_data_refuse_names_the_file(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="digits_b512") as caught:
        prepare(plan(*overrides), tmp_path / "runs/refused", "auto")
    assert f"): {message}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_makes_before_ranks_meet_can_be_taken_back(tmp_path: Path) -> None:
    """But not what was there before, as the folder here, nor what has come to lie in it."""
    for made, left in (("runs/a", []), (".", []), ("runs/b", ["runs", "runs/b", "runs/b/notes"])):
        run = prepare(plan(), tmp_path / made, "auto")
        assert {path.name for path in (tmp_path / made).iterdir()} == {".lock", "checkpoints"}
        for path in left[2:]:
            (tmp_path / path).touch()
        run.undo.close()
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left


def _prepare_and_be_ended(output: Path) -> None:
    listen()
    prepare(plan(), output, "auto")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(tmp_path: Path) -> None:
    process = fork(tmp_path / "words", environment(), _prepare_and_be_ended, tmp_path / "runs/a")
    process.join(60)
    assert process.exitcode == 130
    said = (tmp_path / "words.stderr").read_text()
    assert said.endswith("recipe: SIGINT: ended at once; the same command resumes\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("locked", "{root}/locked/.lock: Is a directory; name a folder that can be written"),
        ("file", "{root}/file is no folder; remove it, or name another"),
        ("file/a/b", "{root}/file is no folder; remove it, or name another"),
        ("link/a", "{root}/link is no folder; remove it, or name another"),
        ("/proc/a/b", "no folder can be made in /proc (No such file or directory); name one that can be written"),
        ("a" * 300, "no folder can be made in {root} (File name too long); name one that can be written"),
    ],
)
def test_the_path_that_is_in_the_way_of_the_output_is_named(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "locked/.lock").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"^--output") as caught:
        lock(tmp_path / output)
    assert str(caught.value) == f"--output {tmp_path / output}: {message.format(root=tmp_path)}"


def test_a_lock_that_was_taken_away_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run that was refused: whoever held it would keep nobody out."""
    locks = iter((lambda: (tmp_path / ".lock").unlink(), lambda: None))
    monkeypatch.setattr("recipe.checkpoints.locking.fcntl.lockf", lambda *_: next(locks)())
    with lock(tmp_path) as file:
        assert os.fstat(file.fileno()).st_ino == (tmp_path / ".lock").stat().st_ino


def test_the_lock_comes_before_the_look_at_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may save and remove checkpoints until it ends."""
    monkeypatch.setattr("recipe.checkpoints.choose_start", lambda *_, **__: pytest.fail("it was looked at before"))
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"\.lock: Is a directory"):
        prepare(plan(), tmp_path, "auto")


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """The lock ends with its process, however that ends; a forked loader process does not keep it."""
    holder = (
        "import os, sys, time; from pathlib import Path; from recipe.checkpoints.locking import lock; "
        f"file = lock(Path({str(tmp_path)!r})); pid = os.fork(); "
        "print(pid, flush=True) if pid else None; time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(next(line for line in process.stdout if line.strip().isdigit()))  # DeepSpeed may warn before
    with pytest.raises(ValueError, match="another run is writing to"):
        lock(tmp_path)
    assert is_locked(tmp_path)
    process.kill()
    process.wait()
    assert not is_locked(tmp_path)
    lock(tmp_path).close()
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


def test_the_plan_prints_no_terminal_escapes() -> None:
    text = format_plan(plan('recipe.model.name="x\\u001b[2Jy"'))
    assert "\x1b" not in text
    assert r"x\u001b[2Jy, 10 classes" in text
