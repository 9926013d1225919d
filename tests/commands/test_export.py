"""What a run exports is loaded by plain timm, and is what the run validated."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from recipe.checkpoints.manifest import find
from recipe.commands.export import card, choose
from recipe.config.schema import parse_config
from recipe.data import open_datasets
from tests.launch import DIGITS, ROOT, SHORT, complete_run, events, train_ok
from tests.run_folders import write_run

pytestmark = pytest.mark.slow

# A process in which neither this package nor DeepSpeed can be imported.
PLAIN_TIMM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("recipe", "deepspeed"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import timm, torch

images, labels = torch.load("validation.pt")
model = MODEL
with torch.no_grad():
    print(int((model(images).argmax(1) == labels).sum()))
"""


def export(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipe", "export", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def save_validation_images(folder: Path, image_size: int) -> int:
    """All held-out digits as the card says: enlarged, from 0 to 1, less the mean, over the standard deviation."""
    _, held_out = open_datasets("digits", None, image_size, "padded", False, 0, "stop")
    samples = [held_out[index] for index in range(len(held_out))]
    images = torch.stack([sample.image for sample in samples]).movedim(-1, 1).float() / 255
    labels = torch.tensor([sample.label for sample in samples])
    torch.save(((images - 0.3054) / 0.3237, labels), folder / "validation.pt")
    return len(samples)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "run"
    complete_run(output)
    return output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_timm_loads_what_was_validated(run: Path, tmp_path: Path, precision: str) -> None:
    if precision == "bf16":
        run = tmp_path / "run"
        # Without AVX-512 a CPU takes 30 times as long as in fp32.
        small = ("--set=recipe.data.image_size=16", "--set=recipe.model.name=test_efficientnet")
        bf16 = ("--set=bf16.enabled=true", *small)
        train_ok("--deepspeed_config", DIGITS, "--output", str(run), *SHORT, *bf16)
    done = export(str(run), "--output", str(tmp_path / "export"))
    assert done.returncode == 0, done.stderr
    best = max(events(run, "validation"), key=lambda line: line["top1"])
    assert f"top-1 {best['top1']:.2f} %, top-5 {best['top5']:.2f} % on 355 validation images" in done.stdout

    card = (tmp_path / "export/README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("model = "))
    count = save_validation_images(tmp_path / "export", 32 if precision == "fp32" else 16)
    program = PLAIN_TIMM.replace("MODEL", line.removeprefix("model = "))
    plain = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "export", capture_output=True, text=True, check=True
    )
    # fp32 of the very same weights; in bf16 the validation itself rounds, and one image may fall otherwise.
    assert int(plain.stdout) == pytest.approx(best["top1"] / 100 * count, abs=0.01 if precision == "fp32" else 3)


def test_all_files_have_the_modes_of_the_umask(run: Path, tmp_path: Path) -> None:
    (plain := tmp_path / "plain").write_text("")
    assert export(str(run), "--output", str(tmp_path / "export")).returncode == 0
    written = [file for folder in (run, tmp_path / "export") for file in folder.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert {file.name: file.stat().st_mode for file in written if file.stat().st_mode != plain.stat().st_mode} == {}


def test_the_card_of_a_run_that_was_stopped_says_how_far_it_was_trained(run: Path, tmp_path: Path) -> None:
    """1,442 images are 2 steps of 512 an epoch: after 3 of 6 steps training is in the middle of its second epoch."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (copy / "summary.json").unlink()
    export_of = choose(copy)[0]
    stopped = replace(export_of, checkpoint=replace(export_of.checkpoint, step=3), steps_done=4)
    text = card(stopped, True)
    assert "- **Trained:** 3 of 6 steps (1.5 of 3 epochs) on 1,442 images, by SGD" in text
    assert "not complete:** stopped, or still under way, after 4 of 6 steps (2 of 3 epochs); these are" in text
    assert "3 epochs of SGD" not in text
    assert "; no batch norm; fp32" in card(stopped, False)


def test_the_card(run: Path, tmp_path: Path) -> None:
    assert export(str(run)).returncode == 0
    card = (run / "export/README.md").read_text()
    best = max(events(run, "validation"), key=lambda line: line["top1"])
    assert f"- **Measured:** top-1 {best['top1']:.2f} %" in card
    assert '- **Classes,** from 0 on: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"].' in card
    assert "peak rate 0.2, × 0.1 at epochs 2; batch norm over the micro-batches of all GPUs; fp32; seed 0" in card
    assert "an image is resized to 32 × 32; pixels from 0 to 1, of them mean (0.3054, 0.3054, 0.3054)" in card
    assert "1 rank on " in card
    head = yaml.safe_load(card.split("---")[1])
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(best["top1"], 2)
    written = card.partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(written) == json.loads((run / "plan.json").read_text())


def test_a_damaged_best_gives_way_to_the_next(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (copy / "summary.json").unlink()
    first, second = sorted(find(copy / "checkpoints"), key=lambda c: c.top1 or 0, reverse=True)[:2]
    os.truncate(first.path / "mp_rank_00_model_states.pt", 10)
    done = export(str(copy))
    assert done.returncode == 0
    assert f"recipe: checkpoint {first.path} is left aside" in done.stderr
    assert f"top-1 {second.top1:.2f} %" in done.stdout
    assert f"the run had {first.top1:.2f} % at best, of which no whole checkpoint is kept" in done.stdout
    assert "**The run is not complete:**" in (copy / "export/README.md").read_text()


def test_files_that_others_have_spoilt_count_as_absent(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    for summary in ("{}", "[]", '{"final_top1', ""):
        (copy / "summary.json").write_text(summary)
        export_of, _ = choose(copy)
        assert export_of.summary is None
    known = export_of.validation
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"event": "validation"}\n{"event": "validation", "step": 5, "top1": "x"}\n')
        for top1 in ("1e999", "1" + "0" * 400, "NaN", "100.5", "-1"):
            metrics.write(f'{{"event": "validation", "step": 5, "epoch": 2, "top1": {top1}, "top5": 1, "count": 1}}\n')
    assert choose(copy)[0].validation == known
    assert choose(copy)[0].best_top1 == export_of.best_top1
    best = export_of.checkpoint
    (copy / "checkpoints" / best.path.name / "manifest.json").write_bytes(b"\xff")
    chosen, (message,) = choose(copy)
    assert chosen.checkpoint.step != best.step
    assert message == f"checkpoint {best.path} is left aside: its manifest.json cannot be read"


def test_what_the_card_says_of_precision_and_decay(run: Path) -> None:
    export_of, _ = choose(run)
    raw = export_of.config.source.raw
    raw["recipe"]["precision"] = "fp64"
    raw["recipe"]["schedule"]["decay_epochs"] = []
    text = card(replace(export_of, config=parse_config(raw, "plan.json")), True)
    assert "in fp32; trained and validated in fp64, from which they are rounded." in text
    assert "peak rate 0.2; batch norm" in text


def test_what_cannot_be_exported_is_refused_on_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    foreign = tmp_path / "foreign"
    subprocess.run(["cp", "-r", str(run), str(foreign)], check=True)
    for checkpoint in find(foreign / "checkpoints"):
        file = checkpoint.path / "mp_rank_00_model_states.pt"
        file.write_bytes(b"garbage")
        manifest = json.loads((checkpoint.path / "manifest.json").read_text())
        manifest["files"][file.name] = {"bytes": 7, "sha256": hashlib.sha256(b"garbage").hexdigest()}
        (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))
    study = tmp_path / "study"
    write_run(study / "case/seed-0")
    empty = tmp_path / "empty\x1b[2J"
    empty.mkdir()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(empty)], "holds no whole checkpoint"),
        ([str(run), "--output", str(tmp_path / "file/below")], "Not a directory"),
        ([str(foreign)], "mp_rank_00_model_states.pt is not what DeepSpeed saves: "),
        ([str(study)], f"did you mean {study}/case/seed-0?"),
    ):
        done = export(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("recipe: ")
        assert "\x1b" not in done.stderr
