"""Ranks that would not train the same thing find out before training."""

import os
import socket
import time
from datetime import timedelta

import pytest

from recipe.distributed.code_state import code_sha256
from recipe.distributed.rendezvous import DisagreementError, Facts, MeetingError, meet, name_ranks, objection_of
from tests.ranks import run_ranks

FACTS = {
    "host": "node-0",
    "config": "1",
    "code": "2",
    "versions": "torch 2.15.0",
    "device": "cpu",
    "checkpoint": "none",
    "data": "6 + 6 images",
}

REMEDY = (
    "in time; python -m recipe hosts HOSTFILE finds out why; if hosts start slowly, raise "
    "recipe.distributed.timeout_seconds"
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _meet(rank: int, world_size: int, port: int, brought: dict[int, Facts]) -> tuple[str, ...] | str:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        meeting = meet(brought[rank], timedelta(seconds=30))
    except DisagreementError as error:
        return str(error)
    return meeting.hosts


def test_ranks_that_agree_learn_each_others_hosts() -> None:
    brought = {rank: FACTS | {"host": f"node-{rank // 2}"} for rank in range(4)}
    assert run_ranks(4, _meet, free_port(), brought) == [("node-0", "node-0", "node-1", "node-1")] * 4


def test_all_ranks_get_the_refusal_of_one() -> None:
    brought = {0: FACTS, 1: FACTS | {"host": "node-1", "device": "", "refusal": "no data"}}
    assert run_ranks(2, _meet, free_port(), brought) == ["rank 1 on node-1: no data"] * 2


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        (
            {"config": "x"},
            "rank 1 on node-1 and rank 0 on node-0 read different configs; copy one file to all hosts",
        ),
        (
            {"config": "x", "data": "6 + 4 images"},  # with "auto", the counts are part of the config
            "see different data: 6 + 4 images and 6 + 6 images; give all hosts the same data and config",
        ),
        (
            {"code": "x"},
            "rank 1 on node-1 and rank 0 on node-0 run different code in recipe/; bring the checkouts",
        ),
        ({"versions": "torch 2.11.0"}, "have different versions: torch 2.11.0 and torch 2.15.0; install the same"),
        ({"device": "cuda"}, "would train on cuda and cpu; check GPUs and drivers"),
        (
            {"checkpoint": "step-00000004"},
            "see different checkpoints in the output folder: step-00000004 and none; share one --output",
        ),
        ({"refusal": "no room"}, "rank 1 on node-1: no room"),
        ({"host": "node-2"}, None),
    ],
)
def test_facts_that_must_be_equal(change: dict[str, str], objection: str | None) -> None:
    found = objection_of([FACTS, FACTS | {"host": "node-1"} | change])
    assert found is None if objection is None else objection in str(found)


def test_rank_0s_refusal_comes_first_and_unchanged() -> None:
    assert objection_of([FACTS | {"refusal": "a lock"}, FACTS | {"refusal": "no room"}]) == "a lock"


def _one_stays_away(rank: int, world_size: int, port: int) -> str | None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 1:
        return None
    with pytest.raises(MeetingError) as caught:
        meet(FACTS, timedelta(seconds=4))
    return str(caught.value)


def _again(rank: int, world_size: int, port: int) -> list[tuple[str, ...]]:
    """Meet twice at one store, as torchrun's agent keeps it; the second time with other hosts and a late rank 0."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    agent = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.barrier()
    first = meet(FACTS | {"host": "node-0"}, timedelta(seconds=30))
    dist.barrier()
    if rank == 0:
        time.sleep(1)
    second = meet(FACTS | {"host": f"node-{rank}"}, timedelta(seconds=30))
    dist.barrier()
    del agent
    return [first.hosts, second.hosts]


def test_second_rendezvous_at_the_same_store() -> None:
    assert run_ranks(2, _again, free_port()) == [[("node-0", "node-0"), ("node-0", "node-1")]] * 2


def test_missing_ranks_are_named() -> None:
    port = free_port()
    remedy = f"at 127.0.0.1:{port} {REMEDY}"
    told = f"rank 1 of 3 did not arrive {remedy}"
    assert run_ranks(3, _one_stays_away, port) == [told, None, told]


def _a_stranger_comes(rank: int, world_size: int, port: int) -> tuple[str, ...] | str:
    """Rank 2 plays rank 1 of another run that uses the same port."""
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    if rank == 2:
        dist.barrier()
        os.environ["RANK"] = "1"
        with pytest.raises(MeetingError) as caught:
            meet(FACTS, timedelta(seconds=3))
        dist.barrier()
        return str(caught.value)
    meeting = meet(FACTS, timedelta(seconds=30))
    dist.barrier()
    dist.barrier()  # rank 0 holds the store
    return meeting.hosts


def test_rank_of_another_run_gets_no_answer() -> None:
    port = free_port()
    assert run_ranks(3, _a_stranger_comes, port) == [
        ("node-0", "node-0"),
        ("node-0", "node-0"),
        f"rank 0 has not answered at 127.0.0.1:{port} {REMEDY}",
    ]


def test_code_digest_changes_with_the_code(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("code_state.py", "data/loader.py"):
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr("recipe.distributed.code_state.__file__", str(tmp_path / "distributed" / "code_state.py"))
    before = code_sha256()
    (tmp_path / "notes.txt").write_text("no code")
    assert code_sha256() == before
    (tmp_path / "data/loader.py").write_text("a = 2\n")
    assert code_sha256() != before


@pytest.mark.parametrize(
    ("ranks", "hosts", "named"),
    [
        ([3], None, "rank 3"),
        ([3], ["a", "a", "b", "b"], "rank 3 on b"),
        ([1, 2], ["a", "a", "b", "b"], "ranks 1, 2 on a, b"),
        (list(range(9)), ["a"] * 9, "ranks 0, 1, 2, 3, 4, 5, 6, 7 … on a"),
    ],
)
def test_ranks_in_words(ranks: list[int], hosts: list[str] | None, named: str) -> None:
    assert name_ranks(ranks, hosts) == named
