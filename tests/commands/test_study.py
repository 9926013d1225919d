"""Studies: validation, the order of runs, hand-computed results, and a real study that is ended twice and resumes."""

import contextlib
import csv
import json
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launch import ROOT, environment
from recipe.__main__ import main as recipe_command
from recipe.checkpoints import is_locked
from recipe.commands import study as study_command
from recipe.commands.study import figures as study_figures
from recipe.commands.study.figures import draw_figures
from recipe.commands.study.file import LAUNCH_LOG, Run, Study, read_study
from recipe.commands.study.results import (
    format_report,
    interval,
    last_epochs,
    missing,
    read_result,
    read_results,
    settings,
    spread,
    write_csv,
)
from recipe.commands.study.runs import Resources, Runner, check_output, command
from recipe.plan import plan_json
from recipe.reporting import Progress, steps_done
from tests.launch import DIGITS, wait_until
from tests.run_folders import step, validation, write_run

STUDIES = sorted((ROOT / "ds_configs/studies").glob("*.json"))
SHORT = {
    "recipe.data.image_size": 8,
    "recipe.schedule.epochs": 2,
    "recipe.schedule.warmup_epochs": 1,
    "recipe.schedule.decay_epochs": [1],
}


def raw_study(**changes: Any) -> dict[str, Any]:
    """A study with two cases of two seeds each."""
    return {
        "title": "Two batches",
        "paper": "the same error",
        "config": str(ROOT / "ds_configs/digits_b512.json"),
        "set": SHORT,
        "seeds": [3, 1],
        "cases": [
            {"name": "small", "label": "batch 256", "set": {"train_batch_size": 256}},
            {"name": "large", "label": "batch 512", "paper": "23.74 ± 0.09"},
        ],
        "figures": [{"draw": "curves", "title": "Both", "cases": ["small", "large"]}],
    } | changes


