"""What torch keeps for the process; what it does to a GPU's kernels, tests/gpu shows."""

from collections.abc import Iterator

import pytest
import torch

from recipe.kernels import choose_kernels

backends = torch.backends


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = backends.cudnn.benchmark, backends.cudnn.deterministic
    tf32 = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    yield
    backends.cudnn.benchmark, backends.cudnn.deterministic = before
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("benchmark", [True, False])
def test_the_settings_are_torchs(tf32: bool, benchmark: bool) -> None:
    choose_kernels(tf32=tf32, cudnn_benchmark=benchmark)
    assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32) == (tf32, tf32)
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert (backends.cudnn.benchmark, backends.cudnn.deterministic) == (benchmark, not benchmark)
