"""The gradient noise scale, compared with closed forms on one and several ranks, and in real runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.engine.gradient_norms import GradientNorms
from recipe.plan.noise_scale import (
    DECAY,
    ENOUGH,
    Estimate,
    NoiseScale,
    estimate,
    in_words,
    planned_measurements,
    too_few,
)
from tests.engine.test_start import new_engine, plain_training, samples, small_model, train_step, weights_of
from tests.launch import DIGITS, SHORT, events, train_ok
from tests.ranks import run_ranks


def test_expected_norms_at_two_batch_sizes_give_both_unknowns() -> None:
    # E|G_B|² = |G|² + tr(Σ) / B with |G|² = 3 and tr(Σ) = 40
    found = estimate(3 + 40 / 8, 3 + 40 / 64, 8, 64)
    assert found == pytest.approx(Estimate(gradient_variance=40, gradient_norm_squared=3), rel=1e-14)


class Mean(nn.Module):
    """Has the loss ½|w − x|² on a sample x: the gradient w − x has the mean w − E x and the covariance of x."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.first, self.rest = (nn.Parameter(part.clone()) for part in weights.split([2, len(weights) - 2]))

    def loss(self, x: Tensor) -> Tensor:
        return 0.5 * (torch.cat([self.first, self.rest]) - x).square().sum(1).mean()