def write(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "study.json"
    path.write_text(json.dumps(raw))
    return path


def study(folder: Path, **changes: Any) -> Study:
    return read_study(write(folder, raw_study(**changes)), world_size=1)


def complete(run: Run, output: Path, errors: list[float]) -> None:
    """Write the files of a complete run with these validation errors in per cent and a loss of 1 / (epoch + 1)."""
    events = []
    for epoch, error in enumerate(errors):
        events += [step(epoch, 1 / (epoch + 1), steps_per_epoch=1), validation(epoch, 100 - error)]
    summary = {"median_error_last_epochs": statistics.median(errors[-5:]), "wall_seconds": 7.0}
    summary |= {"final_top1": 100 - errors[-1], "best_top1": 100 - min(errors)}
    write_run(output / run.folder, events, summary=summary)


def diverge(run: Run, output: Path, losses: Sequence[float | None] = (2.3, None)) -> None:
    """Write the files of a diverged run with these losses, two steps per epoch."""
    write_run(output / run.folder, [step(number, loss, steps_per_epoch=2) for number, loss in enumerate(losses)])


def test_difference_from_the_baseline_is_paired_by_seed(tmp_path: Path) -> None:
    """Differences 1, 2 and 3: mean 2, s = 1, and t with two degrees of freedom is 4.3027 at 97.5 %: ± 4.3027 / √3."""
    small, large = raw_study()["cases"]
    three = study(tmp_path, seeds=[0, 1, 2], cases=[small, large | {"baseline": "small"}], figures=[])
    for run in three.runs:
        large = run.case.name == "large"
        complete(run, tmp_path, [10.0 * run.seed + (run.seed + 1 if large else 0)] * 5)
    report = format_report(three, read_results(three, tmp_path, {}), "…", [])
    assert "10.00 ± 10.00 |  |" in report
    assert "12.00 ± 11.00 | +2.00 ± 2.48 |" in report
    assert interval([1.0, 2.0, 3.0, 2.0]) == pytest.approx((2.0, 3.1824 * (2 / 3) ** 0.5 / 2), rel=1e-4)


def test_shipped_studies_can_be_planned() -> None:
    names = ("warmup", "learning_rate", "batch_size", "gamma_init")
    papers = {f"{name}_{data}" for name in names for data in ("digits", "cifar10", "cifar10_small")}
    assert {path.stem for path in STUDIES} == {*papers, "beyond_digits", "local_sgd_digits", "rate_cifar10_small"}
    for found in (read_study(path, world_size=1) for path in STUDIES):
        # Settings are tuned on a seed that no comparison uses.
        assert len(found.file.seeds) >= 3 or found.file.seeds == (100,)
        assert len(found.runs) == len(found.file.seeds) * len(found.file.cases)
        assert {run.plan.config.recipe.batchnorm.statistics for run in found.runs} == {32}


def test_runs_start_seed_by_seed_and_case_overrides_win(tmp_path: Path) -> None:
    runs = [(run.case.name, run.seed) for run in study(tmp_path).runs]
    assert runs == [("small", 3), ("large", 3), ("small", 1), ("large", 1)]
    cases = [{"name": "a", "set": {"recipe.schedule.epochs": 4, "recipe.schedule.warmup": "none"}}]
    (run, _) = study(tmp_path, cases=cases, figures=[]).runs
    assert run.overrides == (
        "recipe.data.image_size=8",
        "recipe.schedule.epochs=4",
        "recipe.schedule.warmup_epochs=1",
        "recipe.schedule.decay_epochs=[1]",
        "recipe.schedule.warmup=none",
        "recipe.seed=3",
    )
    assert (run.plan.epochs, run.plan.config.recipe.seed, run.images) == (4, 3, 4 * 2 * 512)
    cifar = read_study(ROOT / "ds_configs/studies/warmup_cifar10.json", 8, data="/data/cifar10").runs
    assert {run.plan.config.recipe.data.path for run in cifar} == {"/data/cifar10"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, 'study.json: seed = 3: unknown key; did you mean "seeds"?'),
        ({"seeds": [1, 1]}, "seeds[0] = 1: it is listed twice; list each seed once"),
        ({"title": 3}, "title = 3: not a valid string; expected the title of the report"),
        ({"set": {"recipe.seed": 1}}, 'set.recipe.seed = 1: the study sets the seed; list it under "seeds"'),
        ({"config": "../no.json"}, "{above}/no.json: no such file or directory"),
        (
            {"cases": [{"label": "a"}, {"name": "b", "sets": {}, "lable": "b"}]},
            'cases[1].sets = {}: unknown key; did you mean "set"?; also cases[0].name (missing), cases[1].lable '
            "(unknown)",
        ),
        ({"cases": [{"name": "../a"}]}, 'cases[0].name = "../a": string should match pattern '),
        ({"cases": [{"name": "a" * 256}]}, "; expected the name of the case and of its folder, at most 255 letters,"),
        ({"cases": [{"name": "a"}] * 2}, 'cases[0].name = "a": another case has this name'),
        (
            {"cases": [{"name": "a", "baseline": "b"}]},
            'cases[0].baseline = "b": there is no such case; the cases are',
        ),
        (
            {"cases": [{"name": "a", "set": {"recipe.schedule.wramup": "none"}}]},
            'study.json, case "a": recipe.schedule.wramup = "none": unknown key; did you mean "warmup"?',
        ),
        (
            {"cases": [{"name": "a", "set": {"train_batch_size": 2000}}]},
            'study.json, case "a": train_batch_size = 2000: the training set has 1,442 images',
        ),
        (
            {"figures": [{"draw": "curves", "title": "t", "cases": ["smal"]}]},
            'figures[0].cases = "smal": there is no such case; the cases are small, large',
        ),
        (
            {"figures": [{"draw": "beside_baseline", "title": "t", "cases": ["small"]}]},
            "figures[0].baseline: beside_baseline needs one; name one of small, large",
        ),
        (
            {"figures": [{"draw": "curves", "title": "t", "cases": ["small"], "baseline": "large"}]},
            'figures[0].baseline = "large": curves draws none; remove it',
        ),
    ],
)
def test_mistakes_are_refused_with_key_value_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, raw_study() | {"figures": []} | changes)
    assert study_command.main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert message.replace("{above}", str(tmp_path.parent)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_is_no_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert study_command.main([DIGITS]) == 2
    assert (
        capsys.readouterr().err
        == f'recipe: {DIGITS}: this is a config, not a study; name it in a study: "config": "…"\n'
    )


def test_mean_and_sample_deviation_of_the_medians(tmp_path: Path) -> None:
    """Medians of the last five epochs: 3 of (9,) 1 … 5; 4 of 2 … 6; 8 of 8, 8, 8, 1, 1. Their deviations from the
    mean 5 are −2, −1 and 3: s² = (4 + 1 + 9) / 2 = 7.
    """
    three = study(tmp_path, seeds=[0, 1, 2], cases=raw_study()["cases"][:1], figures=[])
    for run, errors in zip(three.runs, ([9, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [8, 8, 8, 1, 1]), strict=True):
        complete(run, tmp_path, [float(error) for error in errors])
    results = read_results(three, tmp_path, {})
    assert [tuple(result.errors.values()) for result in results] == [(3.0, 5.0, 1.0), (4.0, 6.0, 2.0), (8.0, 1.0, 1.0)]
    assert spread(results) == pytest.approx((5, 7**0.5))
    assert "| batch 256 | 256 | 0.1 | 10 | 5.00 ± 2.65 | 4.00 ± 2.65 |" in format_report(three, results, "…", [])
    assert spread(results[:1]) == pytest.approx((3.0, float("nan")), nan_ok=True)


def test_incomplete_runs_are_reported_with_their_reason_and_not_averaged(tmp_path: Path) -> None:
    cases = [raw_study()["cases"][0] | {"label": "|η|", "paper": "1 | 2"}]
    six = study(tmp_path, seeds=list(range(6)), cases=cases, figures=[])
    complete(six.runs[0], tmp_path, [4.0, 2.0])
    for number in (1, 2):
        diverge(six.runs[number], tmp_path)
    for number in (3, 4):  # both have been launched, and the study saw one of them fail
        (tmp_path / six.runs[number].folder).mkdir()
        (tmp_path / six.runs[number].folder / LAUNCH_LOG).touch()
    refused = "ds_configs/x.json: fp16.enabled = true: the CPU does not support it"
    results = read_results(six, tmp_path, {six.runs[3]: refused})
    assert [(result.state, result.reason) for result in results] == [
        ("complete", ""),
        *[("diverged", "the loss of step 1 is not finite")] * 2,
        ("failed", refused),
        ("interrupted", "0 of 10 steps are done"),
        ("not started", ""),
    ]
    without = "2 of 6 diverged, 1 of 6 failed, 1 of 6 interrupted, 1 of 6 not started"
    assert (missing(results), missing(results[1:3]), missing(results[:1])) == (without, "diverged", "")
    report = format_report(six, results, "…", [])
    assert f"| \\|η\\| | 256 | 0.1 | 10 | 3.00, {without} | 2.00 | 1 \\| 2 |" in report
    assert f"- |η|, seed 3: failed: {refused}\n" in report
    assert "- |η|, seed 4: interrupted: 0 of 10 steps are done\n" in report
    assert "- not started: 1 of 6 runs\n" in report
    metrics = tmp_path / six.runs[1].folder / "metrics.jsonl"
    overflow = step(2, None, skipped=True, loss_scale=65536.0)  # fp16 skips it
    metrics.write_text(metrics.read_text() + json.dumps(overflow) + "\n")
    assert read_result(six.runs[1], tmp_path).state == "interrupted"


def test_csv_has_one_line_per_run_and_the_report_one_row_per_case(tmp_path: Path) -> None:
    two = study(tmp_path)
    for run, error in zip(two.runs, (2.0, 3.0, 4.0, 5.0), strict=True):
        complete(run, tmp_path, [error])
    results = read_results(two, tmp_path, {})
    write_csv(two, results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = [("small", "3"), ("small", "1"), ("large", "3"), ("large", "1")]
    assert [(row["case"], row["seed"]) for row in rows] == order
    first = {"median_error_percent": "2.0000", "final_error_percent": "2.0000", "wall_seconds": "7.0"}
    assert rows[0] | first | {"train_batch_size": "256", "peak rate": "0.1"} == rows[0]
    assert rows[2] | {"peak rate": "0.2", "steps": "4", "state": "complete"} == rows[2]
    report = format_report(two, results, "python -m recipe study …", draw_figures(two, results, tmp_path))
    assert "| case | train_batch_size | peak rate | steps | median error, % | final error, % | the paper" in report
    assert "| batch 256 | 256 | 0.1 | 10 | 3.00 ± 1.41 | 3.00 ± 1.41 |  |" in report
    assert "| batch 512 | 512 | 0.2 | 4 | 4.00 ± 1.41 | 4.00 ± 1.41 | 23.74 ± 0.09 |" in report
    assert "the median of the last 2 epochs of each run" in report
    assert "Not complete" not in report
    assert "time: 0.5 minutes, the sum over the complete runs\n" in report  # 4 × 7 s
    assert f"date: {date.today().isoformat()}" in report
    assert "![Both](curves.png)" in report


def test_every_key_that_a_case_sets_is_a_column(tmp_path: Path) -> None:
    other = {"recipe.schedule.decay_epochs": [1, 2], "bf16": {"enabled": True}, "recipe.model.name": "test_vit"}
    two = study(tmp_path, cases=[{"name": "usual"}, {"name": "other", "set": other}], seeds=[0], figures=[])
    derived = {"peak rate": "0.2", "steps": "4"}
    assert [settings(two, run) for run in two.runs] == [
        {"recipe.schedule.decay_epochs": "[1.0]", "bf16": "–", "recipe.model.name": "test_resnet"} | derived,
        {"recipe.schedule.decay_epochs": "[1.0, 2.0]", "bf16": '{"enabled": true}', "recipe.model.name": "test_vit"}
        | derived,
    ]


def test_report_names_the_epochs_of_the_median(tmp_path: Path) -> None:
    texts = {(1,): "the last epoch", (7, 5): "the last 5 epochs", (9, 2): "the last 2 to 5 epochs"}
    for epochs, text in texts.items():
        cases = [{"name": f"e{number}", "set": {"recipe.schedule.epochs": number}} for number in epochs]
        assert last_epochs(study(tmp_path, cases=cases, figures=[]).runs) == text


FIGURES = [
    {"draw": "curves", "title": "t", "cases": ["small", "large"]},
    {"draw": "error_by_batch_size", "title": "t", "cases": ["small", "large"]},
    {"draw": "beside_baseline", "title": "t", "cases": ["large"], "baseline": "small"},
]


def test_every_kind_of_figure_is_drawn_once_there_is_data(tmp_path: Path) -> None:
    drawn = study(tmp_path, figures=FIGURES)
    nothing, some = tmp_path / "nothing", tmp_path / "some"
    for output in (nothing, some):
        output.mkdir()
    results = read_results(drawn, nothing, {})
    assert draw_figures(drawn, results, nothing) == [None] * 3
    assert list(nothing.iterdir()) == []
    assert 'No picture of "t": there is nothing to draw yet.\n' in format_report(drawn, results, "…", [None] * 3)
    complete(drawn.runs[0], some, [50.0, 20.0, 3.0])
    diverge(drawn.runs[1], some)
    results = read_results(drawn, some, {})
    pictures = draw_figures(drawn, results, some)
    assert [picture and picture.name for picture in pictures] == [f"{figure['draw']}.png" for figure in FIGURES]
    assert all(picture and picture.with_suffix(".svg").stat().st_size > 1000 for picture in pictures)
    cases = {"small": results[:2], "large": results[2:]}
    (axes,) = study_figures._error_by_batch_size(drawn.file.figures[1], cases, some).axes
    assert axes.get_ylabel() == ("top-1 validation error, %: median of the last 2 epochs,\nmean ± std over the seeds")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "linear scaling (256: 1 of 2 not\nstarted; 512: 1 of 2 diverged, 1\nof 2 not started)"
    ]


def test_curves_are_means_over_the_seeds_and_the_legend_names_missing_runs(tmp_path: Path) -> None:
    """Mean losses: 1, 1/2, 1/3 of the complete run; 2 = (1.5 + 2.5) / 2, then infinity of the other."""
    both = study(tmp_path, figures=FIGURES)
    complete(both.runs[0], tmp_path, [50.0, 20.0, 3.0])
    diverge(both.runs[1], tmp_path, losses=[1.5, 2.5, 1.8, None])
    results = read_results(both, tmp_path, {})
    cases = {"small": results[:1], "large": results[2:]}
    losses, errors = study_figures._curves(both.file.figures[0], cases, tmp_path).axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "batch 256",
        "batch 512 (1 of 2 diverged, 1 of\n2 not started)",
    ]
    assert [list(line.get_ydata()) for line in losses.lines] == [[1, 1 / 2, 1 / 3], [2.0]]
    assert [list(line.get_ydata()) for line in errors.lines] == [[50.0, 20.0, 3.0], []]
    four = both.file.figures[2].model_copy(update={"cases": ("large",) * 4})
    panels = study_figures._curves(four, cases, tmp_path).axes
    assert [axes.get_subplotspec().rowspan.start for axes in panels] == [0, 0, 0, 1]


def test_folder_of_a_different_run_is_refused(tmp_path: Path) -> None:
    before, now = study(tmp_path), study(tmp_path, set=SHORT | {"recipe.schedule.epochs": 3})
    folder = tmp_path / before.runs[0].folder
    folder.mkdir(parents=True)
    check_output(now, tmp_path)
    (folder / "plan.json").write_text(plan_json(before.runs[0].plan))
    check_output(before, tmp_path)
    with pytest.raises(ValueError, match=r"seed-3 belongs to a different run: recipe\.schedule\.epochs was 2, is 3;"):
        check_output(now, tmp_path)
    (folder / "plan.json").write_text("[]")
    check_output(now, tmp_path)
    (tmp_path / "plan.json").touch()
    with pytest.raises(ValueError, match="is the folder of a run; name another --output"):
        check_output(now, tmp_path)


def test_run_that_outlived_a_killed_study_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = study(tmp_path)
    folder = tmp_path / asked.runs[0].folder
    hold = "import sys; from pathlib import Path; from recipe.checkpoints.locking import lock; "
    hold += f"held = lock(Path({str(folder)!r})); print(flush=True); sys.stdin.read()"
    started = []
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        end = holder.stdin.close
        runner = Runner(asked, tmp_path, Resources(None, 1))
        monkeypatch.setattr(runner, "_start", lambda run, slot: started.append((run, is_locked(folder))))
        monkeypatch.setattr("recipe.commands.study.runs.time.sleep", lambda seconds: (end(), holder.wait()))
        runner.run()
    assert f"another process is writing to {folder}: waiting for it" in capsys.readouterr().out
    assert (asked.runs[0], False) in started
    assert {run for run, _ in started} == set(asked.runs)


def test_launch_that_outlived_a_killed_study_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ranks still import torch, and have not locked the run's folder."""
    asked = study(tmp_path)
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr("recipe.commands.study.runs.command", lambda *_: words)
    killed, runner = Runner(asked, tmp_path, Resources(None, 1)), Runner(asked, tmp_path, Resources(None, 1))
    with Progress(1, done=0) as killed._progress:
        killed._start(asked.runs[0], 0)
    launcher = killed._running[0][1]
    started = []
    monkeypatch.setattr(runner, "_start", lambda run, slot: started.append((run, launcher.returncode is not None)))
    monkeypatch.setattr("recipe.commands.study.runs.time.sleep", lambda seconds: (launcher.kill(), launcher.wait()))
    runner.run()
    assert f"another process is writing to {tmp_path / asked.runs[0].folder}: waiting" in capsys.readouterr().out
    assert (asked.runs[0], True) in started
    assert {run for run, _ in started} == set(asked.runs)


def test_different_split_is_refused_if_batch_norm_sees_other_images(tmp_path: Path) -> None:
    """256 images on one rank are two micro-batches of 128."""

    def split_into(statistics: str | int, world_size: int, micro_batch: int) -> Study:
        batch = {"train_batch_size": 256, "train_micro_batch_size_per_gpu": micro_batch}
        cases = [{"name": "a", "set": batch | {"recipe.batchnorm.statistics": statistics}}]
        return read_study(write(tmp_path, raw_study(cases=cases, seeds=[0], figures=[])), world_size)

    (tmp_path / "a/seed-0").mkdir(parents=True)
    splits = (("global", 2, 128, 256), ("local", 1, 64, 64), ("local", 2, 128, 0), (32, 1, 64, 0))
    for kind, *split, images in splits:
        (tmp_path / "a/seed-0/plan.json").write_text(plan_json(split_into(kind, 1, 128).runs[0].plan))
        message = f"a different run: images in recipe.batchnorm.statistics were 128, are {images}; name"
        with pytest.raises(ValueError, match=message) if images else contextlib.nullcontext():
            check_output(split_into(kind, *split), tmp_path)


def test_run_is_launched_by_the_command_that_a_person_would_type(tmp_path: Path) -> None:
    one, output = study(tmp_path), Path("runs/study")
    words = command(one, one.runs[0], output, Resources(None, ranks=2))
    port = words[words.index("--master_port") + 1]
    assert 1024 <= int(port) <= 65535
    config = str(ROOT / "ds_configs/digits_b512.json")
    head = ["--master_port", port, "--num_gpus", "2", str(ROOT / "recipe/train.py"), "--deepspeed_config", config]
    assert words[1:12] == [*head, "--output", "runs/study/small/seed-3", "--set", "recipe.data.image_size=8"]
    assert words[-2:] == ["--set", "recipe.seed=3"]
    hosts = command(one, one.runs[0], output, Resources(Path("hostfiles/H"), ranks=4))
    assert hosts[1:4] == ["--hostfile", "hostfiles/H", str(ROOT / "recipe/train.py")]


def test_ctrl_c_before_the_first_launch_is_reported_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_command, "read_study", interrupt)
    monkeypatch.setattr(sys, "argv", ["recipe", "study", "study.json"])
    assert recipe_command() == 130
    assert capsys.readouterr().err == "recipe: ended by SIGINT\n"


