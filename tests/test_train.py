"""Real runs of ``recipe/train.py``: their output, how they end, and what they refuse."""

import json
import os
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from recipe.checkpoints.manifest import find
from recipe.commands.export import main as export_command
from tests.golden import FP64, GOLDEN
from tests.launch import (
    DIGITS,
    SHORT,
    SIX_STEPS,
    complete_run,
    environment,
    events,
    losses,
    open_terminal,
    recipe,
    run_script,
    shown_on,
    train,
    train_ok,
    wait_until,
)
from tests.ranks import fork

pytestmark = pytest.mark.slow


def test_output_of_a_run(tmp_path: Path) -> None:
    """Six steps of the digits on one rank, and the same command again, which trains nothing."""
    output = tmp_path / "run"
    printed = complete_run(output)
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
    best = output / "checkpoints" / Path(summary["best_checkpoint"]).name
    saved = torch.load(best / "mp_rank_00_model_states.pt", weights_only=True)
    timm.create_model("test_resnet", num_classes=10).load_state_dict(saved["module"])
    assert "Plan of ds_configs/digits_b512.json" in printed
    assert "epoch 3/3: top-1" in printed
    assert "best weights" in printed
    assert "run/plan.json" in printed
    metrics = (output / "metrics.jsonl").read_bytes()
    again = train_ok("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    assert "is already complete, and nothing was trained" in again.stdout
    assert "best weights" in again.stdout
    assert (output / "metrics.jsonl").read_bytes() == metrics


def test_golden_losses(tmp_path: Path) -> None:
    """The seeded run as it was when ``python -m tests.golden`` wrote the file."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    for name, *precision in (("fp64", FP64), ("fp32",)):
        train_ok("--deepspeed_config", DIGITS, "--output", str(tmp_path / name), *SIX_STEPS, *precision)
    assert losses(tmp_path / "fp64") == pytest.approx(golden, rel=1e-9)
    # fp32 trains the same but for rounding.
    assert losses(tmp_path / "fp32")[:2] == pytest.approx(golden[:2], rel=1e-6)
    assert losses(tmp_path / "fp32") == pytest.approx(golden, rel=1e-2)


def test_plan_json_repeats_the_run(tmp_path: Path) -> None:
    complete_run(tmp_path / "run")
    plan = tmp_path / "run/plan.json"
    train_ok("--deepspeed_config", str(plan), "--output", str(tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    assert (tmp_path / "again/plan.json").read_text() == plan.read_text()


def test_two_ranks_write_one_run_and_are_quiet(tmp_path: Path) -> None:
    """After the plan, only our own lines and the launcher's are printed. Checkpoints are written by the clock, too."""
    output, extensions = tmp_path / "run", tmp_path / "extensions"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT, "--set=recipe.checkpoint.keep_last=9")
    arguments += ("--set=recipe.checkpoint.every_minutes=0.0001",)  # less than a step takes
    done = train_ok(*arguments, ranks=2, launcher=True, OMP_NUM_THREADS="", TORCH_EXTENSIONS_DIR=str(extensions))
    assert "512 = 2 ranks × 2 accumulation steps × micro-batch of 128" in done.stdout
    assert done.stdout.count("Plan of") == 1
    assert [step["step"] for step in events(output, "step")] == [0, 1, 2, 3, 4, 5]
    assert [v["count"] for v in events(output, "validation")] == [355, 355, 355]
    assert [checkpoint.step for checkpoint in find(output / "checkpoints")] == [6, 5, 4, 3, 2, 1]
    # Each rank takes its share of the cores, and DeepSpeed compiles nothing.
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"2 ranks on CPU, {share} thread" in done.stdout
    assert not list(extensions.rglob("*.so"))
    ours = done.stdout[done.stdout.index("Plan of") :].splitlines()
    assert [line for line in ours if line.startswith("[") and "[launch.py:" not in line] == []
    assert "Warning" not in done.stderr


# On CPUs without AVX-512, bf16 and fp16 take 30 times as long as fp32.
SMALL = (
    "--set=recipe.model.name=test_efficientnet",
    '--set=recipe.data={"source": "synthetic", "image_size": 8, "train_images": 64, "validation_images": 16}',
    "--set=train_batch_size=32",
)


