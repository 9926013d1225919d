"""Finding, verifying and pruning checkpoints. Real runs save and load them in test_recovery.py."""

import hashlib
import json
from pathlib import Path

import pytest

from recipe.checkpoints.manifest import MANIFEST, best_path, damage, find, prune, publish, set_aside, unreadable


def make(folder: Path, step: int, top1: float | None = None) -> Path:
    """A checkpoint with one file, ``weights``, whose five bytes are "whole"."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_text("whole")
    sha256 = hashlib.sha256(b"whole").hexdigest()
    head = {"step": step, "top1": top1, "training_sha256": "same", "world_size": 2}
    (path / MANIFEST).write_text(json.dumps(head | {"files": {"weights": {"bytes": 5, "sha256": sha256}}}))
    return path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find(folder)]


def test_find_returns_checkpoints_with_a_valid_manifest_newest_first(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        make(tmp_path, step)
    (tmp_path / "step-00000199").mkdir()  # no manifest: it was never completed
    (tmp_path / ".unfinished" / "step-00000097").mkdir(parents=True)
    head = {"top1": None, "training_sha256": "", "world_size": 1, "files": {"weights": {"bytes": 5, "sha256": ""}}}
    invalid = [
        '{"step": 90, "fi',
        "[]",
        "[" * 100_000,
        json.dumps(head | {"step": "92"}),
        json.dumps(head | {"step": None}),
        json.dumps(head | {"step": True}),
        json.dumps(head | {"step": 1}),
        json.dumps(head | {"step": 97, "files": {}}),
        json.dumps(head | {"step": 98, "files": {"weights": {}}}),
        json.dumps(head | {"step": 99, "top1": float("nan")}),
        json.dumps(head | {"step": 100, "world_size": None}),
    ]
    for number, manifest in enumerate(invalid, start=90):
        (make(tmp_path, number) / MANIFEST).write_text(manifest)
    assert [path.name for path in unreadable(tmp_path)] == [f"step-{number:08}" for number in range(90, 101)]
    assert steps(tmp_path) == [10, 4, 2]
    assert find(tmp_path / "nowhere") == []


def test_replaced_checkpoint_is_found_until_the_new_one_has_its_name(tmp_path: Path) -> None:
    """A kill between the two renames leaves the old one under its temporary name."""
    make(tmp_path, 4, 50.0).rename(tmp_path / "step-00000004.replaced")
    assert [(c.path.name, c.top1) for c in find(tmp_path)] == [("step-00000004.replaced", 50.0)]
    make(tmp_path, 2)
    for top1 in (60.0, 70.0):
        publish(make(tmp_path / "elsewhere", 4, top1), tmp_path / "step-00000004")
        assert [(c.path.name, c.top1) for c in find(tmp_path)] == [("step-00000004", top1), ("step-00000002", None)]
    assert not list(tmp_path.glob("*.replaced"))


def test_publish_replaces_files_and_links_with_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000002").write_text("")
    (tmp_path / "kept").mkdir()
    (tmp_path / "step-00000003").symlink_to(tmp_path / "kept")
    for step in (1, 2, 3):
        publish(make(tmp_path / "elsewhere", step), tmp_path / f"step-{step:08}")
    assert steps(tmp_path) == [3, 2, 1]
    assert (tmp_path / "kept").is_dir()
    assert not list(tmp_path.glob("*.replaced"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("whole", None), ("who", "has 3 bytes"), ("whale", "SHA-256 differs"), (None, "is missing")],
)
def test_damage_names_the_file(tmp_path: Path, content: str | None, message: str | None) -> None:
    weights = make(tmp_path, 1) / "weights"
    weights.unlink()
    if content is not None:
        weights.write_text(content)
    problem = damage(find(tmp_path)[0])
    if message is None:
        assert problem is None
    else:
        assert str(problem).startswith(str(weights))
        assert message in str(problem)


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left"),
    [(1, False, [5]), (1, True, [5, 3]), (2, True, [5, 4, 3]), (3, False, [5, 4, 3]), (9, False, [5, 4, 3, 2, 1])],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path: Path, keep_last: int, keep_best: bool, left: list[int]) -> None:
    """Of two equally accurate checkpoints, the later one is the best."""
    assert best_path(tmp_path) is None
    for step, top1 in ((1, 50.0), (2, 90.0), (3, 90.0), (4, None), (5, 80.0)):
        make(tmp_path, step, top1)
    assert best_path(tmp_path) == tmp_path / "step-00000003"
    prune(tmp_path, keep_last, keep_best)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_checkpoint_set_aside_is_neither_found_nor_kept(tmp_path: Path) -> None:
    """A damaged checkpoint of a later step must not displace one that a run has just written."""
    make(tmp_path, 28)
    set_aside(find(tmp_path)[:1])
    make(tmp_path, 11)
    prune(tmp_path, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [11]
    assert unreadable(tmp_path) == []
    make(tmp_path, 28)
    set_aside(find(tmp_path)[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000011", "step-00000028.aside"]


def test_failing_to_read_or_remove_a_checkpoint_ends_no_run(tmp_path: Path) -> None:
    path = make(tmp_path / "elsewhere", 3)
    (tmp_path / "step-00000003").symlink_to(path)
    (path / "weights").unlink()
    (path / "weights").mkdir()
    assert "weights" in str(damage(find(tmp_path)[0]))
    make(tmp_path, 4)
    prune(tmp_path, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [4]
    assert path.exists()
