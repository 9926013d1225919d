"""The paper's arithmetic compared with hand-computed tables."""

import math

import pytest

from recipe.plan.scaling import RateSchedule, Timeline, scaled_rate


@pytest.mark.parametrize(
    ("batch_size", "linear", "sqrt"),
    [
        (64, 0.025, 0.05),
        (256, 0.1, 0.1),
        (512, 0.2, 0.1414213562373095),
        (1024, 0.4, 0.2),
        (8192, 3.2, 0.565685424949238),
        (65536, 25.6, 1.6),
    ],
)
def test_peak_rate_by_rule(batch_size: int, linear: float, sqrt: float) -> None:
    assert scaled_rate(0.1, 256, batch_size, "linear") == pytest.approx(linear, rel=1e-15)
    assert scaled_rate(0.1, 256, batch_size, "sqrt") == pytest.approx(sqrt, rel=1e-15)
    assert scaled_rate(0.1, 256, batch_size, "none") == 0.1


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "steps"),
    [(5, 156, 780), (0.5, 3, 2), (0.5, 156, 78), (0.1, 156, 16), (0.001, 156, 0), (30, 5004, 150120), (2.5, 1, 3)],
)
def test_epochs_round_to_steps_halves_up(epochs: float, steps_per_epoch: int, steps: int) -> None:
    assert Timeline.of([(0, 1)], steps_per_epoch, 1).steps(epochs) == steps


def schedule(**changes: object) -> RateSchedule:
    """Four warmup steps from 0.1 to 0.5, then ÷10 at steps 6 and 8."""
    fields: dict = {
        "start_rate": 0.1,
        "peak_rate": 0.5,
        "warmup": "gradual",
        "warmup_steps": 4,
        "warmup_type": "linear",
        "milestones": (6, 8),
        "decay_factor": 0.1,
    }
    return RateSchedule(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005]),
        ({"warmup": "constant"}, [0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005]),
        ({"warmup": "none", "warmup_steps": 0}, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005]),
        ({"milestones": ()}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        # A decay within warmup scales the rest of the ramp.
        ({"milestones": (2,)}, [0.1, 0.2, 0.03, 0.04, 0.05, 0.05]),
        # Two decays that round to the same step both count.
        ({"milestones": (5, 5)}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.005]),
        ({"decay_factor": 0.5}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]),
        # ln 1 / ln 4 = 0, ln 2 / ln 4 = 0.5, ln 3 / ln 4 = 0.7924812503605781, ln 4 / ln 4 = 1
        ({"warmup_type": "log"}, [0.1, 0.3, 0.41699250014423124, 0.5, 0.5, 0.5, 0.05]),
        ({"warmup_type": "log", "warmup_steps": 1}, [0.1, 0.5, 0.5]),
    ],
)
def test_rate_at_each_step(changes: dict, rates: list[float]) -> None:
    assert [schedule(**changes).rate(step) for step in range(len(rates))] == pytest.approx(rates, rel=1e-14)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        # From 0.5 at step 4 to 0.1 at step 8; (1 + cos πp) / 2 is 0.8535… after a quarter.
        (
            {"decay": "cosine", "final_rate": 0.1},
            [0.4, 0.5, 0.1 + 0.4 * 0.8535533905932737, 0.3, 0.1 + 0.4 * 0.14644660940672627, 0.1, 0.1],
        ),
        ({"decay": "linear", "final_rate": 0.1}, [0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]),
        # 0.5 · (1, ¾, ½, ¼)²
        ({"decay": "polynomial", "decay_power": 2.0}, [0.4, 0.5, 0.28125, 0.125, 0.03125, 0, 0]),
        ({"decay": "none"}, [0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        # Warmup takes the whole run.
        ({"decay": "cosine", "total_steps": 4}, [0.4, 0.5, 0, 0]),
    ],
)
def test_decay_curve_around_and_after_its_range(changes: dict, rates: list[float]) -> None:
    timeline = Timeline.of([(0, 32)], 32 * changes.pop("total_steps", 8), 1)
    curve = schedule(milestones=(), timeline=timeline, **changes)
    assert [curve.rate(step) for step in range(3, 3 + len(rates))] == pytest.approx(rates, rel=1e-14, abs=1e-17)
    assert [curve.rate(step) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


# 1,000 images in batches of 100 and, from epoch 2 on, of 250: 10, 10, 4 and 4 steps.
GROWING = Timeline.of([(0, 100), (2, 250)], 1000, 4)


def test_timeline_of_a_growing_batch() -> None:
    assert GROWING.total_steps == 28
    places = {0: (0, 0), 9: (0, 9), 10: (1, 0), 19: (1, 9), 20: (2, 0), 23: (2, 3), 24: (3, 0), 28: (4, 0)}
    assert {step: GROWING.place(step) for step in places} == places
    assert {step: GROWING.images(step) for step in (0, 1, 20, 22, 28)} == {0: 0, 1: 100, 20: 2000, 22: 2500, 28: 4000}
    assert {epochs: GROWING.steps(epochs) for epochs in (0.5, 2, 2.5, 4)} == {0.5: 5, 2: 20, 2.5: 22, 4: 28}
    assert [GROWING.epochs_done(step) for step in (5, 20, 22, 28)] == [0.5, 2, 2.5, 4]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        # The batch grows by 2.5.
        ({"milestones": ()}, [0.5, 0.5, 1.25, 1.25, 1.25]),
        ({"milestones": (), "scaling_rule": "sqrt"}, [0.5, 0.5, 0.5 * math.sqrt(2.5)] + 2 * [0.5 * math.sqrt(2.5)]),
        ({"milestones": (), "scaling_rule": "none"}, [0.5] * 5),
        # Smith et al. 2018: if the batch grows by the factor by which the rate would decay, the rate stays.
        ({"milestones": (20,), "decay_factor": 0.4}, [0.5] * 5),
        # Warmup takes 400 of 4,000 images; at step 10, 3,000 of the other 3,600 remain, at step 22 1,500.
        (
            {"decay": "linear"},
            [0.5 * 3000 / 3600, 0.5 * 2100 / 3600, 1.25 * 2000 / 3600, 1.25 * 1500 / 3600, 250 / 2880],
        ),
    ],
)
def test_rate_follows_a_growing_batch(changes: dict, rates: list[float]) -> None:
    growing = schedule(timeline=GROWING, **changes)
    assert [growing.rate(step) for step in (10, 19, 20, 22, 27)] == pytest.approx(rates, rel=1e-14)