def test_parallel_runs_share_cores_and_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    shared, gpus = Resources(None, ranks=2, jobs=2), Resources(None, ranks=2, jobs=2, gpus=4)
    photos = {"recipe.data.source": "imagefolder", "recipe.data.path": "photos"}
    photos |= {"recipe.data.train_images": 1024, "recipe.data.validation_images": 64}
    two = read_study(write(tmp_path, raw_study(set={**SHORT, **photos})), 2, cores_per_rank=shared.cores_per_rank())
    words = command(two, two.runs[0], tmp_path, gpus, slot=1)
    assert words[3:5] == ["--include", "localhost:2,3"]
    # 16 cores are 4 per rank, one of them for training.
    assert words[-2:] == ["--set", "recipe.data.workers=3"]
    for resources in (shared, Resources(None, ranks=2, gpus=4)):
        assert command(two, two.runs[0], tmp_path, resources, slot=1)[3:5] == ["--num_gpus", "2"]
    assert Resources(None, ranks=2).cores_per_rank() is None
    with pytest.raises(ValueError, match=r"--jobs 3 with --num_gpus 2 takes 6 GPUs, and .* has 4; at most --jobs 2"):
        Resources(None, ranks=2, jobs=3, gpus=4)
    with pytest.raises(SystemExit, match="2"):
        study_command.main(["study.json", "--hostfile", "hostfiles/localhost", "--jobs", "2"])
    assert "--jobs is for one machine" in capsys.readouterr().err