FP16 = ['--set=fp16={"enabled": true, "initial_scale_power": 14, "hysteresis": 1, "loss_scale_window": 2}', *SMALL]


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, ["--set=zero_optimization.stage=1"]),
        (2, ["--set=zero_optimization.stage=3"]),
        (1, ["--set=bf16.enabled=true", *SMALL]),
        (1, FP16),
    ],
    ids=["ZeRO stage 1", "ZeRO stage 3", "bf16", "fp16"],
)
def test_zero_and_half_precision_train_and_resume(tmp_path: Path, ranks: int, changes: Sequence[str]) -> None:
    arguments = ["--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, *changes]
    # The script of the kill tests trains in fp16 on any CPU.
    whole = train(*arguments, ranks=ranks, script="benchmarks/killed_train.py")
    assert whole.returncode == 0, whole.stderr
    reported = [(line["loss"], line["loss_scale"], line["skipped"]) for line in events(tmp_path, "step")]
    assert reported[-1][0] < reported[0][0]
    if changes is FP16:
        assert_scaled_by_deepspeeds_rule([(loss_scale, skipped) for _, loss_scale, skipped in reported])
    # As if it had been killed before the last epoch ended.
    (tmp_path / "summary.json").unlink()
    (find(tmp_path / "checkpoints")[0].path / "manifest.json").unlink()
    resumed = train(*arguments, ranks=ranks, script="benchmarks/killed_train.py")
    assert "resumed from" in resumed.stdout
    assert [(line["loss"], line["loss_scale"], line["skipped"]) for line in events(tmp_path, "step")] == reported


def assert_scaled_by_deepspeeds_rule(steps: Sequence[tuple[float, bool]]) -> None:
    """An overflow halves the scale; a good step doubles it if an even number of good steps, above 0, precedes it.

    Which steps overflow depends on how the CPU rounds.
    """
    scale, good = 2.0**14, 0
    for loss_scale, skipped in steps:
        assert loss_scale == scale
        scale *= 0.5 if skipped else 2 if good and good % 2 == 0 else 1
        good = 0 if skipped else good + 1
    assert steps[0][1], "the first update overflows"
    assert scale > min(loss_scale for loss_scale, _ in steps), "the scale grows again"


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


def test_all_large_batch_options_together_resume_bit_for_bit_and_are_exported(tmp_path: Path) -> None:
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

    # Checkpoints and summary use the averaged weights' accuracy, and evaluate and export use these weights.
    best = max(reversed(lines[1]), key=lambda line: line["ema_top1"])
    manifest = json.loads((tmp_path / f"checkpoints/step-{best['step'] + 1:08}/manifest.json").read_text())
    assert manifest["top1"] == best["ema_top1"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best_top1"], summary["final_top1"]) == (best["ema_top1"], lines[1][-1]["ema_top1"])
    errors = sorted(100 - line["ema_top1"] for line in lines[1])
    assert summary["median_error_last_epochs"] == errors[len(errors) // 2]
    assert summary["best_checkpoint"] == str(tmp_path / f"checkpoints/step-{best['step'] + 1:08}")
    assert "all of the averaged weights" in " ".join(done.stdout.split())
    assert recipe("evaluate", str(tmp_path)).returncode == 0
    measured = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert (measured["top1"], measured["loss"]) == (best["ema_top1"], best["ema_loss"])
    assert export_command([str(tmp_path)]) == 0
    card = (tmp_path / "export/README.md").read_text()
    assert f"top-1 {best['ema_top1']:.2f} %" in card
    assert "**Weights:** the moving average of those trained, in fp32" in card


def test_deepspeeds_own_sections(tmp_path: Path) -> None:
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


def image_folder(folder: Path) -> Path:
    """Two classes, red and blue, as JPEGs of uneven sizes; one training image is a text file with an odd name."""
    for part, count in (("train", 12), ("val", 5)):
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


def test_image_folder_with_a_bad_image(tmp_path: Path) -> None:
    data, output = image_folder(tmp_path / "data"), tmp_path / "run"
    bad = f"{data}/train/red/caf\\udce9\\u000a.jpg"
    Image.open(data / "val/red/0.jpg").save(data / "val/red/0.jpg", "PNG")
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), "--data", str(data), *FOLDER_RUN)
    stopped = train(*arguments, ranks=2)
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
    skipped = train_ok(*arguments, "--set=recipe.data.on_bad_image=skip", "--output", str(tmp_path / "skip"), ranks=2)
    summary = json.loads((tmp_path / "skip/summary.json").read_text())
    assert summary["bad_images"] == [bad]
    assert summary["decoded_by_pil"] == 2  # once each epoch
    assert summary["steps"] == 6
    assert [v["count"] for v in events(tmp_path / "skip", "validation")] == [10, 10]
    assert "1 could not be read" in skipped.stdout
    counted = json.loads((tmp_path / "skip/plan.json").read_text())["recipe"]["data"]
    assert (counted["train_images"], counted["validation_images"]) == (24, 10)
    # A complete run does not look at its data again, and says so if another folder is named.
    (tmp_path / "link").symlink_to(data)
    shutil.copytree(data, tmp_path / "copy")
    for other, remark in (("link", ""), ("copy", f" (on {data}; {tmp_path}/copy was not used)")):
        again = train_ok(*arguments, "--output", str(tmp_path / "skip"), "--data", str(tmp_path / other))
        assert f"skip is already complete{remark}, and nothing was trained; use another --output" in again.stdout


def test_refusal_by_the_launcher(tmp_path: Path) -> None:
    """Exit code 2, one line and no traceback."""
    run = ("--deepspeed_config", DIGITS, "--output", str(tmp_path / "run"), *SHORT)
    done = train(*run, "--resume=must", ranks=2, launcher=True)
    assert not (tmp_path / "run").exists()
    assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("recipe: ")]
    assert "holds no checkpoint" in line
    assert "Traceback" not in done.stderr + done.stdout


