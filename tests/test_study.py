"""Studies: strict files, the order of runs, hand-computed figures, and a real one that is ended twice and goes on."""

import csv
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launch import ROOT, environment
from recipe.commands import study as command
from recipe.commands.study_figures import draw_figures
from recipe.commands.study_file import Study, Training, read_study
from recipe.commands.study_report import format_report, wall_seconds
from recipe.commands.study_results import Result, read_results, spread, write_csv
from recipe.commands.study_runs import Launch, Where, check_output, read_launches, state
from recipe.commands.study_runs import command as launch_command
from recipe.config import ConfigError
from recipe.lock import is_locked
from recipe.plan_text import plan_json
from recipe.summary import History, summarise

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
    )
    (folder / "summary.json").write_text(json.dumps(summary))


def diverge(training: Training, output: Path) -> None:
    """Leave what a run leaves that diverged in its second step."""
    folder = output / training.folder
    folder.mkdir(parents=True)
    steps = [{"event": "step", "step": step, "epoch": 0, "skipped": False, "loss_scale": 1.0} for step in (0, 1)]
    (folder / "metrics.jsonl").write_text(
        json.dumps(steps[0] | {"loss": 2.3}) + "\n" + json.dumps(steps[1] | {"loss": None}) + "\n"
    )


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_planned(path: Path) -> None:
    found = read_study(path, world_size=1)
    assert len(found.file.seeds) >= 3
    assert len(found.trainings) == len(found.file.seeds) * len(found.file.cases)
    assert {training.plan.config.recipe.batchnorm.statistics for training in found.trainings} == {32}


def test_they_are_the_papers_tables_on_a_cpu_and_on_a_gpu() -> None:
    names = ("warmup", "learning_rate", "batch_size", "gamma_init")
    assert {path.stem for path in STUDIES} == {f"{name}_{data}" for name in names for data in ("digits", "cifar10")}


def test_all_cases_of_a_seed_come_before_the_next_seed(tmp_path: Path) -> None:
    runs = [(training.case.name, training.seed) for training in study(tmp_path).trainings]
    assert runs == [("small", 3), ("large", 3), ("small", 1), ("large", 1)]


