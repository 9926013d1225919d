"""One rank fails, and all end soon; what failed first is reported once."""

import os
import re
import signal
import subprocess
import sys
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
from recipe.distributed.heartbeat import FAILED, GRACE_SECONDS, LOOK_EVERY_SECONDS, Watch, is_cause
from recipe.distributed.launcher import open_process
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


# What one of the ranks does; the others are in a collective meanwhile, or busy with something else.
FATES: dict[str, Callable[[Watch], Any]] = {
    "raises what is known": lambda watch: _raise(ValueError("no such image")),
    "raises what is not known": lambda watch: _raise(KeyError("x")),
    "is killed": lambda watch: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda watch: os.kill(os.getpid(), signal.SIGSTOP),
    "gets no data": lambda watch: list(watch.awaited(_images())),
    "is busy": lambda watch: time.sleep(100),
    "is done": lambda watch: (watch.close(), dist.barrier(), os._exit(0)),
}


def _rank(folder: Path, fate: str, others: str, who: tuple[int, ...], timeout_seconds: int, launcher: int) -> None:
    rank, timeout = int(os.environ["RANK"]), timedelta(seconds=timeout_seconds)
    if fate == "raises what is known":
        heartbeat.GRACE_SECONDS = 30.0  # nobody is gone here: on a busy machine ranks may be slow to answer
    meeting = meet({"host": os.environ.get("HOST", f"host-{rank}")}, timedelta(seconds=60))
    join_process_group(torch.device("cpu"), timeout, meeting.group_store)
    dist.barrier()
    process = open_process(launcher)
    assert process is not None
    with Watch(meeting, timeout, {launcher: process}, (ValueError,)) as watch:
        watch.step = STEP
        (folder / f"ready-{rank}").touch()
        wait_until((folder / "go").exists)
        if rank in who:
            FATES[fate](watch)
        if others:
            FATES[others](watch)
        dist.all_reduce(torch.ones(1))


class Ranks:
    """Ranks that have met and wait for ``go``, in processes of their own."""

    def __init__(
        self,
        folder: Path,
        fate: str,
        *who: int,
        others: str = "",
        ranks: int = 2,
        timeout_seconds: int = 60,
        launcher: int = os.getpid(),
        **variables: str,
    ) -> None:
        self.folder = folder
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        of_all = environment(WORLD_SIZE=str(ranks), LOCAL_RANK="0", DS_ACCELERATOR="cpu") | address | variables
        arguments = (folder, fate, others, who, timeout_seconds, launcher)
        self.processes: list[BaseProcess] = [
            fork(folder / str(rank), of_all | {"RANK": str(rank)}, _rank, *arguments) for rank in range(ranks)
        ]
        wait_until(lambda: len(list(folder.glob("ready-*"))) == ranks)

    def go(self) -> None:
        (self.folder / "go").touch()

    def said(self) -> list[str]:
        return [(self.folder / f"{rank}.stderr").read_text() for rank in range(len(self.processes))]

    def ends(self, *of: int) -> list[tuple[int | None, str]]:
        """Exit codes and what was said, of all ranks or of some, that end by themselves."""
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
def test_a_failure_is_reported_by_its_rank_alone(tmp_path: Path, who: int) -> None:
    ranks = Ranks(tmp_path, "raises what is known", who, others="is busy", ranks=3)
    ranks.go()
    told = f"recipe: rank {who} on host-{who} failed at step 3: ValueError: no such image\n"
    assert ranks.ends() == [(FAILED, told if rank == who else "") for rank in range(3)]


def test_of_ranks_that_raise_together_one_reports(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "raises what is known", 0, 1)
    ranks.go()
    ends = ranks.ends()
    assert [code for code, _ in ends] == [FAILED, FAILED]
    assert re.fullmatch(r"recipe: rank [01] on host-[01] failed at step 3: .*\n", "".join(said for _, said in ends))


