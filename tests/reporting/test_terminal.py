"""Terminal output at several widths, and without a terminal."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.commands.hosts import format_table
from recipe.commands.plan_screen import Answer, format_answers
from recipe.config import read_config
from recipe.plan import SHIPPED, Link, format_plan, make_plan
from recipe.reporting import terminal
from recipe.reporting.summary import format_summary
from recipe.reporting.terminal import Progress
from tests.commands.test_hosts import good_hosts
from tests.launch import ROOT, open_terminal, shown_on

FACTS = SHIPPED["resnet50", 1000]
PLANS = [make_plan(read_config(f"ds_configs/resnet50_b{batch}.json"), 32) for batch in (8192, 256)]
ANSWERS = [Answer(plan, FACTS, 2500.0, "assumed", Link(12.5e9, 20e-6), "100 Gbit/s", 80 * 2**30) for plan in PLANS]
SUMMARY = {
    "model": "resnet50", "data": "imagefolder", "epochs": 90, "global_batch": 8192, "final_global_batch": 8192,
    "train_images": 1_281_167, "precision": "fp16", "weights": "trained", "noise_scale": None,
    "world_size": 32, "hosts": 4, "device": "NVIDIA H100 80GB HBM3", "final_top1": 76.26, "best_top1": 76.31,
    "best_epoch": 88, "median_error_last_epochs": 23.74, "images_per_second": 72138.0, "steps": 14040,
    "skipped_steps": 3, "wall_seconds": 3600.0, "best_checkpoint": "runs/b8192/checkpoints/step-00013884",
    "bad_images": ["a.jpg"], "decoded_by_pil": 23, "versions": {},
}  # fmt: skip


def words(text: str) -> list[str]:
    return text.replace(" \\\n", " ").split()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_texts_fit_the_width_without_breaking_words(width: int) -> None:
    for show in (
        lambda width: format_answers(ANSWERS, width=width),
        lambda width: format_answers(ANSWERS[:1], width=width),
        lambda width: format_table(good_hosts(2), width),
        lambda width: format_plan(PLANS[0], width),
        lambda width: format_summary(SUMMARY, Path("runs/b8192"), width=width),
    ):
        text = show(width)
        assert max(map(len, text.splitlines())) <= width
        assert set(words(text)) == set(words(show(10_000)))


BAR = """
from recipe.reporting import terminal
terminal.REFRESH_SECONDS = 0
with terminal.Progress(1_405_000, "steps", done=1_000) as progress:
    for step in range(1_001, 1_004):
        progress.update(step, "epoch 100/100", "loss 2.345", "72,138 images/s", "rate 0.00032")
    progress.say("epoch 100/100: top-1 76.26 %, top-5 93.01 %, loss 1.0123 on 50,000 validation images")
"""


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, r"1,003/1,405,000 steps"),
        (80, r"1,003/1,405,000 steps, loss 2\.345"),
        (120, r"1,003/1,405,000 steps, loss 2\.345, 72,138 images/s, rate 0\.00032"),
    ],
)
def test_a_narrow_bar_keeps_the_time_left_and_omits_figures(width: int, shown: str) -> None:
    screen, end = open_terminal(width)
    variables = {name: os.environ[name] for name in os.environ.keys() - {"COLUMNS"}} | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", BAR], cwd=ROOT, stdout=end, stderr=end, env=variables):
        os.close(end)
        seen = shown_on(screen)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen)
    lines = [line for line in re.split(r"[\r\n]+", text) if line]
    assert max(map(len, lines)) <= width
    assert re.fullmatch(rf"epoch 100/100 \S{{8,}} \d+:\d\d:\d\d left, {shown}", lines[-1]), lines[-1]
    (said,) = (number for number, line in enumerate(lines) if line.startswith("epoch 100/100: top-1 76.26 %, "))
    assert " ".join(lines[said : said + 2]).endswith("on 50,000 validation images") or width == 120
    assert seen.count("\x1b[?25h") >= seen.count("\x1b[?25l")  # the cursor is visible


def test_progress_without_a_terminal_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take a file for a terminal
    now = 1000.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Progress(1_281_167, "images") as progress:
        for seconds, images in ((0, 500_000), (61, 500_000), (100, 530_000), (122, 561_000)):
            now = 1000.0 + seconds
            progress.update(images, "95/256 shards", f"{progress.speed:,.0f} images/s")
        progress.say(f"{'a long line ' * 20}stays one line")
    with Progress(3 * 2**30) as progress:
        now += 61
        progress.add(2**30)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "95/256 shards: -:--:-- left, 500,000/1,281,167 images, 0 images/s",
        # 61,000 in 122 s and 720,167 left: the first update can include the work of an earlier launch.
        "95/256 shards: 0:24:01 left, 561,000/1,281,167 images, 300 images/s",
        f"{'a long line ' * 20}stays one line",
        "-:--:-- left, 33%",
    ]


def test_a_misspelt_required_option_is_suggested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--deepspeed_confg", "x.json"])
    parser = terminal.Parser()
    parser.add_argument("--deepspeed_config", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args()
    assert capsys.readouterr().err.endswith("required: --deepspeed_config; did you mean --deepspeed_config?\n")


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (terminal.within(1, 9999), {"1": 1, "9999": 9999}, ["0", "10000", "1.5", "x", ""]),
        (terminal.within(1e-3, 1e9), {"0.001": 0.001, "2500": 2500.0}, ["0", "-3", "nan", "inf", "x"]),
    ],
)
def test_a_number_within_bounds(kind: Callable[[str], float], right: dict[str, float], wrong: list[str]) -> None:
    assert {text: kind(text) for text in right} == right
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="number from"):
            kind(text)