def test_estimates_are_unbiased_on_gaussian_samples() -> None:
    """Their means over many steps are tr(Σ) and |G|² within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=torch.float64)
    model = Mean(torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1], dtype=torch.float64))
    variance, norm_squared = float(deviations.square().sum()), 0.3**2 + 0.2**2 + 0.5**2 + 0.1**2
    norms = GradientNorms(model.parameters(), due=lambda: True)
    micro_batch, accumulation, steps = 4, 8, 2000
    found = []
    for _ in range(steps):
        model.zero_grad()
        for _ in range(accumulation):
            x = deviations * torch.randn(micro_batch, 5, generator=generator, dtype=torch.float64)
            (model.loss(x) / accumulation).backward()
        taken = norms.take(scale=1.0)
        assert taken is not None
        found.append(estimate(*taken.tolist(), micro_batch, micro_batch * accumulation))
    estimates = torch.tensor(found, dtype=torch.float64)
    errors = estimates.std(0) / math.sqrt(steps)
    for mean, error, expected in zip(estimates.mean(0), errors, (variance, norm_squared), strict=True):
        assert float(error) < 0.05 * expected  # small enough to see a mistake
        assert abs(float(mean) - expected) < 4 * float(error)


def test_moving_averages_follow_their_closed_form() -> None:
    averages = NoiseScale()
    assert averages.summary(every_steps=5) is None
    for step in (0, 5, 10):
        assert averages.add(Estimate(40.0, 2.0), step)
    assert averages.values() == {
        "gradient_variance": pytest.approx(40),
        "gradient_norm_squared": pytest.approx(2),
        "noise_scale": pytest.approx(20),
    }
    averages.add(Estimate(50.0, 2.0), 15)
    expected = (40 * (DECAY + DECAY**2 + DECAY**3) + 50) / (1 + DECAY + DECAY**2 + DECAY**3)
    assert averages.values()["gradient_variance"] == pytest.approx(expected, rel=1e-12)
    told = {"measurements": 4, "last_step": 15, "every_steps": 5, "lowest": None, "highest": None}
    assert averages.summary(every_steps=5) == averages.values() | told


def test_the_range_starts_after_enough_measurements() -> None:
    averages = NoiseScale()
    for step in range(ENOUGH - 1):
        averages.add(Estimate(1.0 if step % 2 else 1000.0, 2.0), step)
    assert averages.lowest is averages.highest is None
    scales = []
    for step in range(ENOUGH - 1, ENOUGH + 40):
        averages.add(Estimate(40.0 if step < ENOUGH + 20 else 400.0, 2.0), step)
        scales.append(averages.values()["noise_scale"])
    averages.add(Estimate(40.0, -1000.0), ENOUGH + 40)
    assert averages.values()["noise_scale"] is None
    assert (averages.lowest, averages.highest) == (min(scales), max(scales))


@pytest.mark.parametrize("total_steps", [1, 19, 20, 21, 80, 381, 14_040])
def test_too_few_measurements_name_a_remedy(total_steps: int) -> None:
    """The message names the longest interval that gives enough measurements, if there is one."""
    often = [every for every in range(1, total_steps + 1) if len(range(0, total_steps, every)) >= ENOUGH]
    every = 10**6
    text = too_few(planned_measurements(total_steps, every), total_steps, every)
    assert text is not None
    assert text.startswith("1 measurement instead of about 20: it may be far off; ")
    if often:
        assert text.endswith(f"with recipe.noise_scale.every_steps = {often[-1]} there are enough")
        assert too_few(planned_measurements(total_steps, often[-1]), total_steps, often[-1]) is None
    else:
        assert f"; with recipe.noise_scale.every_steps = 1 there are {total_steps}; a run" in text
        assert text.endswith(f"; a run of {total_steps} steps has no more")


def test_no_remedy_is_named_for_skipped_steps() -> None:
    assert too_few(3, 400, 5) == "3 measurements instead of about 20: it may be far off"


def test_a_measurement_that_is_not_finite_is_ignored_and_a_negative_one_gives_no_noise_scale() -> None:
    averages = NoiseScale()
    averages.add(Estimate(40.0, 2.0), 0)
    before = averages.summary(1)
    assert not averages.add(Estimate(math.inf, 2.0), 1)
    assert not averages.add(Estimate(40.0, math.nan), 1)
    assert averages.summary(1) == before
    for unclear in (Estimate(40.0, -1.0), Estimate(-1.0, 2.0)):
        averages = NoiseScale()
        averages.add(unclear, 0)
        assert averages.values()["noise_scale"] is None


def found(scale: float | None, **others: Any) -> dict[str, Any]:
    measured = {"measurements": 80, "last_step": 79, "lowest": 93.2, "highest": 1600.0, "every_steps": 1}
    return {"noise_scale": scale, "gradient_variance": 1.0, "gradient_norm_squared": 1.0} | measured | others


def test_the_summary_in_words() -> None:
    # (1 + 2000 / 4000) / (1 + 2000 / 8000) = 1.2 of the steps, half as many images each.
    assert in_words(found(2000.4), 8000, 1_281_167, 14_040)[:2] == [
        "about 2,000 images at the end: the gradient of such a batch is half signal, half noise",
        "your batch of 8,000 is well above it: one of 4,000 would reach the same loss with about 120 % of the steps "
        "and 60 % of the images",
    ]
    # (1 + 1536 / 1024) / (1 + 1536 / 512) = 0.625
    assert in_words(found(1536.0), 512, 1442, 80) == [
        "about 1,500 images at the end: the gradient of such a batch is half signal, half noise",
        "more than the 1,442 training images: by this measure no batch is too large",
        "your batch of 512 is well below it: one of 1,024 would reach the same loss with about 62 % of the steps "
        "and 125 % of the images",
        "80 measurements, the last at step 79; 93 to 1,600 images from the 20th on",
    ]
    assert "of 720 is well below it: one of 360" in in_words(found(1536.0), 720, 1439, 80)[2]  # 1,440 would not fit
    assert "of 512 is near it: one of 256" in in_words(found(500.0), 512, 1442, 80)[1]
    assert "of 1 is near it: one of 2" in in_words(found(0.6), 1, 1442, 80)[1]
    single = {"measurements": 1, "last_step": 0, "lowest": None, "highest": None, "every_steps": 100}
    last, few = in_words(found(1536.0, **single), 512, 9999, 80)[2:]
    assert last == "1 measurement, the last at step 0"
    assert few == too_few(1, 80, 100)
    assert "lost in its noise" in in_words(found(None, gradient_norm_squared=-1.0), 64, 1442, 80)[0]
    assert "too alike" in in_words(found(None, gradient_variance=-1.0), 64, 1442, 80)[0]


def _norms_of_a_step(rank: int, world_size: int, cases: list[tuple[int, dict[str, Any], float]]) -> list[list[float]]:
    """The mean over the ranks of the micro-batches' squared gradient norms, and that of the mean gradient."""
    import torch.distributed as dist

    found = []
    for accumulation, sections, _ in cases:
        engine = new_engine(world_size, 16, accumulation, **sections)
        norms = GradientNorms(engine.module.parameters(), due=lambda: engine.global_steps == 1)  # noqa: B023
        assert train_step(engine, rank, world_size, 0, 16, norms).gradient_norms is None
        taken = train_step(engine, rank, world_size, 1, 16, norms).gradient_norms
        assert taken is not None
        ranks = [torch.empty_like(taken) for _ in range(world_size)]
        dist.all_gather(ranks, taken)
        found.append(torch.stack(ranks).mean(0).tolist())
    return found


def norms_by_plain_pytorch() -> list[float]:
    """The same for micro-batches of 4 in step 1, with one backward pass each, after plain PyTorch's step 0."""
    model = small_model()
    for parameter, value in zip(model.parameters(), plain_training([16])[1].values(), strict=True):
        parameter.data.copy_(value)
    images, labels = samples(1, 16)
    gradients = []
    for part in range(0, 16, 4):
        loss = F.cross_entropy(model(images[part : part + 4]), labels[part : part + 4])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    stacked = torch.stack(gradients).double()
    return [float(stacked.square().sum(1).mean()), float(stacked.mean(0).square().sum())]


