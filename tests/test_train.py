"""Real runs of ``recipe/train.py``: what they write, how they end, and what they refuse."""

import gc
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from PIL import Image

from recipe.commands.export import main as export_command
from recipe.train import parse_arguments, run as train_here
from tests.golden import FP64, GOLDEN
from tests.launch import (
    DIGITS,
    ROOT,
    SHORT,
    SIX_STEPS,
    command,
    environment,
    events,
    losses,
    open_terminal,
    recipe,
    shown_on,
    train,
    train_ok,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Six steps of the digits on one rank."""
    output = tmp_path_factory.mktemp("short") / "run"
    return output, train_ok("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)


def test_what_a_run_leaves(short_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = short_run
    steps, validations = events(output, "step"), events(output, "validation")
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4, 5]
    # 0.1 → 0.2 over the two steps of the first epoch, ÷10 after the second
    assert [step["lr"] for step in steps] == pytest.approx([0.1, 0.15, 0.2, 0.2, 0.02, 0.02], rel=1e-12)
    assert [step["samples"] for step in steps] == [512 * n for n in range(1, 7)]
    assert [(v["step"], v["epoch"], v["count"]) for v in validations] == [(1, 0, 355), (3, 1, 355), (5, 2, 355)]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["final_top1"] == validations[-1]["top1"]
    assert summary["best_top1"] == max(v["top1"] for v in validations)
    assert summary["median_error_last_epochs"] == pytest.approx(sorted(100 - v["top1"] for v in validations)[1])
    assert summary["images_per_second"] > 0
    assert set(summary["versions"]) == {"python", "deepspeed", "torch", "torchvision", "timm"}
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept[-2:] == ["step-00000004", "step-00000006"]
    assert len((output / "train.log").read_text().splitlines()) == 9
    saved = torch.load(Path(summary["best_checkpoint"]) / "mp_rank_00_model_states.pt", weights_only=True)
    timm.create_model("test_resnet", num_classes=10).load_state_dict(saved["module"])
    assert "Plan of ds_configs/digits_b512.json" in done.stdout
    assert "epoch 3/3: top-1" in done.stdout
    assert "best weights" in done.stdout
    assert str(output / "plan.json") in done.stdout


def test_golden_losses(tmp_path: Path) -> None:
    """The seeded run as it was when the file was made; ``python -m tests.golden`` makes it anew."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    for name, *precision in (("fp64", FP64), ("fp32",)):
        train_ok("--deepspeed_config", DIGITS, "--output", str(tmp_path / name), *SIX_STEPS, *precision)
    assert losses(tmp_path / "fp64") == pytest.approx(golden, rel=1e-9)
    # fp32 is the same training, as far as its rounding goes.
    assert losses(tmp_path / "fp32")[:2] == pytest.approx(golden[:2], rel=1e-6)
    assert losses(tmp_path / "fp32") == pytest.approx(golden, rel=1e-2)


def test_plan_json_repeats_the_run(short_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    output, _ = short_run
    train_ok("--deepspeed_config", str(output / "plan.json"), "--output", str(tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(output)
    assert (tmp_path / "again/plan.json").read_text() == (output / "plan.json").read_text()


def test_a_complete_run_is_not_trained_again(
    short_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, _ = short_run
    metrics, summary = ((output / name).read_bytes() for name in ("metrics.jsonl", "summary.json"))
    done = train_ok("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    assert (output / "metrics.jsonl").read_bytes() == metrics
    assert "is complete already" in done.stdout
    assert "best weights" in done.stdout
    (output / "summary.json").write_text("[1]")
    train_ok("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    assert (output / "metrics.jsonl").read_bytes() == metrics
    assert json.loads((output / "summary.json").read_bytes())["best_top1"] == json.loads(summary)["best_top1"]


def test_two_ranks_write_one_run_and_are_quiet(tmp_path: Path) -> None:
    """After the plan nothing is printed but our own lines and the launcher's."""
    output, extensions = tmp_path / "run", tmp_path / "extensions"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    done = train_ok(*arguments, ranks=2, launcher=True, OMP_NUM_THREADS="", TORCH_EXTENSIONS_DIR=str(extensions))
    assert "512 = 2 ranks × 2 accumulation steps × micro-batch of 128" in done.stdout
    assert done.stdout.count("Plan of") == 1
    assert [step["step"] for step in events(output, "step")] == [0, 1, 2, 3, 4, 5]
    assert [v["count"] for v in events(output, "validation")] == [355, 355, 355]
    # Each rank takes its share of the cores, and DeepSpeed compiles nothing.
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"2 ranks on CPU, {share} thread" in done.stdout
    assert not list(extensions.rglob("*.so"))
    ours = done.stdout[done.stdout.index("Plan of") :].splitlines()
    assert [line for line in ours if line.startswith("[") and "[launch.py:" not in line] == []
    assert "Warning" not in done.stderr


def test_no_garbage_is_looked_for_among_what_the_libraries_have_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a rank that leaves the look at the folder to the first of its host go to meet one that has refused."""
    words = ["--deepspeed_config", "ds_configs/cifar10_b1024.json", "--data", str(tmp_path / "nowhere")]
    words.append("--set=fp16.enabled=false")
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    monkeypatch.setattr("recipe.train.OTHER_RANKS_WAIT_SECONDS", 0)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    try:
        with mock.patch.dict(os.environ, place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}):
            assert train_here(parse_arguments([*words, "--output", str(tmp_path / "run")])) == 2
        assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen + 100_000
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_and_resume(tmp_path: Path, stage: int) -> None:
    output = tmp_path / "run"
    arguments = ["--deepspeed_config", DIGITS, "--output", str(output), *SHORT]
    arguments.append(f"--set=zero_optimization.stage={stage}")
    train_ok(*arguments, ranks=2)
    whole = losses(output)
    # As if it had been killed before the last epoch ended.
    (output / "summary.json").unlink()
    (output / "checkpoints/step-00000006/manifest.json").unlink()
    train_ok(*arguments, ranks=2)
    assert losses(output) == whole


def test_bf16_trains_and_resumes(tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=bf16.enabled=true"]
    arguments.append("--set=recipe.model.name=test_efficientnet")  # without AVX-512 30 times as slow as in fp32
    train_ok(*arguments)
    whole = losses(output)
    assert whole[-1] < whole[0]
    (output / "checkpoints/step-00000006/manifest.json").unlink()
    train_ok(*arguments)
    assert losses(output) == whole


TOOLBOX = (
    "--set=optimizer.type=LARS",
    '--set=optimizer.params={"momentum": 0.9, "trust_coefficient": 0.02}',
    '--set=recipe.schedule={"epochs": 3, "warmup_epochs": 1, "decay": "cosine", "final_lr": 0.001}',
    "--set=recipe.loss.label_smoothing=0.1",
    "--set=recipe.model.gradient_checkpointing=true",
    "--set=recipe.batchnorm.statistics=32",
    "--set=recipe.ema.decay=0.999",
    "--set=recipe.data.image_size=16",
    '--set=recipe.data.mixup={"probability": 0.5}',
    '--set=recipe.data.cutmix={"probability": 0.5}',
)


def test_the_tools_for_large_batches_together_resume_bit_for_bit_and_are_exported(tmp_path: Path) -> None:
    arguments = ("--deepspeed_config", DIGITS, *TOOLBOX, "--output", str(tmp_path))
    train_ok(*arguments)
    lines = (events(tmp_path, "step"), events(tmp_path, "validation"))
    assert all(line["ema_loss"] != line["loss"] for line in lines[1])
    (tmp_path / "summary.json").unlink()
    (tmp_path / "checkpoints/step-00000006/manifest.json").unlink()
    done = train_ok(*arguments)
    assert "resumed from" in done.stdout
    for before, after in zip(lines[0], events(tmp_path, "step"), strict=True):
        assert (before["loss"], before["lr"]) == (after["loss"], after["lr"])
    assert events(tmp_path, "validation") == lines[1]

    # Checkpoint and summary are rated by the average, which is what evaluate and export take.
    best = max(reversed(lines[1]), key=lambda line: line["ema_top1"])
    manifest = json.loads((tmp_path / f"checkpoints/step-{best['step'] + 1:08}/manifest.json").read_text())
    assert manifest["top1"] == best["ema_top1"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best_top1"], summary["final_top1"]) == (best["ema_top1"], lines[1][-1]["ema_top1"])
    errors = sorted(100 - line["ema_top1"] for line in lines[1])
    assert summary["median_error_last_epochs"] == errors[len(errors) // 2]
    assert summary["best_checkpoint"] == str(tmp_path / f"checkpoints/step-{best['step'] + 1:08}")
    assert "all by the averaged weights" in " ".join(done.stdout.split())
    assert recipe("evaluate", str(tmp_path)).returncode == 0
    measured = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert (measured["top1"], measured["loss"]) == (best["ema_top1"], best["ema_loss"])
    assert export_command([str(tmp_path)]) == 0
    card = (tmp_path / "export/README.md").read_text()
    assert f"top-1 {best['ema_top1']:.2f} %" in card
    assert "**Weights:** the moving average of the training's, in fp32" in card


def test_deepspeeds_own_sections_work(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = train_ok(
        *("--deepspeed_config", DIGITS, "--output", str(output), *SHORT),
        "--set=tensorboard.enabled=true",
        "--set=csv_monitor.enabled=true",
        '--set=flops_profiler={"enabled": true, "profile_step": 2}',
        '--set=comms_logger={"enabled": true}',
        "--set=wall_clock_breakdown=true",
    )
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    curves = {path.name for path in (output / "csv_monitor").iterdir()}
    assert {"Train_Samples_lr.csv", "Train_Samples_train_loss.csv", "Validation_Samples_top1.csv"} <= curves
    rates = (output / "csv_monitor/Train_Samples_lr.csv").read_text().splitlines()
    assert len(rates) == 1 + 6
    assert "Flops Profiler" in done.stdout
    assert "Comm. Op" in done.stdout
    assert "time (ms)" in done.stdout


def image_folder(folder: Path, *, per_class: int = 12) -> Path:
    """Two classes, red and blue, as JPEGs of uneven sizes; one training image is a text file with an odd name."""
    for part, count in (("train", per_class), ("val", 5)):
        for color in ("red", "blue"):
            (folder / part / color).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 30 + 2 * number), color).save(folder / part / color / f"{number}.jpg")
    (folder / "train/red/3.jpg").unlink()
    Path(os.fsdecode(os.fsencode(folder) + b"/train/red/caf\xe9\n.jpg")).write_text("not an image")
    return folder


FOLDER_RUN = (
    "--set=train_batch_size=8",
    "--set=recipe.max_micro_batch_size=2",
    "--set=recipe.model.num_classes=2",
    '--set=recipe.data={"source": "imagefolder", "path": "nowhere", "image_size": 32, "workers": 1}',
    "--set=recipe.schedule.epochs=2",
    "--set=recipe.schedule.decay_epochs=[1]",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_image_folder_with_a_bad_image(tmp_path: Path, ranks: int) -> None:
    data, output = image_folder(tmp_path / "data"), tmp_path / "run"
    bad = f"{data}/train/red/caf\\udce9\\u000a.jpg"
    Image.open(data / "val/red/0.jpg").save(data / "val/red/0.jpg", "PNG")
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), "--data", str(data), *FOLDER_RUN)
    stopped = train(*arguments, ranks=ranks)
    assert stopped.returncode == 1
    said = [line for line in stopped.stderr.splitlines() if line.startswith("recipe: ")]
    assert re.fullmatch(
        rf"recipe: rank \d on \S+ failed at step [0-2]: BadImageError: {re.escape(bad)}: not a readable image "
        r'\(cannot identify image file\); fix it, or set recipe.data.on_bad_image to "skip"',
        said[0],
    )
    assert len(said) == 1
    assert "Traceback" not in stopped.stderr
    assert (output / "train.log").read_text().count(said[0].removeprefix("recipe: ")) == 1
    skipped = train_ok(
        *arguments, "--set=recipe.data.on_bad_image=skip", "--output", str(tmp_path / "skip"), ranks=ranks
    )
    summary = json.loads((tmp_path / "skip/summary.json").read_text())
    assert summary["bad_images"] == [bad]
    assert summary["decoded_by_pil"] == 2  # once each epoch
    assert summary["steps"] == 6
    assert [v["count"] for v in events(tmp_path / "skip", "validation")] == [10, 10]
    assert "1 could not be read" in skipped.stdout
    (tmp_path / "other").symlink_to(data)
    shutil.copytree(data / "val", tmp_path / "moved/val")
    shutil.copytree(data / "train", tmp_path / "moved/train")
    for other, told in (("other", ""), ("moved", f" (on {data}; {tmp_path}/moved was not looked at)")):
        again = train_ok(*arguments, "--output", str(tmp_path / "skip"), "--data", str(tmp_path / other))
        assert f"skip is complete already{told}, and nothing was trained; another --output" in again.stdout
    counted = json.loads((tmp_path / "skip/plan.json").read_text())["recipe"]["data"]
    assert (counted["train_images"], counted["validation_images"]) == (24, 10)


@pytest.mark.parametrize(
    ("argument", "message"),
    [  # before the ranks have met, and after
        ("--set=train_batch_size=511", "the nearest that can: 510 or 512"),
        ("--resume=must", "holds no checkpoint"),
    ],
)
def test_refusals_by_the_launcher(tmp_path: Path, argument: str, message: str) -> None:
    """Exit code 2 from the launcher, one line, no traceback, no process group."""
    run = ("--deepspeed_config", DIGITS, "--output", str(tmp_path / "run"))
    is_refused(train(*run, argument, ranks=2, launcher=True), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set=train_btach_size=8"], "did you mean"),
        (["--set=recipe.model.num_classes=11"], "the data has 10 classes; write 10"),
        (["--set=recipe.model.name=test_resnt"], 'did you mean "test_resnet"'),
        ([*FOLDER_RUN], "recipe.data.path"),
        (["--set=wandb.enabled=true"], "pip install wandb"),
    ],
)
def test_refusals(tmp_path: Path, arguments: list[str], message: str) -> None:
    is_refused(train("--deepspeed_config", DIGITS, "--output", str(tmp_path / "run"), *arguments), message)
    assert not (tmp_path / "run").exists()


def is_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("recipe: ")]
    assert message in line
    assert "Traceback" not in done.stderr + done.stdout


def test_another_training_in_the_same_output_is_refused(
    short_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, _ = short_run
    done = train("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=train_batch_size=256")
    assert done.returncode == 2
    assert "train_batch_size was 512, is 256" in done.stderr
    assert "recipe.schedule.epochs" not in done.stderr
    never = train("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--resume", "never")
    assert never.returncode == 2
    assert "--resume never" in never.stderr


def test_a_run_that_diverges_says_at_which_step(tmp_path: Path) -> None:
    done = train(
        "--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, "--set=recipe.schedule.reference_lr=1e9"
    )
    assert done.returncode == 1
    said = re.search(
        r"recipe: (rank 0 on \S+ failed at step 2: FloatingPointError: the loss of step \d is nan.*)", done.stderr
    )
    assert said is not None, done.stderr
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith(said[1])


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = train(
            *("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT),
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
    assert done.returncode == 1
    assert f"MeetingError: the ranks could not meet at 127.0.0.1:{port}: " in done.stderr
    assert "needs a port of its own: deepspeed --master_port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    screen, stderr = open_terminal(columns=60)
    process = subprocess.Popen(
        command("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT),
        cwd=ROOT,
        env=environment(),
        stdout=stderr,
        stderr=stderr,
    )
    os.close(stderr)
    shown = shown_on(screen)
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert any(re.fullmatch(r"epoch 3/3 \S+ 0:00:00 left, 6/6 steps, loss \d\.\d+", line) for line in lines), lines[
        -20:
    ]
    # Lines that are printed while the bar stands begin at the left edge.
    assert sum(line.startswith(f"epoch {epoch}/3: top-1") for epoch in (1, 2, 3) for line in lines) == 3
    too_long = [line for line in lines if len(line) > 60]
    assert all(str(tmp_path) in line for line in too_long), too_long  # paths stay whole
