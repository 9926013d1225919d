"""Studies: strict files, the order of runs, hand-computed figures, and a real one that is ended twice and resumes."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launch import ROOT, environment
from recipe.__main__ import main as recipe_command
from recipe.checkpoints import History, is_locked
from recipe.commands import study as study_command
from recipe.commands.study import figures as study_figures
from recipe.commands.study.figures import draw_figures
from recipe.commands.study.file import Study, Training, read_study
from recipe.commands.study.results import (
    format_report,
    interval,
    last_epochs,
    missing,
    read_results,
    settings,
    spread,
    write_csv,
)
from recipe.commands.study.runs import LAUNCH_LOG, Runner, Where, _last_word, check_output, command, ending
from recipe.config import ConfigError
from recipe.distributed import versions
from recipe.plan import plan_json
from recipe.reporting import summarise

STUDIES = sorted((ROOT / "ds_configs/studies").glob("*.json"))
SHORT = {
    "recipe.data.image_size": 8,
    "recipe.schedule.epochs": 2,
    "recipe.schedule.warmup_epochs": 1,
    "recipe.schedule.decay_epochs": [1],
}


def raw_study(**changes: Any) -> dict[str, Any]:
    """A study of two cases with two seeds each."""
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


def complete(training: Training, output: Path, errors: list[float]) -> None:
    """Leave what a run leaves: the validation errors, in per cent, of its epochs, and a loss of 1 / (epoch + 1)."""
    folder = output / training.folder
    folder.mkdir(parents=True)
    validations, lines = [], []
    for epoch, error in enumerate(errors):
        step = {"event": "step", "step": epoch, "epoch": epoch, "loss": 1 / (epoch + 1)}
        validation = {"event": "validation", "step": epoch, "epoch": epoch, "top1": 100 - error, "top5": 100.0}
        validations.append(validation)
        lines += [json.dumps(step | {"skipped": False, "loss_scale": 1.0}), json.dumps(validation)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = summarise(
        training.plan,
        History(validations, seconds=7.0),
        device="CPU",
        hosts=1,
        skipped_steps=0,
        images_per_second=9.0,
        best_checkpoint=None,
        classes=(),
        versions=versions(),
    )
    (folder / "summary.json").write_text(json.dumps(summary))


def diverge(training: Training, output: Path, losses: Sequence[float | None] = (2.3, None)) -> None:
    """Leave what a run leaves that diverged: the losses of its steps, two an epoch."""
    folder = output / training.folder
    folder.mkdir(parents=True)
    usual = {"event": "step", "skipped": False, "loss_scale": 1.0}
    steps = [usual | {"step": step, "epoch": step // 2, "loss": loss} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))


def test_the_difference_from_the_baseline_is_paired_by_seed(tmp_path: Path) -> None:
    """Differences 1, 2 and 3: mean 2, s = 1, and t with two degrees of freedom is 4.3027 at 97.5 %: ± 4.3027 / √3."""
    small, large = raw_study()["cases"]
    three = study(tmp_path, seeds=[0, 1, 2], cases=[small, large | {"baseline": "small"}], figures=[])
    for training in three.trainings:
        large = training.case.name == "large"
        complete(training, tmp_path, [10.0 * training.seed + (training.seed + 1 if large else 0)] * 5)
    report = format_report(three, read_results(three, tmp_path), "…", [])
    assert "10.00 ± 10.00 |  |" in report
    assert "12.00 ± 11.00 | +2.00 ± 2.48 |" in report
    assert "95% confidence interval (Student's t)" in report
    assert interval([1.0, 2.0, 3.0, 2.0]) == pytest.approx((2.0, 3.1824 * (2 / 3) ** 0.5 / 2), rel=1e-4)


def test_the_shipped_studies_are_the_papers_tables_and_can_be_planned() -> None:
    names = ("warmup", "learning_rate", "batch_size", "gamma_init")
    papers = {f"{name}_{data}" for name in names for data in ("digits", "cifar10", "cifar10_small")}
    assert {path.stem for path in STUDIES} == {*papers, "beyond_digits", "local_sgd_digits", "rate_cifar10_small"}
    for found in (read_study(path, world_size=1) for path in STUDIES):
        # A setting is chosen with a seed by which nothing is judged.
        assert len(found.file.seeds) >= 3 or found.file.seeds == (100,)
        assert len(found.trainings) == len(found.file.seeds) * len(found.file.cases)
        assert {training.plan.config.recipe.batchnorm.statistics for training in found.trainings} == {32}


def test_seeds_come_one_after_the_other_and_a_case_changes_what_the_study_changes(tmp_path: Path) -> None:
    runs = [(training.case.name, training.seed) for training in study(tmp_path).trainings]
    assert runs == [("small", 3), ("large", 3), ("small", 1), ("large", 1)]
    cases = [{"name": "a", "set": {"recipe.schedule.epochs": 4, "recipe.schedule.warmup": "none"}}]
    (training, _) = study(tmp_path, cases=cases, figures=[]).trainings
    assert training.overrides == (
        "recipe.data.image_size=8",
        "recipe.schedule.epochs=4",
        "recipe.schedule.warmup_epochs=1",
        "recipe.schedule.decay_epochs=[1]",
        "recipe.schedule.warmup=none",
        "recipe.seed=3",
    )
    assert (training.plan.epochs, training.plan.config.recipe.seed) == (4, 3)
    assert training.images == 4 * 2 * 512
    cifar = read_study(ROOT / "ds_configs/studies/warmup_cifar10.json", 8, data="/data/cifar10").trainings
    assert {training.plan.config.recipe.data.path for training in cifar} == {"/data/cifar10"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, 'study.json: seed = 3: unknown key; did you mean "seeds"?'),
        ({"seeds": []}, "seeds = []: list should have at least 1 item after validation, not 0"),
        ({"seeds": [1, 1]}, "seeds[0] = 1: it is listed twice; list each seed once"),
        ({"title": 3}, "title = 3: not a valid string; expected the title of the report"),
        ({"set": {"recipe.seed": 1}}, 'set.recipe.seed = 1: the seeds are the study\'s; list it under "seeds"'),
        ({"config": "../no.json"}, "{above}/no.json: no such file or directory"),
        (
            {"cases": [{"label": "a"}, {"name": "b", "sets": {}, "lable": "b"}]},
            'cases[1].sets = {}: unknown key; did you mean "set"?; also cases[0].name (missing), cases[1].lable '
            "(unknown)",
        ),
        (
            {"cases": [{"name": "../a", "label": "a"}]},
            'cases[0].name = "../a": string should match pattern ',
        ),
        (
            {"cases": [{"name": "a" * 256}]},
            "; expected the name of the case and of its folder, of at most 255 letters,",
        ),
        ({"cases": [{"name": "a", "label": "a"}] * 2}, 'cases[0].name = "a": another case has this name'),
        (
            {"cases": [{"name": "a", "label": "a", "set": {"recipe.schedule.wramup": "none"}}]},
            'study.json, case "a": recipe.schedule.wramup = "none": unknown key; did you mean "warmup"?',
        ),
        (
            {"cases": [{"name": "a", "label": "a", "set": {"train_batch_size": 2000}}]},
            'study.json, case "a": train_batch_size = 2000: the training set has 1,442 images',
        ),
        (
            {"figures": [{"draw": "curves", "title": "t", "cases": ["smal"]}]},
            'figures[0].cases = "smal": there is no such case; the cases are small, large',
        ),
        (
            {"figures": [{"draw": "beside_baseline", "title": "t", "cases": ["small"]}]},
            "figures[0].baseline: no case; name one of small, large",
        ),
        ({"figures": [{"draw": "pie", "title": "t", "cases": ["small"]}]}, 'figures[0].draw = "pie": not "error_by'),
    ],
)
def test_what_is_wrong_is_said_with_key_value_and_remedy(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = raw_study() | {"figures": []} | changes
    with pytest.raises(ConfigError) as caught:
        read_study(write(tmp_path, raw), world_size=1)
    assert message.replace("{above}", str(tmp_path.parent)) in str(caught.value)


def test_a_mistake_in_the_last_case_is_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [*raw_study()["cases"], {"name": "last", "label": "last", "set": {"recipe.schedule.epochs": 0}}]
    path = write(tmp_path, raw_study(cases=cases))
    assert study_command.main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert 'case "last": recipe.schedule.epochs = 0: not greater than or equal to 1' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mean_and_sample_deviation_of_the_medians(tmp_path: Path) -> None:
    """Medians of the last five epochs: 3 of (9,) 1 … 5; 4 of 2 … 6; 8 of 8, 8, 8, 1, 1. Their deviations from the
    mean 5 are −2, −1 and 3: s² = (4 + 1 + 9) / 2 = 7.
    """
    three = study(tmp_path, seeds=[0, 1, 2], cases=raw_study()["cases"][:1], figures=[])
    for training, errors in zip(three.trainings, ([9, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [8, 8, 8, 1, 1]), strict=True):
        complete(training, tmp_path, [float(error) for error in errors])
    results = read_results(three, tmp_path)
    assert [tuple(result.errors.values()) for result in results] == [(3.0, 5.0, 1.0), (4.0, 6.0, 2.0), (8.0, 1.0, 1.0)]
    assert spread(results) == pytest.approx((5, 7**0.5))
    assert "| batch 256 | 256 | 0.1 | 10 | 5.00 ± 2.65 | 4.00 ± 2.65 |" in format_report(three, results, "…", [])
    assert spread(results[:1]) == pytest.approx((3.0, float("nan")), nan_ok=True)


def test_what_is_not_complete_is_reported_with_its_reason_and_never_averaged(tmp_path: Path) -> None:
    cases = [raw_study()["cases"][0] | {"label": "|η|", "paper": "1 | 2"}]
    six = study(tmp_path, seeds=list(range(6)), cases=cases, figures=[])
    complete(six.trainings[0], tmp_path, [4.0, 2.0])
    for number in (1, 2):
        diverge(six.trainings[number], tmp_path)
    for number in (3, 4):  # both have been launched, and the study saw one of them fail
        (tmp_path / six.trainings[number].folder).mkdir()
        (tmp_path / six.trainings[number].folder / LAUNCH_LOG).touch()
    refused = "ds_configs/x.json: fp16.enabled = true: the CPU does not support it"
    results = read_results(six, tmp_path, {six.trainings[3]: refused})
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


def test_an_overflow_that_fp16_skips_is_no_divergence(tmp_path: Path) -> None:
    training = study(tmp_path).trainings[0]
    diverge(training, tmp_path)
    metrics = tmp_path / training.folder / "metrics.jsonl"
    skipped = {"event": "step", "step": 2, "epoch": 0, "loss": None, "skipped": True, "loss_scale": 65536.0}
    metrics.write_text(metrics.read_text() + json.dumps(skipped) + "\n")
    assert ending(tmp_path / training.folder) is None


def test_the_csv_has_a_line_a_run_and_the_report_a_row_a_case(tmp_path: Path) -> None:
    two = study(tmp_path)
    for training, error in zip(two.trainings, (2.0, 3.0, 4.0, 5.0), strict=True):
        complete(training, tmp_path, [error])
    results = read_results(two, tmp_path)
    write_csv(two, results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["seed"]) for row in rows] == [
        ("small", "3"),
        ("small", "1"),
        ("large", "3"),
        ("large", "1"),
    ]
    first = {"median_error_percent": "2.0000", "final_error_percent": "2.0000", "wall_seconds": "7.0"}
    assert rows[0] | first | {"train_batch_size": "256", "peak rate": "0.1"} == rows[0]
    assert rows[2] | {"peak rate": "0.2", "steps": "4", "state": "complete"} == rows[2]
    report = format_report(two, results, "python -m recipe study …", draw_figures(two, results, tmp_path))
    assert "| case | train_batch_size | peak rate | steps | median error, % | final error, % | the paper" in report
    assert "| batch 256 | 256 | 0.1 | 10 | 3.00 ± 1.41 | 3.00 ± 1.41 |  |" in report
    assert "| batch 512 | 512 | 0.2 | 4 | 4.00 ± 1.41 | 4.00 ± 1.41 | 23.74 ± 0.09 |" in report
    assert "the median of the last 2 epochs of each run" in report
    assert "Not complete" not in report
    assert "time: 0.5 minutes, the complete runs added up\n" in report  # 4 × 7 s
    assert f"date: {date.today().isoformat()}" in report
    assert "![Both](curves.png)" in report


def test_what_any_case_sets_is_a_column_with_what_every_plan_says_of_it(tmp_path: Path) -> None:
    other = {"recipe.schedule.decay_epochs": [1, 2], "bf16": {"enabled": True}, "recipe.model.name": "test_vit"}
    two = study(tmp_path, cases=[{"name": "usual"}, {"name": "other", "set": other}], seeds=[0], figures=[])
    derived = {"peak rate": "0.2", "steps": "4"}
    assert [settings(two, training) for training in two.trainings] == [
        {"recipe.schedule.decay_epochs": "[1.0]", "bf16": "–", "recipe.model.name": "test_resnet"} | derived,
        {"recipe.schedule.decay_epochs": "[1.0, 2.0]", "bf16": '{"enabled": true}', "recipe.model.name": "test_vit"}
        | derived,
    ]


def test_the_median_is_of_no_more_epochs_than_there_are(tmp_path: Path) -> None:
    def of(*epochs: int) -> str:
        cases = [{"name": f"e{number}", "set": {"recipe.schedule.epochs": number}} for number in epochs]
        return last_epochs(study(tmp_path, cases=cases, figures=[]).trainings)

    assert (of(1), of(2)) == ("the last epoch", "the last 2 epochs")
    assert (of(7, 5), of(2, 9)) == ("the last 5 epochs", "the last 2 to 5 epochs")


FIGURES = [
    {"draw": "curves", "title": "t", "cases": ["small", "large"]},
    {"draw": "error_by_batch_size", "title": "t", "cases": ["small", "large"]},
    {"draw": "beside_baseline", "title": "t", "cases": ["large"], "baseline": "small"},
]


def test_every_kind_of_picture_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    drawn = study(tmp_path, figures=FIGURES)
    nothing, some = tmp_path / "nothing", tmp_path / "some"
    for output in (nothing, some):
        output.mkdir()
    results = read_results(drawn, nothing)
    assert draw_figures(drawn, results, nothing) == [None] * 3
    assert list(nothing.iterdir()) == []
    assert 'No picture of "t": there is nothing to draw yet.\n' in format_report(drawn, results, "…", [None] * 3)
    complete(drawn.trainings[0], some, [50.0, 20.0, 3.0])
    diverge(drawn.trainings[1], some)
    pictures = draw_figures(drawn, read_results(drawn, some), some)
    assert [picture and picture.name for picture in pictures] == [f"{figure['draw']}.png" for figure in FIGURES]
    assert all(picture and picture.with_suffix(".svg").stat().st_size > 1000 for picture in pictures)
    (axes,) = study_figures._error_by_batch_size(
        drawn.file.figures[1], {"small": read_results(drawn, some)[:2], "large": read_results(drawn, some)[2:]}, some
    ).axes
    assert axes.get_ylabel() == ("top-1 validation error, %: median of the last 2 epochs,\nmean ± std over the seeds")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "linear scaling (256: 1 of 2 not\nstarted; 512: 1 of 2 diverged, 1\nof 2 not started)"
    ]


def test_a_curve_is_the_mean_over_the_seeds_and_the_legend_says_what_is_missing(tmp_path: Path) -> None:
    """Mean losses: 1, 1/2, 1/3 of the run that is whole; 2 = (1.5 + 2.5) / 2, then infinity of the other."""
    both = study(tmp_path, figures=FIGURES)
    complete(both.trainings[0], tmp_path, [50.0, 20.0, 3.0])
    diverge(both.trainings[1], tmp_path, losses=[1.5, 2.5, 1.8, None])
    runs = read_results(both, tmp_path)
    figure = study_figures._curves(both.file.figures[0], {"small": runs[:1], "large": runs[2:]}, tmp_path)
    losses, errors = figure.axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "batch 256",
        "batch 512 (1 of 2 diverged, 1 of\n2 not started)",
    ]
    assert [list(line.get_ydata()) for line in losses.lines] == [[1, 1 / 2, 1 / 3], [2.0]]
    assert [list(line.get_ydata()) for line in errors.lines] == [[50.0, 20.0, 3.0], []]
    four = both.file.figures[2].model_copy(update={"cases": ("large",) * 4})
    panels = study_figures._curves(four, {"small": runs[:1], "large": runs[2:]}, tmp_path).axes
    assert [axes.get_subplotspec().rowspan.start for axes in panels] == [0, 0, 0, 1]


def test_a_folder_with_another_training_is_refused(tmp_path: Path) -> None:
    before, now = study(tmp_path), study(tmp_path, set=SHORT | {"recipe.schedule.epochs": 3})
    folder = tmp_path / before.trainings[0].folder
    folder.mkdir(parents=True)
    check_output(now, tmp_path)
    (folder / "plan.json").write_text(plan_json(before.trainings[0].plan))
    check_output(before, tmp_path)
    with pytest.raises(ValueError, match=r"seed-3 holds another training: recipe\.schedule\.epochs was 2, is 3; name"):
        check_output(now, tmp_path)
    (folder / "plan.json").write_text("[]")
    check_output(now, tmp_path)


@pytest.mark.parametrize(
    ("statistics", "split", "images"),
    [
        ("global", {"world_size": 2}, "were 128, are 256"),
        ("local", {"micro_batch": 64}, "were 128, are 64"),
        ("global", {"world_size": 2, "micro_batch": 64}, None),
        ("local", {"world_size": 2}, None),
        (32, {"micro_batch": 64}, None),
    ],
)
def test_another_split_is_another_training_where_it_changes_batch_norms_images(
    tmp_path: Path, statistics: str | int, split: dict[str, int], images: str | None
) -> None:
    """256 images on one rank are two micro-batches of 128."""

    def split_into(world_size: int, micro_batch: int) -> Study:
        settings = {"train_batch_size": 256, "recipe.batchnorm.statistics": statistics}
        settings["train_micro_batch_size_per_gpu"] = micro_batch
        return read_study(write(tmp_path, raw_study(cases=[{"name": "a", "set": settings}], figures=[])), world_size)

    before, now = split_into(1, 128), split_into(**{"world_size": 1, "micro_batch": 128} | split)
    for training in before.trainings:
        (tmp_path / training.folder).mkdir(parents=True)
        (tmp_path / training.folder / "plan.json").write_text(plan_json(training.plan))
    if images is None:
        check_output(now, tmp_path)
    else:
        with pytest.raises(ValueError, match=f"another training: images in recipe.batchnorm.statistics {images}; name"):
            check_output(now, tmp_path)


def test_a_run_is_the_command_that_a_person_would_type(tmp_path: Path) -> None:
    one, output = study(tmp_path), Path("runs/study")
    words = command(one, one.trainings[0], output, Where(None, ranks=2))
    port = words[words.index("--master_port") + 1]
    assert 1024 <= int(port) <= 65535
    config = str(ROOT / "ds_configs/digits_b512.json")
    head = ["--master_port", port, "--num_gpus", "2", str(ROOT / "recipe/train.py"), "--deepspeed_config", config]
    assert words[1:12] == [*head, "--output", "runs/study/small/seed-3", "--set", "recipe.data.image_size=8"]
    assert words[-2:] == ["--set", "recipe.seed=3"]
    hosts = command(one, one.trainings[0], output, Where(Path("hostfiles/H"), ranks=4))
    assert hosts[1:4] == ["--hostfile", "hostfiles/H", str(ROOT / "recipe/train.py")]


def test_ctrl_c_before_anything_runs_is_reported_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_command, "read_study", interrupt)
    monkeypatch.setattr(sys, "argv", ["recipe", "study", "study.json"])
    assert recipe_command() == 130
    assert capsys.readouterr().err == "recipe: ended by SIGINT\n"


def test_jobs_are_for_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        study_command.main(["study.json", "--hostfile", "hostfiles/localhost", "--jobs", "2"])
    assert "--jobs is for one machine" in capsys.readouterr().err


def test_runs_side_by_side_share_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    where = Where(None, ranks=2, jobs=2, gpus=4)
    assert where.launcher_arguments(slot=1)[2:] == ["--include", "localhost:2,3"]
    assert Where(None, ranks=2, jobs=2).launcher_arguments(slot=1)[2:] == ["--num_gpus", "2"]
    assert Where(None, ranks=2, jobs=1, gpus=4).launcher_arguments()[2:] == ["--num_gpus", "2"]
    with pytest.raises(ValueError, match=r"--jobs 3 with --num_gpus 2 takes 6 GPUs, and .* has 4; at most --jobs 2"):
        Where(None, ranks=2, jobs=3, gpus=4)
    photos = {"recipe.data.source": "imagefolder", "recipe.data.path": "photos"}
    photos |= {"recipe.data.train_images": 1024, "recipe.data.validation_images": 64}
    path = write(tmp_path, raw_study(set={**SHORT, **photos}))
    shared = read_study(path, 2, cores_per_rank=where.cores_per_rank())
    # 16 cores are 4 per rank, one of them for training.
    assert command(shared, shared.trainings[0], tmp_path, where)[-2:] == ["--set", "recipe.data.workers=3"]
    alone = command(shared, shared.trainings[0], tmp_path, Where(None, ranks=2))
    assert not [word for word in alone if "workers" in word]


def run_with(monkeypatch: pytest.MonkeyPatch, one: Study, output: Path, script: str) -> Runner:
    """Run a study whose runs are a shell script: $0 is the run's folder, $1 the name by which it calls its config."""

    def words(of: Study, training: Training, output: Path, where: Where, slot: int) -> list[str]:
        changed = f"{of.config} (with {' '.join(f'--set {override}' for override in training.overrides)})"
        return ["sh", "-c", script, str(output / training.folder), changed]

    monkeypatch.setattr("recipe.commands.study.runs.command", words)
    monkeypatch.setattr("recipe.commands.study.runs.POLL_SECONDS", 0.02)
    runner = Runner(one, output, Where(None, 1))
    runner.run()
    return runner


