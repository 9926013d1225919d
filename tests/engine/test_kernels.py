"""The settings of torch's kernels, and training with compiled code."""

import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from recipe.engine.device import choose_kernels
from recipe.engine.loop import Loss, training_loss
from recipe.model.batchnorm import BatchNorm
from recipe.model.running_averages import update_running_averages
from tests.ranks import run_ranks

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restore_settings() -> Iterator[None]:
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    tf32 = matmul.allow_tf32, cudnn.allow_tf32
    yield
    cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
    matmul.allow_tf32, cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("benchmark", [True, False])
def test_kernel_settings_are_passed_to_torch(tf32: bool, benchmark: bool) -> None:
    choose_kernels(tf32=tf32, cudnn_benchmark=benchmark)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert (cudnn.benchmark, cudnn.deterministic) == (benchmark, not benchmark)


def small_model(n: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3), BatchNorm(4, statistics="global"), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3), BatchNorm(4, statistics=n), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)),
        )


def trained(model: nn.Module, loss_function: Loss, seed: int) -> list[Tensor]:
    """Losses, gradients and running averages of two steps of three micro-batches, and the logits in validation."""
    seen, generator = [], torch.Generator().manual_seed(seed)
    images, labels = torch.randn(6, 4, 3, 8, 8, generator=generator), torch.randint(5, (6, 4), generator=generator)
    for micro_batch in range(6):
        loss = loss_function(model(images[micro_batch]), labels[micro_batch])
        loss.backward()
        seen.append(loss.detach())
        if micro_batch % 3 == 2:
            update_running_averages(model)
    seen += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    seen += [buffer.double() for buffer in model.buffers()]
    with torch.no_grad():
        return [*seen, model.eval()(images[0])]


def _trains_the_same_without_graph_breaks(rank: int, world_size: int, backend: str) -> None:
    warnings.filterwarnings("ignore")  # within torch.compile
    torch.compile = partial(torch.compile, backend=backend)
    torch._dynamo.reset()
    counters.clear()
    n = 4 * world_size if world_size > 1 else 2  # samples of all ranks, or half of this one's
    model = small_model(n)
    names = list(model.state_dict())
    found = trained(model, training_loss(model, label_smoothing=0.0, compiled=True), rank)
    assert list(model.state_dict()) == names
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 3  # the model, the loss, and validation
    plain_model = small_model(n)
    plain_loss = training_loss(plain_model, label_smoothing=0.0, compiled=False)
    for ours, plain in zip(found, trained(plain_model, plain_loss, rank), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


# The second case only makes the graphs: compiling them on two ranks takes a minute.
@pytest.mark.parametrize(("world_size", "backend"), [(1, "inductor"), (2, "aot_eager")])
def test_compiled_code_trains_the_same_without_graph_breaks(world_size: int, backend: str) -> None:
    run_ranks(world_size, _trains_the_same_without_graph_breaks, backend)
