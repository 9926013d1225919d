"""A failure on one rank shows its cause and the stack of the other ranks."""

import time

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tests.ranks import run_ranks


def _second_rank_raises(rank: int, world_size: int, first_rank_is_busy: bool) -> None:
    dist.barrier()
    if rank == 1:
        raise ValueError("the cause")
    if first_rank_is_busy:
        time.sleep(60)
    dist.barrier()


@pytest.mark.parametrize("first_rank_is_busy", [False, True])
def test_a_failure_shows_its_cause_and_every_stack(first_rank_is_busy: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessRaisedException):
        run_ranks(2, _second_rank_raises, first_rank_is_busy)
    error = capfd.readouterr().err
    assert "rank 1 of 2 raised" in error
    assert "ValueError: the cause" in error
    # Rank 0 was ended by torch, or raised because rank 1 closed the connection.
    assert error.count("in _second_rank_raises") >= 2, error