BLOCKING = {"zero_optimization": {"overlap_comm": False}}
FP16, BF16 = ({precision: {"enabled": True}} for precision in ("fp16", "bf16"))
# Accumulation, sections and relative error: in half precision a norm has the error of a few roundings, of 2^-11 or 2^-8
# each, and its square twice that.
CASES: dict[int, list[tuple[int, dict[str, Any], float]]] = {
    1: [(4, {}, 1e-5), (4, FP16, 8 * 2**-11), (4, BF16, 8 * 2**-8)],
    2: [(2, {}, 1e-5), (2, BLOCKING, 1e-5), (2, FP16, 8 * 2**-11), (2, BF16, 8 * 2**-8)],
    4: [(1, {}, 1e-5), (1, BLOCKING, 1e-5), (1, FP16 | BLOCKING, 8 * 2**-11), (1, BF16, 8 * 2**-8)],
}


@pytest.mark.parametrize("world_size", CASES)
def test_norms_are_the_same_on_any_number_of_ranks_and_in_any_precision(world_size: int) -> None:
    expected = norms_by_plain_pytorch()
    for results in run_ranks(world_size, _norms_of_a_step, CASES[world_size]):
        for found, (_, _, tolerance) in zip(results, CASES[world_size], strict=True):
            assert found == pytest.approx(expected, rel=tolerance)


def _measured_around_an_overflow(rank: int, world_size: int) -> list[bool]:
    engine = new_engine(world_size, 16, 2, fp16={"enabled": True, "hysteresis": 1})
    norms = GradientNorms(engine.module.parameters(), due=lambda: True)
    measured = []
    for factor in (1.0, 1e4, 1.0):
        step = train_step(engine, rank, world_size, 0, 16, norms, factor)
        assert bool(step.skipped) == (factor > 1)
        measured.append(bool(step.gradient_norms.isfinite().all()))
    return measured


def test_norms_are_finite_again_after_a_skipped_step() -> None:
    (measured,) = run_ranks(1, _measured_around_an_overflow)
    assert measured == [True, False, True]


def _training_changed_by_measuring(rank: int, world_size: int) -> list[bool]:
    changed = []
    for sections in ({}, BLOCKING, BF16):
        weights = []
        for measures in (True, False):
            engine = new_engine(world_size, 16, 2, **sections)
            norms = GradientNorms(engine.module.parameters(), due=lambda: True) if measures else None
            for step in range(4):
                train_step(engine, rank, world_size, step, 16, norms)
            weights.append(weights_of(engine.module))
        changed.append(any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]))
    return changed


def test_measuring_does_not_change_the_training() -> None:
    for changed in run_ranks(2, _training_changed_by_measuring):
        assert changed == [False, False, False]


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))


def test_a_weight_without_a_gradient_is_ignored() -> None:
    model = Halves()
    norms = GradientNorms(model.parameters(), due=lambda: True)
    (model.used * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    taken = norms.take(scale=2.0)
    assert taken is not None
    assert taken.tolist() == pytest.approx([14 / 4, 14 / 4], rel=1e-6)


@pytest.mark.slow
def test_a_run_reports_its_noise_scale_and_continues_the_averages_when_resumed(tmp_path: Path) -> None:
    arguments = (
        *("--deepspeed_config", DIGITS, *SHORT, "--output", str(tmp_path), "--set=recipe.batchnorm.statistics=local"),
        *("--set=recipe.noise_scale.enabled=true", "--set=recipe.noise_scale.every_steps=2"),
        *("--set=recipe.checkpoint.every_steps=1", "--set=recipe.checkpoint.keep_last=6"),
    )
    done = train_ok(*arguments, ranks=2)
    lines = events(tmp_path, "noise_scale")
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (2, 1), (4, 2)]
    names = {"gradient_variance", "gradient_norm_squared", "noise_scale"}
    assert [set(line) for line in lines] == [{"event", "step", "epoch"} | names] * 3
    summary = json.loads((tmp_path / "summary.json").read_text())
    told = {"measurements": 3, "last_step": 4, "every_steps": 2, "lowest": None, "highest": None}
    assert summary["noise_scale"] == {name: lines[-1][name] for name in names} | told
    shown = " ".join(done.stdout.split())
    assert f" noise scale {' '.join(in_words(summary['noise_scale'], 512, 1442, 6))} " in shown
    assert "noise scale: 3 measurements instead of about 20" in shown

    # As if it had been killed before it saved step 4, after writing the lines of later steps.
    for step in (4, 5, 6):
        (tmp_path / f"checkpoints/step-{step:08}/manifest.json").unlink()
    (tmp_path / "summary.json").unlink()
    assert "step-00000003, 3 steps done" in train_ok(*arguments, ranks=2).stdout
    assert events(tmp_path, "noise_scale") == lines
