"""The formulas of communication, against numbers worked out by hand."""

import pytest

from recipe.plan import Link, all_reduce_bytes, all_reduce_seconds, efficiency, exposed_seconds


@pytest.mark.parametrize(("ranks", "sent"), [(1, 0), (2, 100), (4, 150), (8, 175), (1000, 199.8)])
def test_bytes_of_an_all_reduce(ranks: int, sent: float) -> None:
    assert all_reduce_bytes(100, ranks) == pytest.approx(sent)


@pytest.mark.parametrize(
    ("ranks", "algorithm", "seconds"),
    [
        (1, "ring", 0),
        (1, "tree", 0),
        (2, "ring", 1 + 2 * 0.01),
        (8, "ring", 1.75 + 14 * 0.01),
        (8, "tree", 1.75 + 6 * 0.01),
        (9, "tree", 16 / 9 + 8 * 0.01),  # four levels
    ],
)
def test_seconds_of_an_all_reduce(ranks: int, algorithm: str, seconds: float) -> None:
    assert all_reduce_seconds(100, ranks, Link(100, 0.01), algorithm) == pytest.approx(seconds)


def test_the_papers_bandwidth() -> None:
    """§4: ResNet-50's gradients, 100 MB, twice over the wire within a backward pass of 120 ms: about 15 Gbit/s."""
    gigabits = all_reduce_bytes(100e6, 256) * 8 / 0.12 / 1e9
    assert 13 < gigabits < 15


def test_what_a_step_waits_for() -> None:
    assert exposed_seconds(3, backward=2, overlaps=False) == 3
    assert exposed_seconds(3, backward=2, overlaps=True) == 1
    assert exposed_seconds(3, backward=5, overlaps=True) == 0
    assert efficiency(9, 1) == 0.9
