"""Batch norm over ranks, compared with torch's own in float64 on the joined batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from recipe.model.batchnorm import BatchNorm, Statistics, convert_batchnorm
from tests.ranks import run_ranks

CHANNELS = 5
STEPS = 3

# Relative to the largest value. Half-precision results are fp32 results rounded once, which adds their unit roundoff.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-11 + 1e-5,
    torch.bfloat16: 2**-8 + 1e-5,
}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = None  # None: the input's
    micro_batch: int = 3
    space: tuple[int, ...] = (4, 3)
    offset: float = 0.0
    channels_last: bool = False
    act: bool = False
    mean_roundings: int = 1  # half ulps by which the mean can be wrong
    product_roundoff: float = 0.0  # relative error of each product dy·(x − mean) that the backward pass sums

    @property
    def buffers(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype] + self.offset_error

    @property
    def offset_error(self) -> float:
        """Error of x̂ due to the offset: of the mean, and of the two terms that cancel in y = a·x + (β − a·mean).

        Each is half an ulp of the offset, relative to a standard deviation of at least 1/2. This also holds for torch's
        kernels, except for cuDNN's mean.
        """
        return (self.mean_roundings + 2) * self.offset * torch.finfo(self.buffers).eps

    def module(self) -> nn.Module:
        """The plain module with the dtypes of the case: buffers in fp32 at least, whatever the parameters."""
        torch.manual_seed(0)
        if self.act:
            module = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU, dtype=self.buffers)
        else:
            kind = nn.BatchNorm2d if self.space else nn.BatchNorm1d
            module = kind(CHANNELS, dtype=self.buffers)
        for parameter in module.parameters():
            parameter.data = torch.rand(CHANNELS).add(0.5).to(self.parameters or self.dtype)
        return module

    def batch(self, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """A rank's micro-batch and output gradient; mean and scale differ between ranks and channels."""
        generator = torch.Generator().manual_seed(100 * step + rank)
        shape = (2, self.micro_batch, CHANNELS, *self.space)
        x, dy = torch.randn(shape, generator=generator, dtype=torch.float64)
        channel = torch.arange(CHANNELS).view(-1, *[1] * len(self.space))
        x = self.offset + channel - rank + x * (1 + channel + 2 * rank) / 2
        return x.to(self.dtype), (dy + 0.5).to(self.dtype)

    def joined(self, step: int, ranks: list[int]) -> tuple[Tensor, Tensor]:
        x, dy = (torch.cat(parts) for parts in zip(*(self.batch(step, rank) for rank in ranks), strict=True))
        if self.channels_last:
            x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
        return x, dy


CASES = {
    "fp32": Case(),
    "fp64": Case(torch.float64),
    "channels_last": Case(channels_last=True),
    "offset": Case(offset=1000.0),
    "offset, channels_last": Case(offset=1000.0, channels_last=True),
    "offset, fp64": Case(torch.float64, offset=1000.0),
    "act": Case(act=True),
    "one pixel": Case(space=(1, 1)),
    "1d": Case(space=()),
    "fp16": Case(torch.float16),
    "fp16, channels_last": Case(torch.float16, channels_last=True),
    "fp16 parameters": Case(torch.float32, torch.float16),
    "bf16": Case(torch.bfloat16),
    "bf16, channels_last": Case(torch.bfloat16, channels_last=True),
    "bf16 parameters": Case(torch.float32, torch.bfloat16),
}


def steps(case: Case, module: nn.Module, ranks: list[int], device: str, dtype: torch.dtype | None = None) -> dict:
    """Results of each of ``STEPS`` steps on the joined micro-batches of ``ranks``, and the final buffers."""
    result: dict[str, Any] = {"outputs": [], "gradients": [], "parameter gradients": [], "channels_last": []}
    module = module.to(device)
    for step in range(STEPS):
        x, dy = (t.to(device, dtype) for t in case.joined(step, ranks))
        x.requires_grad_()
        y = module(x)
        module.zero_grad()
        y.backward(dy)
        result["outputs"].append(y.detach().cpu())
        result["gradients"].append(x.grad.cpu())
        result["parameter gradients"].append([parameter.grad.cpu() for parameter in module.parameters()])
        if case.channels_last:
            result["channels_last"] += [t.is_contiguous(memory_format=torch.channels_last) for t in (y, x.grad)]
    return result | {"buffers": {name: buffer.cpu() for name, buffer in module.named_buffers()}}