def test_a_case_changes_what_the_study_changes_and_the_seed_is_the_runs(tmp_path: Path) -> None:
    cases = [{"name": "a", "label": "a", "set": {"recipe.schedule.epochs": 4, "recipe.schedule.warmup": "none"}}]
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, 'study.json: seed = 3: unknown key; did you mean "seeds"?'),
        ({"seeds": []}, "seeds = []: too short; expected the seeds with which each case is trained"),
        ({"seeds": [1, 1]}, "seeds[0] = 1: it is listed twice; list each seed once"),
        ({"seeds": [-1]}, "seeds[0] = -1: too small; expected the seeds"),
        ({"title": 3}, "title = 3: not a string; expected the title of the report"),
        ({"set": {"recipe.seed": 1}}, 'set.recipe.seed = 1: the seeds are the study\'s; list it under "seeds"'),
        ({"config": "no.json"}, "no.json: no such file or directory"),
        ({"cases": [{"name": "a"}]}, "cases[0].label: missing; expected what tables and pictures call the case"),
        ({"cases": [{"name": "a", "label": "a", "lable": "a"}]}, 'cases[0].lable = "a": unknown key; did you mean'),
        ({"cases": [{"name": "../a", "label": "a"}]}, 'cases[0].name = "../a": not'),
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
        (
            {
                "figures": [{"draw": "error_by_batch_size", "title": "t", "cases": ["small", "slow", "large"]}],
                "cases": [*raw_study()["cases"], {"name": "slow", "label": "s", "set": {"train_batch_size": 256}}],
            },
            'figures[0].cases[0] = "small": another of these cases has batch 256 and scaling rule "linear", too; draw',
        ),
        ({"figures": [{"draw": "pie", "title": "t", "cases": ["small"]}]}, 'figures[0].draw = "pie": not "error_by'),
    ],
)
def test_what_is_wrong_is_said_with_key_value_and_remedy(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = raw_study() | {"figures": []} | changes
    with pytest.raises(ConfigError) as caught:
        read_study(write(tmp_path, raw), world_size=1)
    assert message in str(caught.value)


def test_a_mistake_in_the_last_case_is_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [*raw_study()["cases"], {"name": "last", "label": "last", "set": {"recipe.schedule.epochs": 0}}]
    path = write(tmp_path, raw_study(cases=cases))
    assert command.main([str(path), "--output", str(tmp_path / "out")]) == 2
    assert 'case "last": recipe.schedule.epochs = 0: too small' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mean_and_sample_deviation_of_the_medians(tmp_path: Path) -> None:
    """Medians of the last five epochs: 3 of (9,) 1 … 5; 4 of 2 … 6; 8 of 8, 8, 8, 1, 1. Their deviations from the
    mean 5 are −2, −1 and 3: s² = (4 + 1 + 9) / 2 = 7.
    """
    three = study(tmp_path, seeds=[0, 1, 2], cases=raw_study()["cases"][:1], figures=[])
    for training, errors in zip(three.trainings, ([9, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [8, 8, 8, 1, 1]), strict=True):
        complete(training, tmp_path, [float(error) for error in errors])
    results = read_results(three, tmp_path)
    assert [result.median_error for result in results] == [3.0, 4.0, 8.0]
    assert [result.best_error for result in results] == [1.0, 2.0, 1.0]
    found = spread(results)
    assert found.mean == pytest.approx(5)
    assert found.std == pytest.approx(7**0.5)
    assert str(found) == "5.00 ± 2.65"
    assert str(spread(results[:1])) == "3.00"
    assert statistics.stdev([3.0, 4.0, 8.0]) == pytest.approx(found.std)


def test_diverged_and_open_runs_are_told_and_never_averaged(tmp_path: Path) -> None:
    small, large, small_again, large_again = study(tmp_path).trainings
    complete(small, tmp_path, [4.0, 2.0])
    diverge(large, tmp_path)
    diverge(small_again, tmp_path)
    results = read_results(study(tmp_path), tmp_path)
    assert [result.state for result in results] == ["complete", "diverged", "diverged", "open"]
    assert str(spread(results[:2])) == "3.00, 1 of 2 diverged"
    assert str(spread(results[1:3])) == "diverged"
    assert str(spread(results[2:])) == "1 of 2 diverged, 1 of 2 not run"
    assert state(large_again, tmp_path) == "open"


def test_an_overflow_that_fp16_skips_is_no_divergence(tmp_path: Path) -> None:
    training = study(tmp_path).trainings[0]
    diverge(training, tmp_path)
    metrics = tmp_path / training.folder / "metrics.jsonl"
    skipped = {"event": "step", "step": 2, "epoch": 0, "loss": None, "skipped": True, "loss_scale": 65536.0}
    metrics.write_text(metrics.read_text() + json.dumps(skipped) + "\n")
    assert state(training, tmp_path) == "open"


def test_the_csv_has_a_line_a_run_and_the_report_a_row_a_case(tmp_path: Path) -> None:
    two = study(tmp_path)
    for training, error in zip(two.trainings, (2.0, 3.0, 4.0, 5.0), strict=True):
        complete(training, tmp_path, [error])
    line = {"case": "small", "seed": 3, "date": "2026-11-01", "started": 0.0, "wall_seconds": 60.0}
    line |= {"cpu_seconds": 30.0, "load_before": 0.5}
    (tmp_path / "launches.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"started": 100.0}) + "\n{")
    results, launches = read_results(two, tmp_path), read_launches(tmp_path)
    write_csv(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["seed"]) for row in rows] == [
        ("small", "3"),
        ("small", "1"),
        ("large", "3"),
        ("large", "1"),
    ]
    assert rows[0] | {"median_error_percent": "2.0000", "wall_seconds": "120.0", "peak_rate": "0.1"} == rows[0]
    assert rows[2] | {"peak_rate": "0.2", "warmup": "gradual", "global_batch": "512", "cpu_seconds": "0.0"} == rows[2]
    pictures = draw_figures(two, results, tmp_path)
    report = format_report(two, results, launches, "python -m recipe study …", pictures)
    assert "| batch 256 | 256 | 2 | 0.1 | none | 0 | 10 | 3.00 ± 1.41 |  |" in report
    assert "| batch 512 | 512 | 4 | 0.2 | gradual | 1 | 4 | 4.00 ± 1.41 | 23.74 ± 0.09 |" in report
    assert "2.0 minutes with all launches" in report
    assert "1.0 minutes of a core" in report
    assert "date: 2026-11-01\n" in report
    assert "![Both](curves.png)" in report


def test_every_kind_of_picture_is_drawn_with_runs_that_diverged_and_runs_that_are_missing(tmp_path: Path) -> None:
    figures = [
        {"draw": "curves", "title": "t", "cases": ["small", "large"]},
        {"draw": "error_by_batch_size", "title": "t", "cases": ["small", "large"]},
        {"draw": "beside_baseline", "title": "t", "cases": ["large"], "baseline": "small"},
    ]
    drawn = study(tmp_path, figures=figures)
    for output in (tmp_path / "nothing", tmp_path / "some"):
        output.mkdir()
        if output.name == "some":
            complete(drawn.trainings[0], output, [50.0, 20.0, 3.0])
            diverge(drawn.trainings[1], output)
        pictures = draw_figures(drawn, read_results(drawn, output), output)
        assert [picture.name for picture in pictures] == [f"{figure['draw']}.png" for figure in figures]
        assert all(picture.with_suffix(".svg").stat().st_size > 1000 for picture in pictures)


def test_launches_side_by_side_are_not_added_up() -> None:
    def launch(started: float, seconds: float) -> Launch:
        return Launch("a", 0, "2026-11-01", started, seconds, 1.0, 0.0)

    assert wall_seconds([]) == 0
    # 0 … 10 and 5 … 15 and 6 … 8 are 15 s, 100 … 101 one more.
    assert wall_seconds([launch(100, 1), launch(5, 10), launch(0, 10), launch(6, 2)]) == 16


def test_a_folder_with_another_training_is_refused(tmp_path: Path) -> None:
    before, now = study(tmp_path), study(tmp_path, set=SHORT | {"recipe.schedule.epochs": 3})
    folder = tmp_path / before.trainings[0].folder
    folder.mkdir(parents=True)
    check_output(now, tmp_path)
    (folder / "plan.json").write_text(plan_json(before.trainings[0].plan))
    check_output(before, tmp_path)
    with pytest.raises(ValueError, match=r"seed-3 holds another training: recipe\.schedule\.epochs was 2, is 3; name"):
        check_output(now, tmp_path)


def test_a_run_is_the_command_that_a_person_would_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, output = study(tmp_path), Path("runs/study")
    words = launch_command(one, one.trainings[0], output, Where(None, ranks=2))
    port = words[words.index("--master_port") + 1]
    assert 1024 <= int(port) <= 65535
    config = str(ROOT / "ds_configs/digits_b512.json")
    head = ["--master_port", port, "--num_gpus", "2", str(ROOT / "recipe/train.py"), "--deepspeed_config", config]
    assert words[1:12] == [*head, "--output", "runs/study/small/seed-3", "--set", "recipe.data.image_size=8"]
    assert words[-2:] == ["--set", "recipe.seed=3"]
    hosts = launch_command(one, one.trainings[0], output, Where(Path("hostfiles/H"), ranks=4))
    assert hosts[1:4] == ["--hostfile", "hostfiles/H", str(ROOT / "recipe/train.py")]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert "OMP_NUM_THREADS" not in Where(None, ranks=1).environment()
    assert Where(None, ranks=2, jobs=2).environment()["OMP_NUM_THREADS"] == "2"
    assert Where(None, ranks=8, jobs=4).environment()["OMP_NUM_THREADS"] == "1"
    assert "RANK" not in Where(None, ranks=1).environment()


def test_the_folder_of_the_data_is_every_cases(tmp_path: Path) -> None:
    trainings = read_study(ROOT / "ds_configs/studies/warmup_cifar10.json", 8, data="/data/cifar10").trainings
    assert {training.plan.config.recipe.data.path for training in trainings} == {"/data/cifar10"}
    assert {training.plan.micro_batch * training.plan.accumulation * 8 for training in trainings} == {256, 8192}


def test_jobs_are_for_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["study.json", "--hostfile", "hostfiles/localhost", "--jobs", "2"])
    assert "--jobs is for one machine" in capsys.readouterr().err


def test_a_median_needs_a_complete_run(tmp_path: Path) -> None:
    training = study(tmp_path).trainings[0]
    result = Result(training, "open", None, None, None, 0.0, 0.0, None)
    assert str(spread([result])) == "1 of 1 not run"


@pytest.mark.slow
def test_a_study_goes_on_after_sigterm_and_after_a_kill_and_keeps_a_run_that_diverged(tmp_path: Path) -> None:
    cases = [
        {"name": "short", "label": "short", "set": {"recipe.schedule.epochs": 1}},
        {"name": "wild", "label": "wild", "set": {"recipe.schedule.scaling_rule": "none", "optimizer.params.lr": 1e15}},
        {"name": "long", "label": "long", "set": {"recipe.schedule.epochs": 40}},
    ]
    path, output = write(tmp_path, raw_study(seeds=[0], cases=cases, figures=[])), tmp_path / "out"
    words = [sys.executable, "-m", "recipe", "study", str(path), "--output", str(output)]
    long = output / "long/seed-0"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for_steps(process: subprocess.Popen[str], more_than: int) -> None:
        deadline = time.monotonic() + 200
        while len(read_lines(long / "metrics.jsonl")) <= more_than:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    first = start()
    wait_for_steps(first, 0)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=100)
    assert first.returncode == 143, said
    assert "[1/3] short, seed 0: median error" in said
    assert "[2/3] wild, seed 0: diverged" in said
    assert "the same command goes on" in said
    assert not is_locked(long)
    assert list((long / "checkpoints").glob("step-*"))
    assert not (long / "summary.json").exists()

    second = start()
    wait_for_steps(second, len(read_lines(long / "metrics.jsonl")))
    refused = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode == 2
    assert "another run is writing to" in refused.stderr
    second.kill()
    second.communicate()

    third = start()
    said, _ = third.communicate(timeout=200)
    assert third.returncode == 0, said
    assert "2 runs are over already" in said
    assert "[3/3] long, seed 0: median error" in said
    with (output / "results.csv").open() as file:
        rows = {row["case"]: row["state"] for row in csv.DictReader(file)}
    assert rows == {"short": "complete", "wild": "diverged", "long": "complete"}
    launches = [launch.case for launch in read_launches(output)]
    assert (launches.count("short"), launches.count("wild")) == (1, 1)


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path: Path) -> None:
    """A training folder that is a file fails at once; the next start tries it again."""
    path, output = write(tmp_path, raw_study(seeds=[0], figures=[])), tmp_path / "out"
    (output / "small/seed-0/checkpoints").mkdir(parents=True)
    (output / "small/seed-0/metrics.jsonl").mkdir()
    words = [sys.executable, "-m", "recipe", "study", str(path), "--output", str(output), "--jobs", "2"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "recipe: batch 256, seed 0 failed:" in done.stderr
    assert "metrics.jsonl: Is a directory" in done.stderr.replace("is a directory", "Is a directory")
    assert "launch.log" in done.stderr
    assert (output / "large/seed-0/summary.json").exists()
