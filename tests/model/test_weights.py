"""Training starts from given weights, with a new head if the classes differ, and refuses those of other models."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from recipe.model.batchnorm import BatchNorm, join_neighbours
from recipe.model.build import build_model
from recipe.model.running_averages import _local_running_averages
from tests.launch import DIGITS, complete_run, recipe, train_ok


@pytest.fixture
def source(tmp_path: Path) -> nn.Module:
    """A model with ten classes, saved as a file of each kind and as a folder in the hub's layout."""
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
def test_weights_are_read_from_files_and_folders(
    tmp_path: Path, source: nn.Module, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build_model("test_resnet", 10, seed=0, statistics="local", weights=file)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_head_for_other_classes_is_initialised_as_without_weights(tmp_path: Path, source: nn.Module) -> None:
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
    join_neighbours(model, micro_batch=1)  # frozen batch norms need no process group
    local = build_model("test_resnet", 3, seed=7, statistics="local", weights=weights, freeze="backbone")
    assert _local_running_averages(local) == []  # an average over three ranks would round


def test_unsuitable_weights_are_refused(tmp_path: Path, source: nn.Module) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (print, ("run",))

    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
    torch.save({"state_dict": {"fc.weight": Code()}}, tmp_path / "code.pth")
    torch.save({name: value.to("meta") for name, value in source.state_dict().items()}, tmp_path / "meta.pth")
    conv = source.state_dict()["conv1.0.weight"]
    torch.save(source.state_dict() | {"conv1.0.weight": conv.to(torch.int8)}, tmp_path / "whole.pth")
    for name, weights, message in (
        ("resnet18", "a.safetensors", "these weights belong to a different model: it lacks "),
        ("resnet18", "a.safetensors", "check recipe.model.name"),
        ("test_resnet", "nowhere.pth", "nowhere.pth does not exist; name a .safetensors or .pth file"),
        ("test_resnet", "long" * 100, "does not exist; name a .safetensors or .pth file"),
        ("test_resnet", "/dev/null", "/dev/null is not a regular file"),
        ("test_resnet", "empty", "holds neither model.safetensors nor pytorch_model.bin"),
        ("test_resnet", "cut.safetensors", "it holds no weights, or more than weights; expected a .safe"),
        ("test_resnet", "meta.pth", "holds tensors that are sparse, complex, quantized, nested or without values"),
        ("test_resnet", "whole.pth", "of whole numbers are conv1.0.weight"),
        ("test_resnet", "code.pth", "it holds no weights, or more than weights; expected a .safe"),
    ):
        with pytest.raises(ValueError, match=r"recipe\.model\.weights") as refusal:
            build_model(name, 10, seed=0, statistics="local", weights=str(tmp_path / weights))
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_a_run_trains_only_the_head_of_exported_weights(tmp_path: Path) -> None:
    source, tuned = tmp_path / "source", tmp_path / "tuned"
    complete_run(source)
    assert recipe("export", str(source)).returncode == 0
    done = train_ok(
        *("--deepspeed_config", DIGITS, "--output", str(tuned), "--set=recipe.data.image_size=16"),
        *(f"--set=recipe.model.weights={source / 'export'}", "--set=recipe.model.freeze=backbone"),
        *("--set=recipe.schedule.epochs=1", "--set=recipe.schedule.warmup_epochs=0"),
        "--set=recipe.schedule.decay_epochs=[]",
    )
    assert f"from {source / 'export'}" in " ".join(done.stdout.split())
    before, after = (json.loads((run / "summary.json").read_text())["best_top1"] for run in (source, tuned))
    assert after > before - 1
