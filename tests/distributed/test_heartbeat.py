"""If one rank fails, all end soon, and the first failure is reported once."""

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recipe.distributed import heartbeat
from recipe.distributed.heartbeat import FAILED, Watch, is_cause
from recipe.distributed.rendezvous import meet
from recipe.engine.start import join_process_group
from tests.distributed.test_rendezvous import free_port
from tests.launch import environment, wait_until
from tests.ranks import fork

STEP = 3


def _raise(error: Exception) -> None:
    raise error


def _images() -> Any:
    yield 1
    time.sleep(100)


# What some of the ranks do, while the others are in a collective or busy.
FATES: dict[str, Callable[[Watch], Any]] = {
    "raises a known error": lambda watch: _raise(ValueError("no such image")),
    "raises an unknown error": lambda watch: _raise(KeyError("x")),
    "is killed": lambda watch: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda watch: os.kill(os.getpid(), signal.SIGSTOP),
    "gets no data": lambda watch: list(watch.awaited(_images())),
    "is busy": lambda watch: time.sleep(100),
}


def _rank(folder: Path, fate: str, others: str, who: tuple[int, ...], timeout_seconds: int) -> None:
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=timeout_seconds)
    if fate == "raises a known error":
        heartbeat.GRACE_SECONDS = 30.0  # all ranks are alive, but may answer slowly on a busy machine
    meeting = meet({"host": os.environ.get("HOST", f"host-{rank}")}, timedelta(seconds=60))
    join_process_group(torch.device("cpu"), timeout, meeting.group_store)
    dist.barrier()
    with Watch(meeting, timeout, {}, (ValueError,)) as watch:
        watch.step = STEP
        (folder / f"ready-{rank}").touch()
        wait_until((folder / "go").exists)
        if rank in who:
            FATES[fate](watch)
        if others:
            FATES[others](watch)
        dist.all_reduce(torch.ones(1))


class Ranks:
    """Processes that have met as ranks and wait for ``go``."""

    def __init__(
        self,
        folder: Path,
        fate: str,
        *who: int,
        others: str = "",
        ranks: int = 2,
        timeout_seconds: int = 60,
        **variables: str,
    ) -> None:
        self.folder = folder
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        of_all = environment(WORLD_SIZE=str(ranks), LOCAL_RANK="0", DS_ACCELERATOR="cpu") | address | variables
        arguments = (folder, fate, others, who, timeout_seconds)
        self.processes: list[BaseProcess] = [
            fork(folder / str(rank), of_all | {"RANK": str(rank)}, _rank, *arguments) for rank in range(ranks)
        ]
        wait_until(lambda: len(list(folder.glob("ready-*"))) == ranks)

    def go(self) -> None:
        (self.folder / "go").touch()

    def said(self) -> list[str]:
        return [(self.folder / f"{rank}.stderr").read_text() for rank in range(len(self.processes))]

    def ends(self, *of: int) -> list[tuple[int | None, str]]:
        """Exit codes and stderr of all ranks, once those in ``of`` (default: all) have ended."""
        try:
            for rank in of or range(len(self.processes)):
                self.processes[rank].join(60)
            codes = [process.exitcode for process in self.processes]
            return list(zip(codes, self.said(), strict=True))
        finally:
            for process in self.processes:
                process.kill()
                process.join()


@pytest.mark.parametrize("who", [0, 1])
def test_failure_is_reported_by_its_rank_only(tmp_path: Path, who: int) -> None:
    ranks = Ranks(tmp_path, "raises a known error", who, others="is busy", ranks=3)
    ranks.go()
    told = f"recipe: rank {who} on host-{who} failed at step 3: ValueError: no such image\n"
    assert ranks.ends() == [(FAILED, told if rank == who else "") for rank in range(3)]


def test_only_one_of_two_failing_ranks_reports(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "raises a known error", 0, 1)
    ranks.go()
    ends = ranks.ends()
    assert [code for code, _ in ends] == [FAILED, FAILED]
    assert re.fullmatch(r"recipe: rank [01] on host-[01] failed at step 3: .*\n", "".join(said for _, said in ends))


