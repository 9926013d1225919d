"""What a failure on one rank leaves to read."""

import time

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import run_ranks


def _second_rank_raises(rank: int, world_size: int) -> None:
    dist.barrier()
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def _second_rank_raises_while_the_first_is_busy(rank: int, world_size: int) -> None:
    dist.barrier()
    if rank == 1:
        raise ValueError("the cause")
    time.sleep(60)


@pytest.mark.parametrize("function", [_second_rank_raises, _second_rank_raises_while_the_first_is_busy])
def test_a_failure_shows_the_cause_and_where_each_rank_stood(function, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessRaisedException):
        run_ranks(2, function)
    error = capfd.readouterr().err
    assert "rank 1 of 2 raised" in error
    assert "ValueError: the cause" in error
    # Rank 0 was ended by torch, or raised because rank 1 closed the connection.
    assert error.count(f"in {function.__name__}") >= 2, error
