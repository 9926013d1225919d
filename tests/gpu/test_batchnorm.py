"""The checks of tests/model/test_batchnorm.py on CUDA: one rank, ranks that share a GPU over gloo, and NCCL."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from recipe.model.batchnorm import _NormaliseByKernels
from tests.model import test_batchnorm as on_cpu
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

# An offset of 1000 in fp32 tests our own statistics; with one rank they are cuDNN's.
ONE_RANK = [name for name in on_cpu.CASES if name not in ("offset", "offset, channels_last")]


def with_torchs_kernels(case: on_cpu.Case) -> on_cpu.Case:
    """The case with the extra rounding of torch's kernels for contiguous tensors (Normalization.cuh, class GradOp).

    For half-precision input they round each product dy·(x − mean) to the input's type before they sum it in fp32: by at
    most its unit roundoff, half its epsilon.
    """
    if case.channels_last or case.dtype not in (torch.float16, torch.bfloat16):
        return case
    return replace(case, product_roundoff=torch.finfo(case.dtype).eps / 2)


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_is_plain_batch_norm(name: str) -> None:
    case = with_torchs_kernels(on_cpu.CASES[name])
    # cuDNN sums in an unknown order: at most one rounding per value (Higham 2002, section 4.2).
    case = replace(case, mean_roundings=case.micro_batch * math.prod(case.space) - 1)
    on_cpu.assert_agrees(case, [on_cpu.train(case, [0], device="cuda")])


def on_a_rank(rank: int, world: int, backend: str) -> dict[str, dict]:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    group = dist.new_group(backend=backend)
    return {name: on_cpu.train(on_cpu.CASES[name], [rank], device="cuda", group=group) for name in on_cpu.CASES}


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict]]:
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL does not support two ranks on one GPU, and torch sees only one")
    return run_ranks(2, on_a_rank, request.param)


@pytest.mark.parametrize("name", on_cpu.CASES)
def test_two_ranks_are_plain_batch_norm_on_the_joined_batch(ranks: list[dict[str, dict]], name: str) -> None:
    on_cpu.assert_agrees(with_torchs_kernels(on_cpu.CASES[name]), [rank[name] for rank in ranks])


def _waits(rank: int, world: int) -> None:
    group = dist.new_group(backend="nccl")
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 5, 3, 3, device="cuda").to(memory_format=form).requires_grad_()
        weight, bias, mean, var = (
            torch.ones(5, device="cuda").requires_grad_(grad) for grad in (True, True, False, False)
        )
        for mode in ("default", "error"):  # the first pass creates NCCL's communicator
            torch.cuda.set_sync_debug_mode(mode)
            _NormaliseByKernels.apply(x, weight, bias, mean, var, 1e-5, 0.1, group).sum().backward()
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait_for_the_device() -> None:
    """A single rank suffices: torch's SyncBatchNorm would wait on any number."""
    run_ranks(1, _waits)