def test_a_failure_stops_no_other_run_and_a_refusal_only_those_of_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    six = study(tmp_path, seeds=[0, 1], cases=[{"name": name} for name in "abc"], figures=[])
    own = 'case $0 in */b/*) echo "recipe: $1: no such model"; exit 2;; *) echo "Killed"; exit 1;; esac'
    runner = run_with(monkeypatch, six, tmp_path / "case", own)
    assert [str(training) for training in runner.failures] == [
        "a, seed 0",
        "b, seed 0",
        "c, seed 0",
        "a, seed 1",
        "c, seed 1",
    ]
    reasons = [reason.partition(" (")[0] for reason in runner.failures.values()]
    assert reasons[:2] == ["Killed", f"{ROOT / 'ds_configs/digits_b512.json'}: no such model"]
    assert "1 of 6: a, seed 0 …\n[1/6] a, seed 0: failed: Killed (" in capsys.readouterr().out
    # What is wrong with a folder, as another training in it, is that run's alone.
    runner = run_with(monkeypatch, six, tmp_path / "folder", 'echo "recipe: $0 holds another training"; exit 2')
    assert len(runner.failures) == 6
    assert study_command.main([str(tmp_path / "study.json"), "--output", str(tmp_path / "command")]) == 1
    assert "recipe: c, seed 1 failed: " in capsys.readouterr().err


