"""Plain timm loads an exported model and reproduces the run's validation."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from recipe.checkpoints.manifest import find
from recipe.commands.export import card, main, timm_crop, write
from recipe.commands.trained import read_trained
from recipe.data import open_datasets
from recipe.data.augment import cut, evaluation_view
from tests.data.images import picture, pixels
from tests.launch import DIGITS, SHORT, complete_run, events, recipe, train_ok
from tests.run_folders import write_run

pytestmark = pytest.mark.slow

# A program that can import neither this package nor DeepSpeed.
PLAIN_TIMM = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("recipe", "deepspeed"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:export", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
files = sorted(Path("images/val").glob("*/*.png"))
images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
with torch.no_grad():
    logits = model(images)
names = [model.pretrained_cfg["label_names"][place] for place in logits.argmax(1)]
print(sum(name == file.parent.name for name, file in zip(names, files, strict=True)), len(files))
import onnxruntime
session = onnxruntime.InferenceSession("export/model.onnx", providers=["CPUExecutionProvider"])
(found,) = session.run(["logits"], {"images": images.numpy()})
print(float((torch.from_numpy(found) - logits).abs().max()))
"""


def write_images(root: Path, image_size: int, size: tuple[int, int]) -> None:
    """Write the validation images of a run at ``image_size`` as PNG files of ``size``, for training and validation."""
    _, held_out = open_datasets("digits", None, image_size=image_size, crop="padded", flip=False, seed=0)
    for number, label in enumerate(held_out.labels.tolist()):
        image = Image.fromarray(held_out.image(number).pixels.numpy()).resize(size, Image.Resampling.BILINEAR)
        for part in ("train", "val"):
            (root / part / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(root / part / str(label) / f"{number:03}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "run"
    complete_run(output)
    return output


@pytest.mark.parametrize("case", ["digits", "folder"])
def test_plain_timm_reproduces_the_runs_accuracy(run: Path, tmp_path: Path, case: str) -> None:
    image_size = 32 if case == "folder" else 16
    write_images(tmp_path / "images", image_size, (48, 40) if case == "folder" else (image_size, image_size))
    if case == "folder":
        run = tmp_path / "run"
        options = [
            "recipe.data.source=imagefolder",
            "recipe.data.crop=random_resized",
            "recipe.data.train_images=355",
            "recipe.data.image_size=[[0, 16], [1, 24]]",
            "recipe.data.validation_image_size=32",
            "train_batch_size=64",
            "train_micro_batch_size_per_gpu=64",
        ]
        arguments = ["--data", str(tmp_path / "images"), *(f"--set={option}" for option in options)]
        train_ok("--deepspeed_config", DIGITS, "--output", str(run), *SHORT, *arguments)
        sizes = "- **Images:** 32 px in validation and in the code below, 16, 24 px in training.\n"
        assert sizes in card(read_trained(run))
        assert recipe("evaluate", str(run)).returncode == 0
        evaluation = json.loads((run / "evaluation/evaluation.json").read_text())
        assert (evaluation["image_size"], evaluation["top1"]) == (32, read_trained(run).top1)
        (run / "summary.json").unlink()  # as in a stopped run: the data names the classes
    done = recipe("export", str(run), "--output", str(tmp_path / "export"), "--format", "onnx")
    assert done.returncode == 0, done.stderr
    best = max(events(run, "validation"), key=lambda line: line["top1"])
    assert f"top-1 {best['top1']:.2f} % on 355 validation images" in done.stdout
    assert done.stdout.endswith(f"timm.create_model('local-dir:{tmp_path}/export', pretrained=True).eval()\n")
    described = json.loads((tmp_path / "export/config.json").read_text())
    assert described["label_names"] == [str(digit) for digit in range(10)]
    prepared = described["pretrained_cfg"]
    mean = [0.485, 0.456, 0.406] if case == "folder" else [0.3054] * 3
    assert (prepared["input_size"], prepared["mean"]) == ([3, image_size, image_size], mean)
    assert (prepared["interpolation"], prepared["classifier"], prepared["first_conv"]) == ("bilinear", "fc", "conv1.0")
    plain = subprocess.run([sys.executable, "-c", PLAIN_TIMM], cwd=tmp_path, capture_output=True, text=True, check=True)
    correct, count, onnx_difference = plain.stdout.split()
    # Resizing with PIL sometimes gives a neighbouring grey level.
    allowed = {"digits": 0.01, "folder": 1}[case]
    assert int(correct) == pytest.approx(best["top1"] / 100 * int(count), abs=allowed)
    assert float(onnx_difference) < 1e-4


def test_weights_trained_in_half_precision_keep_their_values(run: Path, tmp_path: Path) -> None:
    trained = read_trained(run)
    halves = {name: own.bfloat16() if own.is_floating_point() else own for name, own in trained.state.items()}
    write(replace(trained, state=halves), tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == halves.keys()
    for name, own in halves.items():
        assert exported[name].dtype in (torch.float32, torch.int64)
        assert torch.equal(exported[name], own.to(exported[name].dtype))


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (20, 20)])
@pytest.mark.parametrize("crop", ["random_resized", "padded", "none"])
def test_timm_preprocesses_an_image_like_the_validation(crop: str, size: tuple[int, int]) -> None:
    crop_mode, crop_pct = timm_crop(32, crop)
    transform = timm.data.create_transform((3, 32, 32), crop_mode=crop_mode, crop_pct=crop_pct, normalize=False)
    image = picture(width=size[0], height=size[1])
    view = evaluation_view(*size[::-1], image_size=32, crop=crop)
    difference = transform(image).permute(1, 2, 0).int() - cut(pixels(image), view, 32).int()
    assert difference.abs().max() <= 1


def test_crop_pct_gives_the_short_side_of_the_validation() -> None:
    """The paper's 256 for 224; round(32 × 256 / 224) = round(36.57) = 37 for 32."""
    assert timm_crop(224, "random_resized") == ("center", 0.875)
    assert math.floor(32 / timm_crop(32, "random_resized")[1]) == 37
    for size in range(1, 1000):
        assert math.floor(size / timm_crop(size, "random_resized")[1]) == round(size * 256 / 224)


def test_file_modes_follow_the_umask(run: Path, tmp_path: Path) -> None:
    (plain := tmp_path / "plain").write_text("")
    assert recipe("export", str(run), "--output", str(tmp_path / "export")).returncode == 0
    written = [file for folder in (run, tmp_path / "export") for file in folder.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert {file.name: file.stat().st_mode for file in written if file.stat().st_mode != plain.stat().st_mode} == {}


def test_the_card(run: Path) -> None:
    """1,442 images are 2 steps of 512 per epoch, so 3 of 6 steps are 1.5 epochs."""
    assert recipe("export", str(run)).returncode == 0
    text = (run / "export/README.md").read_text()
    best = max(events(run, "validation"), key=lambda line: line["top1"])
    assert f"- **Measured:** top-1 {best['top1']:.2f} % on 355 validation images.\n" in text
    assert f"- **Trained:** {best['step'] + 1} of 6 steps (" in text
    (result,) = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(best["top1"], 2)
    digits = ", ".join(f'"{digit}"' for digit in range(10))
    assert f"- **Classes:** 10: {digits}, in the order of the logits.\n" in text
    described = json.loads((run / "export/config.json").read_text())
    assert described["recipe"] == json.loads((run / "plan.json").read_text())

    stopped = card(replace(read_trained(run), step=3, top1=None))
    assert "- **Measured:** not validated.\n- **Trained:** 3 of 6 steps (1.5 of 3 epochs) on 1,442 ima" in stopped
    assert "model-index" not in stopped


def test_a_damaged_best_checkpoint_is_skipped(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    first, second = sorted(find(copy / "checkpoints"), key=lambda c: c.top1 or 0, reverse=True)[:2]
    os.truncate(first.path / "mp_rank_00_model_states.pt", 10)
    assert read_trained(copy).top1 == second.top1
    assert f"recipe: checkpoint {first.path} is skipped: {first.path}/mp_rank" in capsys.readouterr().err
    (first.path / "manifest.json").write_bytes(b"\xff")
    assert read_trained(copy).name == str(second.path)
    assert f"{first.path} is skipped: its manifest.json cannot be read\n" in capsys.readouterr().err


def test_invalid_input_is_refused_on_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (tmp_path / "file").write_text("")
    assert main([str(run), "--output", str(tmp_path / "done")]) == 0
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
        ([str(empty)], "has no intact checkpoint"),
        ([str(run), "--output", str(tmp_path / "file/below")], "Not a directory"),
        ([str(foreign)], "mp_rank_00_model_states.pt is not a DeepSpeed checkpoint: "),
        ([str(tmp_path / "done")], "is an export already; name the folder of the run"),
        ([str(study)], f"did you mean {study}/case/seed-0?"),
        ([str(run), "--format", "onnx"], "--format onnx needs onnxscript: pip install onnxscript"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("recipe: ")
        assert message in error
        assert "\x1b" not in error
