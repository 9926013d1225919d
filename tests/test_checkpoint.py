"""Finding, verifying and pruning checkpoints; saving and loading stands in test_train.py, with real runs."""

import hashlib
import json
from pathlib import Path

import pytest

from recipe.checkpoint import MANIFEST, best, damage, find, prune


def make(folder: Path, step: int, top1: float | None = None) -> Path:
    """A checkpoint of one file, ``weights``, whose five bytes are "whole"."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_text("whole")
    sha256 = hashlib.sha256(b"whole").hexdigest()
    manifest = {"step": step, "top1": top1, "files": {"weights": {"bytes": 5, "sha256": sha256}}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find(folder)]


def test_find_lists_what_has_a_manifest_the_newest_first(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        make(tmp_path, step)
    (tmp_path / "step-00000099").mkdir()  # no manifest: it was never completed
    for number, manifest in enumerate(
        [
            '{"step": 90, "fi',
            '{"step": "91", "top1": null, "files": {"weights": {"bytes": 5, "sha256": ""}}}',
            '{"step": 92, "top1": null, "files": []}',
            '{"step": 93, "top1": null, "files": {}}',
            '{"step": 94, "top1": "good", "files": {"weights": {"bytes": 5, "sha256": ""}}}',
            '{"step": 94, "top1": null, "files": {"weights": {"bytes": 5, "sha256": ""}}}',
            '{"step": 96, "top1": null, "files": {"weights": {}}}',
            "[]",
        ],
        start=90,
    ):
        (make(tmp_path, number) / MANIFEST).write_text(manifest)
    (tmp_path / ".unfinished" / "step-00000097").mkdir(parents=True)
    assert steps(tmp_path) == [10, 4, 2]
    assert find(tmp_path / "nowhere") == []


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
    [(1, False, [5]), (1, True, [5, 2]), (2, True, [5, 4, 2]), (3, False, [5, 4, 3]), (9, False, [5, 4, 3, 2, 1])],
)
def test_prune_keeps_the_last_and_the_best(tmp_path: Path, keep_last: int, keep_best: bool, left: list[int]) -> None:
    for step, top1 in ((1, 50.0), (2, 90.0), (3, 90.0), (4, None), (5, 80.0)):
        make(tmp_path, step, top1)
    prune(tmp_path, keep_last, keep_best)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_best_is_the_earliest_of_equals(tmp_path: Path) -> None:
    for step, top1 in ((1, None), (2, 70.0), (3, 70.0)):
        make(tmp_path, step, top1)
    found = best(find(tmp_path))
    assert found is not None
    assert found.step == 2
    assert best([]) is None
