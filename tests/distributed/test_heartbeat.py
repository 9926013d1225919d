"""One rank fails, and all end soon; the last that is said is what failed first."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from torch.distributed import TCPStore

from recipe.distributed.heartbeat import FAILED, GRACE_SECONDS, LOOK_EVERY_SECONDS, is_cause
from tests.distributed.test_rendezvous import free_port
from tests.launch import ROOT, environment

PROGRAM = """
import os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from recipe.engine.start import join_process_group
from recipe.distributed.launcher import open_process
from recipe.distributed.rendezvous import Facts, meet
from recipe.distributed import heartbeat
from recipe.distributed.heartbeat import Watch

rank, what, who = int(os.environ["RANK"]), sys.argv[1], int(sys.argv[2])
timeout = timedelta(seconds=60 if what in ("known", "late") else 8)
if what == "known":
    heartbeat.GRACE_SECONDS = 30.0  # nobody is gone here: on a busy machine ranks may be slow to answer
meeting = meet(Facts(os.environ.get("HOST", f"host-{rank}"), "", "", "", "", "none"), timedelta(seconds=60))
join_process_group(torch.device("cpu"), timeout, meeting.group_store)
dist.barrier()

def images():
    yield 1
    time.sleep(100)

with Watch(meeting, timeout, {os.getppid(): open_process(os.getppid())}, (ValueError,)) as watch:
    watch.step = 3
    print("ready", flush=True)
    if what == "late" and rank == who:
        sys.stdin.readline()
    time.sleep(2)
    if what == "close":
        watch.close()
        dist.barrier()
        sys.exit(0)
    if rank == who:
        if what in ("known", "late"):
            raise ValueError("no such image")
        if what == "unknown":
            raise KeyError("x")
        if what == "killed":
            os.kill(os.getpid(), 9)
        if what == "stopped":
            os.kill(os.getpid(), 19)
        if what == "data":
            list(watch.awaited(images()))
    if what in ("known", "late", "parent"):
        time.sleep(100)  # busy with something else than talking
    dist.all_reduce(torch.ones(1))
"""

WAIT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def start(what: str, who: int, ranks: int = 2, **variables: str) -> list[subprocess.Popen[str]]:
    port = variables.get("MASTER_PORT") or str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, what, str(who)],
            cwd=ROOT,
            env=environment()
            | {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCH_CPP_LOG_LEVEL": "ERROR"}
            | {"DS_ACCELERATOR": "cpu"}
            | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # "ready": on a busy machine, the imports before it take longer than what follows
    return processes


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and what was said, of ranks that end by themselves."""
    try:
        return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=60)]]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_failure_is_told_by_its_rank_and_last_by_rank_0() -> None:
    told = "recipe: rank 1 on host-1 failed at step 3: ValueError: no such image\n"
    assert ends(start("known", 1, ranks=3)) == [(FAILED, told), (FAILED, told), (FAILED, "")]


def test_rank_0_tells_its_own_failure_once() -> None:
    told = "recipe: rank 0 on host-0 failed at step 3: ValueError: no such image\n"
    assert ends(start("known", 0)) == [(FAILED, told), (FAILED, "")]


def test_a_rank_that_knows_the_cause_waits_for_a_store_that_does_not_answer() -> None:
    """Longer than the grace: its host may be busy. Rank 0, which is in no collective, would never hear of it."""
    told = "recipe: rank 1 on host-1 failed at step 3: ValueError: no such image\n"
    ranks = start("late", 1)
    ranks[0].send_signal(signal.SIGSTOP)
    assert ranks[1].stdin is not None
    print("fail now", file=ranks[1].stdin, flush=True)
    time.sleep(2 + 2 * GRACE_SECONDS + LOOK_EVERY_SECONDS + 2)
    ranks[0].send_signal(signal.SIGCONT)
    assert ends(ranks) == [(FAILED, told), (FAILED, told)]


def test_what_is_not_known_comes_with_its_traceback() -> None:
    (_, first), (code, second) = ends(start("unknown", 1))
    assert first == "recipe: rank 1 on host-1 failed at step 3: KeyError: 'x'\n"
    assert code == FAILED
    assert second.startswith("Traceback")
    assert second.endswith(first)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_others(who: int) -> None:
    found = ends(start("killed", who))
    assert found[who] == (-signal.SIGKILL, "")
    code, said = found[1 - who]
    assert code == FAILED
    assert said.startswith(
        f"recipe: rank {who} on host-{who} ended without a word at step 3: killed (out of memory?), or the host is "
        f"gone or cut off; rank {1 - who} saw "
    )
    assert said.count("\n") == 1


def test_rank_0_is_named_by_one_of_those_that_are_left_on_its_host() -> None:
    *_, (code, said), (other_code, silent) = ends(start("killed", 0, ranks=3, HOST="one"))
    assert code == other_code == FAILED
    assert said.startswith("recipe: rank 0 on one ended without a word at step 3: ")
    assert silent == ""


def test_a_store_that_goes_away_with_torchruns_agent_ends_all_ranks() -> None:
    """Rank 0 too, which does not hold the store then, even where it is the only rank of its host."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start("parent", 0, MASTER_PORT=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True")
    del agent
    assert [code for code, _ in ends(ranks)] == [FAILED, FAILED]


def test_a_rank_that_hangs_is_named_once_the_timeout_has_passed() -> None:
    waiting, stopped = start("stopped", 1)
    (code, said), _ = [*ends([waiting]), stopped.kill()]
    stopped.communicate()
    assert code == FAILED
    assert said.startswith("recipe: rank 1 on host-1 ended without a word at step 3: ")
    assert "Timed out waiting 8000ms" in said


def test_data_that_does_not_come_ends_the_rank_before_the_others_timeout() -> None:
    (code, said), (other_code, told) = ends(start("data", 1))
    assert code == other_code == FAILED
    assert said == told
    assert re.fullmatch(
        r"recipe: rank 1 on host-1 failed at step 3: TimeoutError: no images have come from the data for [67] s\n", told
    )


def test_a_rank_that_is_done_is_not_missed() -> None:
    assert ends(start("close", 0)) == [(0, ""), (0, "")]


def test_a_rank_ends_with_its_launcher() -> None:
    """Killed, the launcher passes nothing on: its rank gets SIGTERM, which a run takes as a polite end."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", WAIT, sys.executable, "-c", PROGRAM, "parent", "0"],
        cwd=ROOT,
        env=environment(
            RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    _, said = launcher.communicate(timeout=120)  # the rank holds the other ends of the pipes
    assert said.endswith("recipe: rank 0: the launcher is gone\n")


def test_what_others_have_caused_is_no_cause() -> None:
    import torch
    import torch.distributed as dist

    with pytest.raises(ValueError, match="Default process group") as caught:
        dist.all_reduce(torch.ones(1))
    assert not is_cause(caught.value)
    with pytest.raises(RuntimeError) as caught_here:
        raise RuntimeError("Connection closed by peer")
    assert is_cause(caught_here.value)
    assert not is_cause(dist.DistError("store"))
