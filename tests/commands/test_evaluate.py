"""Evaluation and prediction agree with the run's own validation, plain timm and scikit-learn."""

import csv
import json
import math
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from benchmarks.launch import deepspeed_command
from recipe.commands.evaluate import draw_confusion
from recipe.commands.measure import Measured, calibration
from recipe.commands.trained import read_trained
from recipe.data import open_datasets
from tests.launch import DIGITS, ROOT, SHORT, complete_run, environment, events, recipe, train_ok

SIZE, MEAN, STD = 16, 0.3054, 0.3237  # of the run: the digits' mean and standard deviation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluate") / "run"
    complete_run(output)
    return output


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, list[int]]:
    """The validation images, uint8 (355, 32, 32, 3), and their labels."""
    dataset = open_datasets("digits", None, image_size=SIZE, crop="padded", flip=False, seed=0)[1]
    return torch.stack([dataset.image(index).pixels for index in range(len(dataset))]), dataset.labels.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: tuple[torch.Tensor, list[int]]) -> Path:
    """The same images as files, one folder per class, without a val/."""
    root = tmp_path_factory.mktemp("images")
    for number, (pixels, label) in enumerate(zip(*digits, strict=True)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(root / str(label) / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def probabilities(run: Path, digits: tuple[torch.Tensor, list[int]]) -> np.ndarray:
    """(355, 10), computed from the best weights by plain timm."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    model.load_state_dict(read_trained(run).state)
    with torch.no_grad():
        return model((digits[0].movedim(-1, 1) / 255 - MEAN) / STD).double().softmax(1).numpy()


@pytest.fixture(scope="module")
def evaluation(run: Path) -> subprocess.CompletedProcess[str]:
    """``evaluate`` in one process, which writes into the run."""
    done = recipe("evaluate", str(run))
    assert done.returncode == 0, done.stderr
    return done


def test_fp64_is_not_rounded(tmp_path: Path) -> None:
    precise = ("--set=recipe.precision=fp64", "--set=recipe.ema.decay=0.9999")
    train_ok("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, *precise)
    assert recipe("evaluate", str(tmp_path)).returncode == 0
    result = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert result["loss"] in [line["ema_loss"] for line in events(tmp_path, "validation")]


def test_digits_are_resized_as_in_the_run(tmp_path: Path) -> None:
    """From 32 px, to which training images are enlarged, not from the files' 8 px."""
    smaller = ("--set=recipe.data.image_size=32", "--set=recipe.data.validation_image_size=16")
    train_ok("--deepspeed_config", DIGITS, "--output", str(tmp_path), *SHORT, *smaller)
    assert recipe("evaluate", str(tmp_path)).returncode == 0
    result = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert result["loss"] in [line["loss"] for line in events(tmp_path, "validation")]


def test_one_process_repeats_the_runs_validation_bit_for_bit(
    run: Path,
    evaluation: subprocess.CompletedProcess[str],
    digits: tuple[torch.Tensor, list[int]],
    probabilities: np.ndarray,
) -> None:
    result = json.loads((run / "evaluation/evaluation.json").read_text())
    best = max(events(run, "validation"), key=lambda line: line["top1"])
    assert {key: result[key] for key in ("top1", "top5", "loss", "count")} == {
        key: best[key] for key in ("top1", "top5", "loss", "count")
    }
    labels, predicted = np.array(digits[1]), probabilities.argmax(1)
    with (run / "evaluation/confusion.csv").open() as stream:
        _, *rows = csv.reader(stream)
    matrix = [[int(cell) for cell in row[1:]] for row in rows]
    assert matrix == confusion_matrix(labels, predicted).tolist()
    confidence = probabilities.max(1)
    assert result["mean_confidence"] == pytest.approx(100 * confidence.mean(), abs=1e-4)
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            accuracy = (predicted == labels)[inside].mean()
            error += inside.mean() * abs(accuracy - confidence[inside].mean())
    assert result["expected_calibration_error"] == pytest.approx(100 * error, abs=1e-4)
    worst = result["classes"][0]
    assert worst["accuracy"] == min(100 * matrix[c][c] / sum(matrix[c]) for c in range(10))
    assert f"\n{worst['name']} " in evaluation.stdout
    assert (run / "evaluation/confusion.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("evaluation")
def test_two_ranks_on_a_folder_of_the_same_images_count_the_same(run: Path, folder: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", str(run), "--data", str(folder), "--output", str(tmp_path))
    launcher, *others = deepspeed_command(2, "recipe", *arguments)
    done = subprocess.run(
        [launcher, "--no_local_rank", "--module", *others],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    one, two = (json.loads((path / "evaluation.json").read_text()) for path in (run / "evaluation", tmp_path))
    assert two["classes"] == one["classes"]
    assert two["count"] == one["count"] == 355
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert done.stdout.count("top-1 ") == 1  # from rank 0 alone


def test_an_export_gives_the_same_numbers_as_its_run(run: Path, folder: Path, tmp_path: Path) -> None:
    exported = tmp_path / "handed over"
    assert recipe("export", str(run), "--output", str(exported)).returncode == 0
    for name, model in (("run", run), ("export", exported)):
        done = recipe("evaluate", str(model), "--data", str(folder), "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    handed_over = sorted(exported.iterdir())
    for name, model in (("run", run), ("export", exported / "model.safetensors")):
        to = ("--output", str(tmp_path / name)) if name == "run" else ()
        done = recipe("predict", str(model), str(folder / "3"), *to, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "predictions/predictions.jsonl").rename(tmp_path / "export/predictions.jsonl")
    assert sorted(exported.iterdir()) == handed_over
    for file in ("per_class.csv", "confusion.csv", "predictions.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "export" / file).read_bytes()
    of_run, of_export = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("run", "export"))
    assert of_export == of_run | {"model": str(exported / "model.safetensors")}


def test_invalid_input_is_refused_on_one_line(run: Path, folder: Path, tmp_path: Path) -> None:
    cats, unsplit = tmp_path / "cats", tmp_path / "unsplit"
    (unsplit / "train/3").mkdir(parents=True)
    (cats / "val/cat").mkdir(parents=True)
    (cats / "val/cat/a.png").write_bytes(next((folder / "3").iterdir()).read_bytes())
    export, full, odd = tmp_path / "other", tmp_path / "full", tmp_path / "odd"
    for new_folder in (export, full, odd):
        new_folder.mkdir()
    (full / "evaluation.json").symlink_to("/dev/full")
    (odd / "config.json").write_text(f'{{"recipe": {(run / "plan.json").read_text()}, "label_names": ["a"]}}')
    (export / "config.json").write_text('{"architecture": "resnet50"}')
    for arguments, message in (
        ([str(export)], "config.json was not written by python -m recipe export: it has no recipe"),
        ([str(run), "--checkpoint", "step-7"], "has no intact checkpoint step-7; it has step-0000000"),
        ([str(run), "--data", str(cats)], "does not know: 'cat'"),
        ([str(run), "--data", str(unsplit)], f"has neither val/ nor test/ beside train/; name {unsplit}/train, or"),
        ([str(run), "--data", str(tmp_path / "none")], "there is no folder"),
        ([str(odd)], "label_names are not the names of 10 classes; export the run again"),
        ([str(run), "--output", str(full)], "No space left on device: the output is incomplete; make room"),
    ):
        done = recipe("evaluate", *arguments)
        assert done.returncode == 2, done.stdout
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_failed_rendezvous_is_reported_on_one_line(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = recipe("evaluate", str(run), **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"recipe: the rendezvous at 127.0.0.1:{port} failed: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one() -> None:
    # 0.8 is correct and in bin (11/15, 12/15]; 0.6 and 0.55 are wrong and right and share (8/15, 9/15].
    confidence, error = calibration(np.array([0.8, 0.6, 0.55]), np.array([True, False, True]))
    assert confidence == pytest.approx(65)
    assert error == pytest.approx(100 * (abs(1 - 0.8) + abs(1 - 0.6 - 0.55)) / 3)


def test_predictions_are_in_order_and_unreadable_files_are_named(
    run: Path, folder: Path, probabilities: np.ndarray, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    order = [7, 100, 30, 200]
    for place, number in enumerate(order):
        (source,) = folder.glob(f"*/{number:03}.png")
        (images / f"{place}.png").write_bytes(source.read_bytes())
    (images / "2b.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    (images / "2c.png").symlink_to("nowhere")
    (images / "._0.png").write_bytes(b"macOS")
    (images / "notes.txt").write_text("no image")
    done = recipe("predict", str(run), str(images), "--micro-batch", "2", "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    unreadable = [f"recipe: {images / name} could not be read\n" for name in ("2b.png", "2c.png")]
    assert done.stderr == "".join(unreadable)
    records = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [Path(record["file"]).name for record in records] == ["0.png", "1.png", "2.png", "3.png"]
    for record, number in zip(records, order, strict=True):
        expected = probabilities[number]
        best = np.argsort(-expected)[:5]
        assert [int(one["class"]) for one in record["top"]] == best.tolist()
        for one, place in zip(record["top"], best, strict=True):
            assert math.isclose(one["probability"], expected[place], abs_tol=1e-5)
    with (tmp_path / "out/predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class_1"] for row in rows] == [record["top"][0]["class"] for record in records]


def test_names_that_the_font_lacks_are_drawn_without_a_warning(tmp_path: Path) -> None:
    draw_confusion(Measured({"top1": 50.0}, ("犬", "$x"), [[1, 0], [1, 0]]), tmp_path / "confusion")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "confusion.svg"}
