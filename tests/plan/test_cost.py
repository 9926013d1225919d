"""The communication formulas compared with hand-computed values."""

import pytest

from recipe.plan import Link, all_reduce_bytes, all_reduce_seconds


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
def test_all_reduce_seconds(ranks: int, algorithm: str, seconds: float) -> None:
    assert all_reduce_seconds(100, ranks, Link(100, 0.01), algorithm) == pytest.approx(seconds)


def test_bandwidth_that_the_paper_needs() -> None:
    """§4: 100 MB of ResNet-50 gradients, sent twice within a backward pass of 120 ms, need about 15 Gbit/s."""
    gigabits = all_reduce_bytes(100e6, 256) * 8 / 0.12 / 1e9
    assert 13 < gigabits < 15
