"""``"max_micro_batch_size": "auto"`` on a GPU finds a micro-batch that trains, and twice that does not fit."""

from pathlib import Path

import pytest
import torch

from recipe.engine.micro_batch import largest_on_gpu, try_training
from recipe.model.build import build_model
from tests.gpu.test_training import on_gpu
from tests.launch import train
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

SIZES = [2**power for power in range(18)]  # the largest fits no GPU: about 0.9 MB per image of resnet18 at 64 pixels


def _found(rank: int, world_size: int, share: float) -> tuple[int, float]:
    """The largest micro-batch for a share of the memory, and the peak memory of its trial relative to that share."""
    device = torch.device("cuda", rank)
    torch.cuda.set_per_process_memory_fraction(share, device)
    model = build_model("resnet18", 10, seed=0, statistics=32)
    size = largest_on_gpu(SIZES, model, 64, torch.float16, device)
    torch.cuda.reset_peak_memory_stats(device)
    try_training(model, size, 64, torch.float16, device)
    peak = torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
    with pytest.raises(RuntimeError):
        try_training(model, 2 * size, 64, torch.float16, device)
    return size, peak / share


def test_the_largest_micro_batch_fits_and_twice_that_does_not(tmp_path: Path) -> None:
    (small,) = run_ranks(1, on_gpu, str(tmp_path / "small"), _found, 0.1)
    (large,) = run_ranks(1, on_gpu, str(tmp_path / "large"), _found, 0.4)
    assert small[0] < large[0]
    for _, peak in (small, large):
        assert 0.4 < peak <= 1


def test_a_micro_batch_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    done = train(
        *("--deepspeed_config", "ds_configs/resnet50_b8192.json", "--output", str(tmp_path)),
        *("--set=train_batch_size=16384", "--set=recipe.max_micro_batch_size=16384", "--set=tensorboard.enabled=false"),
        *("--set=recipe.data.source=synthetic", "--set=recipe.data.path=null", "--set=recipe.schedule.epochs=1"),
        *("--set=recipe.schedule.warmup_epochs=0", "--set=recipe.data.train_images=16384"),
    )
    assert done.returncode == 1
    assert "MicroBatchError: micro-batches of 16384 images do not fit" in done.stderr
    assert 'or use "auto"' in done.stderr
    assert "Traceback" not in done.stderr
