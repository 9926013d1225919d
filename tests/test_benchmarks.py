"""The benchmarks run and write what they should; how fast anything is, no test can say."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import engine_overhead


def test_engine_overhead_writes_a_table_and_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "overhead.json"
    sizes = "--model test_resnet --image-size 32 --micro-batch 2 --accumulation 1 2 --steps 2 --world-size"
    world_sizes = [1, 2] if torch.cuda.device_count() != 1 else [1]  # NCCL takes no two ranks on one GPU
    with mock.patch.dict(os.environ):  # what it sets there is for its ranks
        assert engine_overhead.main([*sizes.split(), *map(str, world_sizes), "--json", str(file)]) == 0

    report = json.loads(file.read_text())
    assert report["command"].startswith("python -m benchmarks.engine_overhead --model test_resnet --image-size 32")
    assert report["settings"] == {"model": "test_resnet", "image_size": 32, "micro_batch": 2, "precision": "fp32"}
    assert set(report["versions"]) == {"python", "torch", "deepspeed", "timm"}
    assert report["hardware"]["cores"] >= 1
    cases = [(ranks, accumulation) for ranks in world_sizes for accumulation in (1, 2)]
    assert [(result["world_size"], result["accumulation"]) for result in report["results"]] == cases
    for result in report["results"]:
        others = ["plain", "timm" if result["world_size"] == 1 else "ddp"]
        assert result["rounds"] == 2
        assert list(result["step_ms"]) == ["recipe", *others]
        assert list(result["recipe_ratio"]) == others
        for quartiles in (*result["step_ms"].values(), *result["recipe_ratio"].values()):
            assert 0 < quartiles["lower_quartile"] <= quartiles["median"] <= quartiles["upper_quartile"]
        assert max(result["update_differs_from_plain_by"].values()) < 1e-3

    table = file.with_suffix(".md").read_text()
    assert capsys.readouterr().out == table
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3 * len(cases)
    assert rows[0].startswith("| 1 | 1 | 2 | recipe | ")


def test_engine_overhead_compares_no_different_work() -> None:
    def loop(weight: float) -> engine_overhead.Loop:
        parameters = [nn.Parameter(torch.full((3,), weight))]
        return engine_overhead.Loop(lambda: None, torch.optim.SGD(parameters, lr=0.1))

    start = torch.zeros(3)
    close = engine_overhead.compare_training({"recipe": loop(1.0001), "plain": loop(1.0)}, start, "fp32")
    assert close == {"recipe": pytest.approx(1e-4, rel=1e-2)}
    with pytest.raises(RuntimeError, match=r"recipe does not train as plain does: .* their updates differ by 0.5"):
        engine_overhead.compare_training({"recipe": loop(1.5), "plain": loop(1.0)}, start, "fp32")
    with pytest.raises(RuntimeError, match="differ by nan"):
        engine_overhead.compare_training({"recipe": loop(float("nan")), "plain": loop(1.0)}, start, "fp32")