def test_rank_that_knows_the_cause_waits_for_the_store(tmp_path: Path) -> None:
    """Here for 9 s: rank 0, which is not in a collective, would not learn of it otherwise."""
    ranks = Ranks(tmp_path, "raises a known error", 1, others="is busy")
    store = ranks.processes[0].pid
    assert store is not None
    os.kill(store, signal.SIGSTOP)
    ranks.go()
    time.sleep(9)
    os.kill(store, signal.SIGCONT)
    told = "recipe: rank 1 on host-1 failed at step 3: ValueError: no such image\n"
    assert ranks.ends() == [(FAILED, ""), (FAILED, told)]


def test_a_slow_rank_is_told_from_a_dead_one(tmp_path: Path) -> None:
    """A timeout where all ranks answer: the report names the key that sets it, and says that nobody is gone."""
    ranks = Ranks(tmp_path, "is busy", 1, timeout_seconds=4)
    ranks.go()
    ends = ranks.ends()
    assert [code for code, _ in ends] == [FAILED, FAILED]
    told = (
        r"recipe: rank 0 on host-0 failed at step 3: .*[Tt]imed out waiting.* 4000ms.*; all ranks are alive, so one "
        r"was slow, .* wait 4 s for each other \(recipe\.distributed\.timeout_seconds\)\n"
    )
    assert re.fullmatch(told, "".join(said for _, said in ends))


def test_unknown_error_is_shown_with_its_traceback(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "raises an unknown error", 1)
    ranks.go()
    (_, first), (code, second) = ranks.ends()
    assert (code, first) == (FAILED, "")
    assert second.startswith("Traceback")
    assert second.endswith("recipe: rank 1 on host-1 failed at step 3: KeyError: 'x'\n")


def test_killed_rank_is_named_by_another(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "is killed", 1)
    ranks.go()
    (code, said), killed = ranks.ends()
    assert (code, killed) == (FAILED, (-signal.SIGKILL, ""))
    assert said.startswith(
        "recipe: rank 1 on host-1 exited without reporting an error at step 3: killed (out of memory?), or the host is "
        "gone or cut off; rank 0 saw "
    )
    assert said.count("\n") == 1


def test_killed_rank_0_is_named_once_per_host(tmp_path: Path) -> None:
    """With it goes the store."""
    ranks = Ranks(tmp_path, "is killed", 0, ranks=3, HOST="one")
    ranks.go()
    *_, (code, said), (other_code, silent) = ranks.ends()
    assert code == other_code == FAILED
    assert said.startswith("recipe: rank 0 on one exited without reporting an error at step 3: ")
    assert silent == ""


def test_all_ranks_end_if_torchruns_store_goes_away(tmp_path: Path) -> None:
    """This includes rank 0, which does not hold the store in this case, even if it is alone on its host."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_agent = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # On a busy machine the store may go away before a rank connects to it; torch then tries for over twice the timeout,
    # and ``ends`` waits for a minute.
    ranks = Ranks(tmp_path, "is busy", 0, 1, timeout_seconds=15, **of_agent)
    ranks.go()
    del agent
    assert [code for code, _ in ranks.ends()] == [FAILED, FAILED]


def test_hanging_rank_is_named_after_the_timeout(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "hangs", 1, timeout_seconds=8)
    ranks.go()
    (code, said), _ = ranks.ends(0)
    assert code == FAILED
    assert said.startswith("recipe: rank 1 on host-1 exited without reporting an error at step 3: ")
    assert "Timed out waiting 8000ms" in said


def test_hanging_data_loader_ends_its_rank_before_the_others_time_out(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "gets no data", 1, timeout_seconds=8)
    ranks.go()
    found, (code, told) = ranks.ends()
    assert (found, code) == ((FAILED, ""), FAILED)
    assert re.fullmatch(
        r"recipe: rank 1 on host-1 failed at step 3: TimeoutError: no images from the data loader for [67] s\n", told
    )


def test_lost_ranks_are_not_a_cause() -> None:
    with pytest.raises(ValueError, match="Default process group") as caught:
        dist.all_reduce(torch.ones(1))
    assert not is_cause(caught.value)
    with pytest.raises(RuntimeError) as caught_here:
        raise RuntimeError("Connection closed by peer")
    assert is_cause(caught_here.value)
    assert not is_cause(dist.DistError("store"))