def test_a_signal_is_passed_on_and_nothing_more_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = study(tmp_path, seeds=[0], cases=[{"name": name} for name in "ab"], figures=[])
    script = "trap 'touch $0/saved; exit 143' TERM; kill -TERM $PPID; sleep 60 & wait"
    runner = run_with(monkeypatch, two, tmp_path, script)
    assert (runner.stopped_by, runner.failures, runner.over) == (signal.SIGTERM, {}, 1)
    assert (tmp_path / "a/seed-0/saved").exists()
    assert not (tmp_path / "b").exists()


def test_a_run_that_outlived_a_killed_study_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = study(tmp_path, seeds=[0], cases=[{"name": name} for name in "ab"], figures=[])
    locked = [True, False, True, True, False]  # a and b before the first look; then a until the third
    monkeypatch.setattr("recipe.commands.study.runs.is_locked", lambda folder: bool(locked) and locked.pop(0))
    runner = run_with(monkeypatch, two, tmp_path, "exit 1")
    assert [str(training) for training in runner.failures] == ["a, seed 0", "b, seed 0"]
    assert locked == []


def test_the_last_word_of_a_launch(tmp_path: Path) -> None:
    log = tmp_path / "launch.log"
    log.write_text("$ deepspeed …\nrecipe: no\nended by SIGTERM, saved\n[launch.py] exits\n")
    assert _last_word(log, 1) == "ended by SIGTERM, saved"
    log.write_text("$ deepspeed …\n")
    assert _last_word(log, 9) == "exit code 9"


