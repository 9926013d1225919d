"""Training starts from weights of files, with a head of its own where the classes differ, and refuses foreign ones."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from recipe.data import open_datasets
from recipe.model.batchnorm import BatchNorm
from recipe.model.build import build_model
from recipe.model.running_averages import _differing
from tests.launch import DIGITS, recipe, train_ok


@pytest.fixture
def source(tmp_path: Path) -> nn.Module:
    """A model of ten classes, in a file of each kind and in a folder as the hub has it."""
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 1)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "a.pth"
    )
    (tmp_path / "hub").mkdir()
    save_file(model.state_dict(), tmp_path / "hub/model.safetensors")
    return model


@pytest.mark.parametrize("file", ["a.safetensors", "a.pth", "hub", "local-dir:hub"])
def test_weights_come_from_files_and_folders(
    tmp_path: Path, source: nn.Module, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build_model("test_resnet", 10, seed=0, statistics="local", weights=file)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_head_for_other_classes_is_drawn_as_without_weights(tmp_path: Path, source: nn.Module) -> None:
    model = build_model("test_resnet", 3, seed=7, statistics="local", weights=str(tmp_path / "a.safetensors"))
    fresh = build_model("test_resnet", 3, seed=7, statistics="local")
    for name, value in model.state_dict().items():
        other = fresh if name.startswith("fc.") else source
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_frozen_backbone_keeps_weights_and_statistics(tmp_path: Path, source: nn.Module) -> None:
    weights = str(tmp_path / "a.safetensors")
    model = build_model("test_resnet", 3, seed=7, statistics=4, weights=weights, freeze="backbone")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    plain.load_state_dict(model.state_dict())
    model.train()
    images = torch.randn(8, 3, 32, 32)
    logits = model(images)
    assert torch.allclose(logits, plain(images), rtol=1e-5)  # evaluation mode
    logits.sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert not any(module.training for module in model.modules() if isinstance(module, BatchNorm))
    local = build_model("test_resnet", 3, seed=7, statistics="local", weights=weights, freeze="backbone")
    assert _differing(local, None) == []  # an average over three ranks would round


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, source: nn.Module) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (print, ("run",))

    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
    torch.save({"state_dict": {"fc.weight": Code()}}, tmp_path / "code.pth")
    torch.save({name: value.to("meta") for name, value in source.state_dict().items()}, tmp_path / "meta.pth")
    for name, weights, message in (
        ("resnet18", "a.safetensors", "these are weights of another model: it lacks "),
        ("resnet18", "a.safetensors", "check recipe.model.name"),
        ("test_resnet", "nowhere.pth", "nowhere.pth is not there; write a .safetensors or .pth file"),
        ("test_resnet", "/dev/null", "/dev/null is no regular file"),
        ("test_resnet", "empty", "holds neither model.safetensors nor pytorch_model.bin"),
        ("test_resnet", "cut.safetensors", "it holds no weights, or more than weights; expected a .safe"),
        ("test_resnet", "meta.pth", "holds tensors that are sparse, complex or without values"),
        ("test_resnet", "code.pth", "it holds no weights, or more than weights; expected a .safe"),
    ):
        with pytest.raises(ValueError, match=r"recipe\.model\.weights") as refusal:
            build_model(name, 10, seed=0, statistics="local", weights=str(tmp_path / weights))
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images: five digits of each class to train on, ten to validate on."""
    root = tmp_path_factory.mktemp("few")
    for part, dataset in zip(
        ("train", "val"), open_datasets("digits", None, 16, "none", False, 0, "stop"), strict=True
    ):
        for label in range(10):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for index in (dataset.labels == label).nonzero()[: 5 if part == "train" else 10, 0].tolist():
                Image.fromarray(dataset.image(index).pixels.numpy()).save(folder / f"{index}.png")
    return root


SMALL = "--set=recipe.data.image_size=16"


@pytest.mark.slow
def test_what_a_run_exported_helps_where_images_are_few(few_digits: Path, tmp_path: Path) -> None:
    longer = ("--set=train_batch_size=64", "--set=recipe.schedule.epochs=5", "--set=recipe.schedule.decay_epochs=[4]")
    train_ok("--deepspeed_config", DIGITS, SMALL, "--output", str(tmp_path / "source"), *longer)
    done = recipe("export", str(tmp_path / "source"))
    assert done.returncode == 0, done.stderr
    few = (
        *("--deepspeed_config", DIGITS, SMALL, "--data", str(few_digits), "--set=recipe.data.source=imagefolder"),
        *("--set=recipe.data.train_images=50", "--set=recipe.data.validation_images=100"),
        *("--set=train_batch_size=25", "--set=recipe.schedule.epochs=4", "--set=recipe.schedule.warmup_epochs=0"),
        *("--set=recipe.schedule.decay_epochs=[]", "--set=recipe.data.mean=[0.3054,0.3054,0.3054]"),
        *("--set=recipe.data.std=[0.3237,0.3237,0.3237]",),
    )
    weights = f"--set=recipe.model.weights={tmp_path / 'source/export'}"
    top1 = {}
    for name, start in {
        "scratch": (),
        "all": (weights,),
        "head": (weights, "--set=recipe.model.freeze=backbone"),
    }.items():
        done = train_ok(*few, *start, "--output", str(tmp_path / name))
        top1[name] = json.loads((tmp_path / name / "summary.json").read_text())["final_top1"]
        assert ("from " + str(tmp_path / "source/export") in " ".join(done.stdout.split())) == (name != "scratch")
    assert top1["all"] > top1["scratch"] + 20
    assert top1["head"] > top1["scratch"] + 20