def test_a_rank_that_knows_the_cause_waits_for_a_store_that_does_not_answer(tmp_path: Path) -> None:
    """Longer than the grace: its host may be busy. Rank 0, which is in no collective, would never hear of it."""
    ranks = Ranks(tmp_path, "raises what is known", 1, others="is busy")
    store = ranks.processes[0].pid
    assert store is not None
    os.kill(store, signal.SIGSTOP)
    ranks.go()
    time.sleep(2 * GRACE_SECONDS + LOOK_EVERY_SECONDS + 2)
    os.kill(store, signal.SIGCONT)
    told = "recipe: rank 1 on host-1 failed at step 3: ValueError: no such image\n"
    assert ranks.ends() == [(FAILED, ""), (FAILED, told)]


def test_what_is_not_known_comes_with_its_traceback(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "raises what is not known", 1)
    ranks.go()
    (_, first), (code, second) = ranks.ends()
    assert (code, first) == (FAILED, "")
    assert second.startswith("Traceback")
    assert second.endswith("recipe: rank 1 on host-1 failed at step 3: KeyError: 'x'\n")


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path: Path, who: int) -> None:
    ranks = Ranks(tmp_path, "is killed", who)
    ranks.go()
    found = ranks.ends()
    assert found[who] == (-signal.SIGKILL, "")
    code, said = found[1 - who]
    assert code == FAILED
    assert said.startswith(
        f"recipe: rank {who} on host-{who} ended without a word at step 3: killed (out of memory?), or the host is "
        f"gone or cut off; rank {1 - who} saw "
    )
    assert said.count("\n") == 1


def test_rank_0_is_named_by_one_of_those_that_are_left_on_its_host(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "is killed", 0, ranks=3, HOST="one")
    ranks.go()
    *_, (code, said), (other_code, silent) = ranks.ends()
    assert code == other_code == FAILED
    assert said.startswith("recipe: rank 0 on one ended without a word at step 3: ")
    assert silent == ""


def test_a_store_that_goes_away_with_torchruns_agent_ends_all_ranks(tmp_path: Path) -> None:
    """Rank 0 too, which does not hold the store then, even where it is the only rank of its host."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_agent = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    # On a busy machine the store may be gone before a rank watches it; torch then tries for twice the timeout.
    ranks = Ranks(tmp_path, "is busy", 0, 1, timeout_seconds=30, **of_agent)
    ranks.go()
    del agent
    assert [code for code, _ in ranks.ends()] == [FAILED, FAILED]


def test_a_rank_that_hangs_is_named_once_the_timeout_has_passed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "hangs", 1, timeout_seconds=8)
    ranks.go()
    (code, said), _ = ranks.ends(0)
    assert code == FAILED
    assert said.startswith("recipe: rank 1 on host-1 ended without a word at step 3: ")
    assert "Timed out waiting 8000ms" in said


def test_data_that_does_not_come_ends_the_rank_before_the_others_timeout(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "gets no data", 1, timeout_seconds=8)
    ranks.go()
    found, (code, told) = ranks.ends()
    assert (found, code) == ((FAILED, ""), FAILED)
    assert re.fullmatch(
        r"recipe: rank 1 on host-1 failed at step 3: TimeoutError: no images have come from the data for [67] s\n", told
    )


def test_a_rank_that_is_done_is_not_missed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, "is done", 0, 1)
    ranks.go()
    assert ranks.ends() == [(0, ""), (0, "")]


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    """Killed, the launcher passes nothing on: its rank gets SIGTERM, which a run takes as a polite end."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as launcher:
        ranks = Ranks(tmp_path, "is busy", 0, ranks=1, launcher=launcher.pid)
        ranks.go()
        launcher.kill()
    assert ranks.ends() == [(-signal.SIGTERM, "recipe: rank 0: the launcher is gone\n")]


def test_what_others_have_caused_is_no_cause() -> None:
    with pytest.raises(ValueError, match="Default process group") as caught:
        dist.all_reduce(torch.ones(1))
    assert not is_cause(caught.value)
    with pytest.raises(RuntimeError) as caught_here:
        raise RuntimeError("Connection closed by peer")
    assert is_cause(caught_here.value)
    assert not is_cause(dist.DistError("store"))
