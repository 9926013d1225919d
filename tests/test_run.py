"""What is checked before the rendezvous of the ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from recipe.checkpoints.locking import is_locked, lock, unlock
from recipe.config.schema import read_config
from recipe.engine.device import choose_device, slow_precision
from recipe.plan.plan import Plan, make_plan
from recipe.plan.text import format_plan
from recipe.run import prepare

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "ds_configs/digits_b512.json"


def plan(*overrides: str) -> Plan:
    return make_plan(read_config(DIGITS, overrides), world_size=1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Some CPUs support fp16 and some do not; the accelerator knows."""
    for name in ("fp16", "bf16"):
        monkeypatch.setattr(get_accelerator(), f"is_{name}_supported", lambda name=name: name != precision)
    with pytest.raises(ValueError, match=rf"{precision}\.enabled = true: .* does not support it; .* train in fp32"):
        choose_device(precision)
    if not torch.cuda.is_available():
        assert choose_device("fp32") == torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "slow"), [("fma avx2", {"fp16", "bf16"}), ("avx512f avx512_bf16", {"fp16"}), ("amx_bf16", {"fp16"})]
)
def test_precision_in_which_a_cpu_is_slow_is_said(monkeypatch: pytest.MonkeyPatch, flags: str, slow: set[str]) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags\t: {flags}\n")
    for precision in ("fp16", "bf16", "fp32", "fp64"):
        said = [f"--set {precision}.enabled=false trains in fp32"] if precision in slow else []
        assert [line.split("; ")[1] for line in slow_precision(torch.device("cpu"), precision)] == said
        assert slow_precision(torch.device("cuda"), precision) == []


VIT = 'recipe.model.name="vit_tiny_patch16_224"'
NOWHERE = (
    'recipe.data={"source": "imagefolder", "path": "nowhere", "image_size": 32, "train_images": 1442, '
    '"validation_images": 355}'
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([VIT], "recipe.data.image_size = 32: the model does not accept images of this size"),
        (
            [VIT, "recipe.data.image_size=224", "recipe.data.validation_image_size=256"],
            "recipe.data.validation_image_size = 256: the model does not accept images of this size",
        ),
        (['recipe.model.name="resnet5O"'], 'recipe.model.name = "resnet5O": timm has no such model; did you mean'),
        (
            ["recipe.model.num_classes=11"],
            "recipe.model.num_classes = 11: the data has 10; set recipe.model.num_classes to 10",
        ),
        ([NOWHERE], "recipe.data.path: there is no folder nowhere"),
        # test_resnet halves an image five times.
        (
            ["recipe.data.image_size=16", "recipe.max_micro_batch_size=1"],
            "recipe.data.image_size = 16: batch norm over 1 image averages over a single value",
        ),
    ],
)
def test_refusals_of_model_and_data_name_the_file(tmp_path: Path, overrides: list[str], message: str) -> None:
    """They come before the output folder is created."""
    with pytest.raises(ValueError, match="digits_b512") as caught:
        prepare(plan(*overrides), tmp_path / "runs/refused", "auto")
    assert f"): {message}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("locked", "cannot write to {root}/locked/.lock (Is a directory); name another folder"),
        ("file", "{root}/file is not a folder; remove it, or name another folder"),
        ("file/a/b", "{root}/file is not a folder; remove it, or name another folder"),
        ("link/a", "{root}/link is not a folder; remove it, or name another folder"),
        ("used", "{root}/used/checkpoints is not a folder; remove it, or name another folder"),
        ("/proc/a/b", "cannot write to /proc (No such file or directory); name another folder"),
        ("a" * 300, "cannot write to {root} (File name too long); name another folder"),
    ],
)
def test_refusal_names_the_path_that_blocks_the_output(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "locked/.lock").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/checkpoints").touch()
    with pytest.raises(ValueError, match=r"^--output") as caught:
        lock(tmp_path / output, subfolder="checkpoints")
    assert str(caught.value) == f"--output {tmp_path / output}: {message.format(root=tmp_path)}"
    assert not (tmp_path / "locked/checkpoints").exists()


def test_refused_run_removes_only_what_it_created(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for output in ("own", "runs/new"):
        with pytest.raises(ValueError, match="holds no checkpoint"):
            prepare(plan(), tmp_path / output, "must")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["own"]


def test_folder_is_locked_before_checkpoints_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may save and remove checkpoints until it ends."""
    monkeypatch.setattr("recipe.checkpoints.choose_start", lambda *_, **__: pytest.fail("checkpoints were read"))
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"\.lock \(Is a directory\)"):
        prepare(plan(), tmp_path, "auto")


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """The lock ends with its process, however that ends; a forked loader process does not hold it."""
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
    unlock(lock(tmp_path))
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


def test_asking_whether_a_folder_is_locked_takes_no_lock(tmp_path: Path) -> None:
    """A run that starts just when a study asks must not be refused."""
    ask = "from pathlib import Path; from recipe.checkpoints.locking import is_locked\n"
    ask += f"print(flush=True)\nwhile True: is_locked(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", ask], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        for _ in range(2000):
            with lock(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_plan_prints_no_terminal_escapes() -> None:
    text = format_plan(plan('recipe.model.name="x\\u001b[2Jy"'))
    assert "\x1b" not in text
    assert r"x\u001b[2Jy, 10 classes" in text