def run_with(monkeypatch: pytest.MonkeyPatch, one: Study, output: Path, script: str) -> Runner:
    """Run a study whose launches are a shell script: $0 is the run's folder, $1 the config as its messages name it."""

    def words(of: Study, run: Run, output: Path, resources: Resources, slot: int) -> list[str]:
        changed = f"{of.config} (with {' '.join(f'--set {override}' for override in run.overrides)})"
        return ["sh", "-c", script, str(output / run.folder), changed]

    monkeypatch.setattr("recipe.commands.study.runs.command", words)
    monkeypatch.setattr("recipe.commands.study.runs.POLL_SECONDS", 0.02)
    runner = Runner(one, output, Resources(None, 1))
    runner.run()
    return runner


def test_failure_affects_no_other_run_and_refusal_only_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    six = study(tmp_path, seeds=[0, 1], cases=[{"name": name} for name in "abc"], figures=[])
    script = """case $0 in
    */a/*) echo "Killed"; exit 1;;
    */b/*) echo "recipe: $1: no such model"; exit 2;;
    *) echo "recipe: no"; echo "ended by SIGTERM, saved"; echo "[launch.py] exits"; exit 143;;
    esac"""
    runner = run_with(monkeypatch, six, tmp_path / "case", script)
    names = ["a, seed 0", "b, seed 0", "c, seed 0", "a, seed 1", "c, seed 1"]
    assert [str(run) for run in runner.failures] == names
    reasons = [reason.partition(" (")[0] for reason in runner.failures.values()]
    config = f"{ROOT / 'ds_configs/digits_b512.json'}"
    assert reasons[:3] == ["Killed", f"{config}: no such model", "ended by SIGTERM, saved"]
    assert "started 1 of 6: a, seed 0\n[1/6] a, seed 0: failed: Killed (" in capsys.readouterr().out
    # What is wrong with a run's folder concerns no other run.
    script = 'echo "recipe: another run is writing to $0"; exit 2'
    assert len(run_with(monkeypatch, six, tmp_path / "folder", script).failures) == 6
    assert study_command.main([str(tmp_path / "study.json"), "--output", str(tmp_path / "command")]) == 1
    assert "recipe: c, seed 1 failed: " in capsys.readouterr().err


