"""Invariant 8: no checkpoint can execute code."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import DIGITS, SHORT, complete_run, train, train_ok

pytestmark = pytest.mark.slow


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def rewrite(checkpoint: Path, state: dict[str, Any]) -> None:
    """Replace what a checkpoint holds, and have its manifest agree."""
    file = checkpoint / "mp_rank_00_model_states.pt"
    torch.save(state, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_with_a_payload_runs_nothing_and_an_older_one_is_taken(tmp_path: Path) -> None:
    output, marker = tmp_path / "run", tmp_path / "marker"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    complete_run(output)
    (output / "summary.json").unlink()
    checkpoint = output / "checkpoints/step-00000006"
    file = checkpoint / "mp_rank_00_model_states.pt"
    rewrite(checkpoint, torch.load(file, weights_only=True) | {"payload": Payload(marker)})
    payload = shutil.copy(file, tmp_path)
    done = train_ok(*arguments)
    assert not marker.exists()
    assert f"checkpoint {checkpoint} is left aside: it cannot be loaded" in done.stdout
    assert "it holds more than tensors and plain values, which could run code" in done.stdout
    assert "Traceback" not in done.stderr
    # The run went on from the one before, and wrote this one anew.
    assert "step-00000004, 4 steps done" in done.stdout
    torch.load(file, weights_only=True)
    # The payload works: it is the loading that keeps it from running.
    torch.load(payload, weights_only=False)
    assert marker.exists()


def test_where_no_checkpoint_can_be_loaded_the_run_fails_and_says_why(tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    complete_run(output)
    (output / "summary.json").unlink()
    checkpoint, *older = sorted((output / "checkpoints").iterdir(), reverse=True)
    for folder in older:
        shutil.rmtree(folder)
    rewrite(checkpoint, {"module": {}, "payload": Payload(tmp_path / "marker")})
    done = train(*arguments)
    assert done.returncode == 1
    assert f"no checkpoint can be loaded: checkpoint {checkpoint} is left aside: it cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "marker").exists()