def test_the_docs_have_a_study_that_can_be_planned(tmp_path: Path) -> None:
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    (example,) = [block.partition("```")[0] for block in page.split("```json\n")[1:]]
    (tmp_path / "digits_b512.json").write_text((ROOT / "ds_configs/digits_b512.json").read_text())
    (tmp_path / "studies").mkdir()
    path = tmp_path / "studies/mine.json"
    path.write_text(example)
    assert len(read_study(path, world_size=1).trainings) == 4


@pytest.mark.slow
def test_a_study_resumes_after_sigterm_and_after_a_kill(tmp_path: Path) -> None:
    """One of its runs fails, as its folder cannot be locked, and is tried again at the next start; another diverges."""
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

    def wait_for_steps(process: subprocess.Popen[str], more_than: int) -> None:
        deadline = time.monotonic() + 600
        while len(read_lines(long / "metrics.jsonl")) <= more_than:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    first = start()
    wait_for_steps(first, 0)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 143, said
    for line in ("1 of 3: short, seed 0 …\n", "[1/3] short, seed 0: failed: ", "[2/3] wild, seed 0: diverged"):
        assert f"\n{line}" in said
    assert re.search(r"^recipe: short, seed 0 failed: .*\.lock \(Is a directory\).*launch\.log", said, re.MULTILINE)
    assert "\n- wild, seed 0: diverged: the loss of step " in said
    assert f"In {output}: results.md, results.csv\n" in said
    (row,) = read_rows(output, "long")
    done = len(read_lines(long / "metrics.jsonl"))
    assert f"\n- long, seed 0: interrupted: {row['reason']}\n" in said
    assert row["state"] == "interrupted"
    assert 0 < int(row["reason"].split()[0]) <= done
    assert "the same command resumes them" in said
    assert not is_locked(long)
    assert list((long / "checkpoints").glob("step-*"))
    assert not (long / "summary.json").exists()

    lock.rmdir()
    second = start()
    wait_for_steps(second, len(read_lines(long / "metrics.jsonl")))
    refused = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    assert "another run is writing to" in refused.stderr
    second.kill()
    second.communicate()

    launches = [(output / case / "seed-0" / LAUNCH_LOG).stat().st_mtime_ns for case in ("short", "wild")]
    third = start()
    said, _ = third.communicate(timeout=600)
    assert third.returncode == 0, said
    assert "2 runs are over already" in said
    assert "[3/3] long, seed 0: median error" in said
    rows = [read_rows(output, case)[0] for case in ("short", "wild", "long")]
    assert [row["state"] for row in rows] == ["complete", "diverged", "complete"]
    assert launches == [(output / case / "seed-0" / LAUNCH_LOG).stat().st_mtime_ns for case in ("short", "wild")]


def read_rows(output: Path, case: str) -> list[dict[str, str]]:
    with (output / "results.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["case"] == case]


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