def test_different_run_in_the_same_output_is_refused(tmp_path: Path) -> None:
    complete_run(tmp_path)
    done = train("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, "--set=train_batch_size=256")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("recipe: ")]
    assert f"{tmp_path} belongs to a different run: train_batch_size was 512, is 256" in line
    assert "recipe.schedule.epochs" not in line
    assert "Traceback" not in done.stderr


def test_diverged_run_names_the_step(tmp_path: Path) -> None:
    done = train(
        "--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, "--set=recipe.schedule.reference_lr=1e9"
    )
    assert done.returncode == 1
    said = re.search(
        r"recipe: (rank 0 on \S+ failed at step 2: FloatingPointError: the loss of step \d is nan.*)", done.stderr
    )
    assert said is not None, done.stderr
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith(said[1])


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = train(
            *("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT),
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
    assert done.returncode == 1
    assert f"MeetingError: the rendezvous at 127.0.0.1:{port} failed: " in done.stderr
    assert "needs its own port: deepspeed --master_port" in done.stderr
    assert "Traceback" not in done.stderr


def _train_on_terminal(terminal: str, words: list[str]) -> None:
    descriptor = os.open(terminal, os.O_RDWR)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    run_script(words)


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    screen, side = open_terminal(columns=60)
    words = ["recipe/train.py", "--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT]
    process = fork(tmp_path / "words", environment(), _train_on_terminal, os.ttyname(side), words)
    wait_until((tmp_path / "plan.json").exists)
    os.close(side)
    shown = shown_on(screen)
    process.join(60)
    assert process.exitcode == 0
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    bar = r"epoch 3/3 \S+ 0:00:00 left, 6/6 steps, loss \d\.\d+"
    assert any(re.fullmatch(bar, line) for line in lines), lines[-20:]
    # Lines printed above the bar begin at the left edge.
    assert sum(line.startswith(f"epoch {epoch}/3: top-1") for epoch in (1, 2, 3) for line in lines) == 3
    too_long = [line for line in lines if len(line) > 60]
    assert all(str(tmp_path) in line for line in too_long), too_long  # paths are not wrapped