def train(
    case: Case,
    ranks: list[int],
    statistics: Statistics = "global",
    device: str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> dict:
    module = convert_batchnorm(case.module(), statistics)
    module.process_group = group
    return steps(case, module, ranks, device)


def reference(case: Case, ranks: list[int]) -> dict:
    return steps(case, case.module().double(), ranks, "cpu", torch.float64)


def rounded_products(case: Case, step: int, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """How much rounding of the products dy·(x − mean) can change the gradients of input and weight."""
    x, dy = (t.double() for t in case.joined(step, ranks))
    others = [dim for dim in range(x.dim()) if dim != 1]
    var, mean = torch.var_mean(x, others, correction=0, keepdim=True)
    invstd = (var + 1e-5).rsqrt()
    normalised = (x - mean) * invstd
    products = case.product_roundoff * (dy * normalised).abs()
    weight = next(case.module().parameters()).double().view_as(mean)
    return weight * invstd * normalised.abs() * products.mean(others, keepdim=True), products.sum(others)


def assert_near(
    actual: Tensor,
    expected: Tensor,
    tolerance: float,
    scale: Tensor | None = None,
    slack: Tensor | float = 0.0,
) -> None:
    """Assert an error of at most ``tolerance``, relative to ``scale``, in addition to each value's own ``slack``."""
    error = ((actual - expected).abs() - slack).max() / (expected.abs().max() if scale is None else scale)
    assert error <= tolerance, f"{error:.2g} > {tolerance:.2g}"


def assert_agrees(case: Case, results: list[dict]) -> None:
    """Assert that the ranks' joined ``results`` equal those of the plain module in float64 on the joined batch."""
    expected = reference(case, list(range(len(results))))
    for step in range(STEPS):
        slacks = {"outputs": 0.0, "gradients": 0.0}
        parameter_slacks = [0.0, 0.0]
        if case.product_roundoff:
            slacks["gradients"], parameter_slacks[0] = rounded_products(case, step, list(range(len(results))))
        for kind, slack in slacks.items():
            parts = [result[kind][step] for result in results]
            assert {part.dtype for part in parts} == {case.dtype}
            assert_near(torch.cat(parts), expected[kind][step], case.tolerance, slack=slack)

        by_rank = [result["parameter gradients"][step] for result in results]
        gradients = zip(expected["parameter gradients"][step], parameter_slacks, *by_rank, strict=True)
        for gradient, slack, *parts in gradients:
            dtype = case.parameters or case.dtype
            assert {part.dtype for part in parts} == {dtype}
            # The ranks' sums can cancel, so errors are relative to them.
            scale = sum(part.double().abs().max() for part in parts)
            tolerance = TOLERANCE[dtype] + case.offset_error
            assert_near(sum(part.double() for part in parts), gradient, tolerance, scale, slack)

    for name, buffer in expected["buffers"].items():
        values = [result["buffers"][name] for result in results]
        assert all(torch.equal(value, values[0]) for value in values), f"{name} differs between ranks"
        assert values[0].dtype == (torch.int64 if name == "num_batches_tracked" else case.buffers)
        assert_near(values[0], buffer, TOLERANCE[case.buffers])
    assert all(all(result["channels_last"]) for result in results)


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    """Everything that needs several ranks, in one launch per world size."""
    return {
        "cases": {name: train(case, [rank]) for name, case in CASES.items()},
        "local": train(CASES["fp32"], [rank], "local"),
        "mean errors": [mean_error(rank, layout) for layout in (torch.contiguous_format, torch.channels_last)],
        "model error": joined_model_error("test_efficientnet", rank, world),
    }


def mean_error(rank: int, layout: torch.memory_format) -> float:
    """Error of the joined mean of many values around 1000; a plain sum in fp32 would lose its last bits."""
    x = torch.randn(16, 64, 28, 28, generator=torch.Generator().manual_seed(rank)) + 1000
    module = BatchNorm(64, momentum=1.0)
    module(x.contiguous(memory_format=layout))
    mean = x.double().mean((0, 2, 3))
    dist.all_reduce(mean)
    return (module.running_mean - mean / dist.get_world_size()).abs().max().item()


def joined_model_error(name: str, rank: int, world: int) -> float:
    """Largest relative error of the logits and of the parameters' gradients, summed over the ranks."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=4).double()
    torch.manual_seed(0)
    model = convert_batchnorm(timm.create_model(name, num_classes=4), "global").double()
    images = torch.randn(2 * world, 3, 64, 64, dtype=torch.float64)
    expected = plain(images)
    expected.square().sum().backward()
    logits = model(images[2 * rank : 2 * rank + 2])
    logits.square().sum().backward()

    def error(actual: Tensor, expected: Tensor) -> float:
        # Some gradients are zero except for rounding: a bias before another batch norm.
        return ((actual - expected).norm() / expected.norm().clamp(min=1)).item()

    errors = [error(logits, expected[2 * rank : 2 * rank + 2])]
    for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        errors.append(error(parameter.grad, twin.grad))
    return max(errors)


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    return run_ranks(request.param, on_a_rank)


@pytest.mark.parametrize("name", CASES)
def test_global_is_plain_batch_norm_on_the_joined_batch(ranks: list[dict], name: str) -> None:
    assert_agrees(CASES[name], [rank["cases"][name] for rank in ranks])


def test_a_large_mean_is_found_to_the_last_bit(ranks: list[dict]) -> None:
    half_an_ulp = 2**-15
    assert max(error for rank in ranks for error in rank["mean errors"]) < 1.01 * half_an_ulp


def test_local_is_plain_batch_norm_on_each_rank(ranks: list[dict]) -> None:
    for rank, result in enumerate(ranks):
        expected = steps(Case(), Case().module(), [rank], "cpu")
        torch.testing.assert_close(result["local"], expected, rtol=0, atol=0)


def test_a_converted_model_trains_like_the_plain_one_on_the_joined_batch(ranks: list[dict]) -> None:
    assert max(rank["model error"] for rank in ranks) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_one_rank_needs_no_process_group(name: str) -> None:
    assert_agrees(CASES[name], [train(CASES[name], [0])])


@pytest.mark.parametrize("name", CASES)
def test_evaluation_uses_the_running_averages(name: str) -> None:
    case = CASES[name]
    module, plain = convert_batchnorm(case.module(), "global"), case.module().double()
    for m in (module, plain):
        m.running_mean.copy_(torch.arange(CHANNELS) + case.offset)
        m.running_var.copy_(torch.arange(1, 1 + CHANNELS))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    x, _ = case.joined(0, [0, 1])
    y = module.eval()(x)
    assert y.dtype == case.dtype
    assert not case.channels_last or y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, plain.eval()(x.double()), case.tolerance)
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_conversion_keeps_settings_parameters_and_buffers() -> None:
    plain = BatchNormAct2d(CHANNELS, eps=1e-3, momentum=0.01, act_layer=nn.PReLU).double().eval()
    plain.bias.requires_grad_(False)
    module = convert_batchnorm(plain, "local")
    assert isinstance(module, BatchNorm)
    assert (module.eps, module.momentum, module.training) == (1e-3, 0.01, False)
    assert (module.act, module.drop) == (plain.act, plain.drop)
    assert module.bias is plain.bias
    assert module.running_var is plain.running_var
    assert list(module.state_dict()) == list(plain.state_dict())


def test_conversion_replaces_batch_norms_and_nothing_else() -> None:
    shared, frozen, group = nn.BatchNorm2d(CHANNELS), FrozenBatchNormAct2d(CHANNELS), nn.GroupNorm(1, CHANNELS)
    model = nn.Sequential(shared, nn.Sequential(shared, frozen), group, shared)
    assert convert_batchnorm(model, "global") is model
    assert isinstance(model[0], BatchNorm)
    assert model[0] is model[1][0] is model[3]
    assert (model[1][1], model[2]) == (frozen, group)
    for unknown in (nn.LazyBatchNorm2d(), nn.BatchNorm2d(CHANNELS, affine=False)):
        with pytest.raises(ValueError, match="BatchNorm2d is a batch norm that the recipe cannot convert"):
            convert_batchnorm(nn.Sequential(unknown), "global")


@pytest.mark.parametrize("name", ["resnet18", "test_resnet", "test_efficientnet", "levit_128s"])
def test_converted_timm_models_compute_the_same_bits(name: str) -> None:
    plain, model = (timm.create_model(name, num_classes=4) for _ in range(2))
    convert_batchnorm(model, "global").load_state_dict(plain.state_dict())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert {type(module) for module in norms} == {BatchNorm}
    size = 224 if "levit" in name else 64
    images = torch.randn(2, 3, size, size)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(images), plain.train(mode)(images), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