def test_signal_is_passed_on_and_nothing_more_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = study(tmp_path, seeds=[0], cases=[{"name": name} for name in "ab"], figures=[])
    script = "trap 'touch $0/saved; exit 143' TERM; kill -TERM $PPID; sleep 60 & wait"
    runner = run_with(monkeypatch, two, tmp_path, script)
    assert (runner.stopped_by, runner.failures, runner.over) == (signal.SIGTERM, {}, 1)
    assert (tmp_path / "a/seed-0/saved").exists()
    assert not (tmp_path / "b").exists()


def test_study_in_the_docs_can_be_planned(tmp_path: Path) -> None:
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    (example,) = [block.partition("```")[0] for block in page.split("```json\n")[1:]]
    (tmp_path / "digits_b512.json").write_text((ROOT / "ds_configs/digits_b512.json").read_text())
    (tmp_path / "studies").mkdir()
    path = tmp_path / "studies/mine.json"
    path.write_text(example)
    assert len(read_study(path, world_size=1).runs) == 4


@pytest.mark.slow
def test_study_resumes_after_a_signal(tmp_path: Path) -> None:
    """One run fails, because its folder cannot be locked, and is tried again by the next command; another diverges."""
    cases = [
        {"name": "short", "label": "short", "set": {"recipe.schedule.epochs": 1}},
        {"name": "wild", "label": "wild", "set": {"recipe.schedule.scaling_rule": "none", "optimizer.params.lr": 1e15}},
        {"name": "long", "label": "long", "set": {"recipe.schedule.epochs": 25}},
    ]
    path, output = write(tmp_path, raw_study(seeds=[0], cases=cases, figures=[])), tmp_path / "out"
    words = [sys.executable, "-m", "recipe", "study", str(path), "--output", str(output)]
    long, lock = output / "long/seed-0", output / "short/seed-0/.lock"
    lock.mkdir(parents=True)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = start()
    wait_until(lambda: steps_done(long) > 0, seconds=600)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 143, said
    for line in ("started 1 of 3: short, seed 0\n", "[1/3] short, seed 0: failed: ", "[2/3] wild, seed 0: diverged"):
        assert f"\n{line}" in said
    assert re.search(r"^recipe: short, seed 0 failed: .*\.lock \(Is a directory\).*launch\.log", said, re.MULTILINE)
    (row,) = read_rows(output, "long")
    done = steps_done(long)
    assert f"\n- long, seed 0: interrupted: {row['reason']}\n" in said
    assert row["state"] == "interrupted"
    assert 0 < int(row["reason"].split()[0]) <= done
    assert "the same command resumes them" in said
    assert not is_locked(long)

    lock.rmdir()
    launched = (output / "wild/seed-0" / LAUNCH_LOG).stat().st_mtime_ns
    second = start()
    wait_until(lambda: steps_done(long) > done, seconds=600)
    refused = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    assert "another run is writing to" in refused.stderr
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said
    assert "1 run already over" in said
    assert "[3/3] long, seed 0: median error" in said
    rows = [read_rows(output, case)[0] for case in ("short", "wild", "long")]
    assert [row["state"] for row in rows] == ["complete", "diverged", "complete"]
    assert (output / "wild/seed-0" / LAUNCH_LOG).stat().st_mtime_ns == launched


def read_rows(output: Path, case: str) -> list[dict[str, str]]:
    with (output / "results.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["case"] == case]
