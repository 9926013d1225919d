"""Finding, verifying and pruning checkpoints; saving and loading stands in test_recovery.py, with real runs."""

import hashlib
import json
from pathlib import Path

import pytest

from recipe.checkpoints.manifest import MANIFEST, best, damage, find, prune, publish, set_aside, unreadable


def make(folder: Path, step: int, top1: float | None = None) -> Path:
    """A checkpoint of one file, ``weights``, whose five bytes are "whole"."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_text("whole")
    sha256 = hashlib.sha256(b"whole").hexdigest()
    head = {"step": step, "top1": top1, "training_sha256": "same", "world_size": 2}
    (path / MANIFEST).write_text(json.dumps(head | {"files": {"weights": {"bytes": 5, "sha256": sha256}}}))
    return path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find(folder)]


def test_find_lists_what_has_a_manifest_the_newest_first(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        make(tmp_path, step)
    (tmp_path / "step-00000199").mkdir()  # no manifest: it was never completed
    head = {"top1": None, "training_sha256": "", "world_size": 1, "files": {"weights": {"bytes": 5, "sha256": ""}}}
    for number, manifest in enumerate(
        [
            '{"step": 90, "fi',
            json.dumps(head | {"step": "91"}),
            json.dumps(head | {"step": 92, "files": []}),
            json.dumps(head | {"step": 93, "files": {}}),
            json.dumps(head | {"step": 94, "top1": "good"}),
            json.dumps(head | {"step": 94}),
            json.dumps(head | {"step": 96, "files": {"weights": {}}}),
            "[]",
            json.dumps(head | {"step": 98, "world_size": None}),
            # As breakers wrote them: what Python's format, int and sort do not take.
            json.dumps(head | {"step": None}),
            json.dumps(head | {"step": "00000100"}),
            json.dumps(head | {"step": 101, "world_size": float("inf")}),
            json.dumps(head | {"step": 102, "top1": float("nan")}),
            json.dumps(head | {"step": True}),
            "[" * 100_000,
        ],
        start=90,
    ):
        (make(tmp_path, number) / MANIFEST).write_text(manifest)
    assert [path.name for path in unreadable(tmp_path)] == [f"step-{number:08}" for number in range(90, 105)]
    (tmp_path / ".unfinished" / "step-00000097").mkdir(parents=True)
    assert steps(tmp_path) == [10, 4, 2]
    assert find(tmp_path / "nowhere") == []


def test_a_replaced_checkpoint_stands_in_until_the_new_one_has_its_name(tmp_path: Path) -> None:
    """A kill between the two renames leaves the old one under its other name; after them there is one."""
    old = make(tmp_path, 4, 50.0)
    old.rename(tmp_path / "step-00000004.replaced")
    assert [(c.path.name, c.top1) for c in find(tmp_path)] == [("step-00000004.replaced", 50.0)]
    make(tmp_path, 2)
    whole = make(tmp_path / "elsewhere", 4, 60.0)
    publish(whole, tmp_path / "step-00000004")
    assert [(c.path.name, c.top1) for c in find(tmp_path)] == [("step-00000004", 60.0), ("step-00000002", None)]
    again = make(tmp_path / "elsewhere", 4, 70.0)
    publish(again, tmp_path / "step-00000004")
    assert [c.top1 for c in find(tmp_path)] == [70.0, None]
    assert not list(tmp_path.glob("*.replaced"))


def test_what_is_no_checkpoint_gives_way_to_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000002").write_text("")
    (tmp_path / "kept").mkdir()
    (tmp_path / "step-00000003").symlink_to(tmp_path / "kept")
    for step in (1, 2, 3):
        publish(make(tmp_path / "elsewhere", step), tmp_path / f"step-{step:08}")
    assert steps(tmp_path) == [3, 2, 1]
    assert (tmp_path / "kept").is_dir()
    assert not list(tmp_path.glob("*.replaced"))


def test_a_whole_checkpoint_has_no_damage(tmp_path: Path) -> None:
    make(tmp_path, 1)
    assert damage(find(tmp_path)[0]) is None


@pytest.mark.parametrize(
    ("content", "message"), [("who", "has 3 bytes"), ("whale", "SHA-256 differs"), (None, "is missing")]
)
def test_damage_names_the_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = make(tmp_path, 1)
    (path / "weights").unlink()
    if content is not None:
        (path / "weights").write_text(content)
    problem = damage(find(tmp_path)[0])
    assert problem is not None
    assert str(path / "weights") in problem
    assert message in problem


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left"),
    [(1, False, [5]), (1, True, [5, 3]), (2, True, [5, 4, 3]), (3, False, [5, 4, 3]), (9, False, [5, 4, 3, 2, 1])],
)
def test_prune_keeps_the_last_and_the_best(tmp_path: Path, keep_last: int, keep_best: bool, left: list[int]) -> None:
    for step, top1 in ((1, 50.0), (2, 90.0), (3, 90.0), (4, None), (5, 80.0)):
        make(tmp_path, step, top1)
    prune(tmp_path, keep_last, keep_best)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_what_is_set_aside_is_neither_found_nor_kept(tmp_path: Path) -> None:
    """A damaged checkpoint of a later step must not push out the one that a run has just written."""
    make(tmp_path, 28)
    damaged = find(tmp_path)[0]
    set_aside(damaged)
    make(tmp_path, 11)
    prune(tmp_path, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [11]
    assert (tmp_path / "step-00000028.aside/weights").exists()
    assert unreadable(tmp_path) == []
    make(tmp_path, 28)
    set_aside(find(tmp_path)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000011", "step-00000028.aside"]


def test_what_cannot_be_read_or_removed_does_not_end_a_run(tmp_path: Path) -> None:
    path = make(tmp_path / "elsewhere", 3)
    (tmp_path / "step-00000003").symlink_to(path)
    (path / "weights").unlink()
    (path / "weights").mkdir()
    problem = damage(find(tmp_path)[0])
    assert problem is not None
    assert "weights" in problem
    make(tmp_path, 4)
    prune(tmp_path, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [4]
    assert path.exists()


def test_best_is_the_latest_of_equals(tmp_path: Path) -> None:
    for step, top1 in ((1, None), (2, 70.0), (3, 70.0)):
        make(tmp_path, step, top1)
    found = best(find(tmp_path))
    assert found is not None
    assert found.step == 3
    assert best([]) is None
