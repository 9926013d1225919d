"""Invariant 8: no checkpoint can execute code."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import DIGITS, SHORT, train, train_ok

pytestmark = pytest.mark.slow


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_with_a_payload_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    output, marker = tmp_path / "run", tmp_path / "marker"
    arguments = ("--deepspeed_config", DIGITS, "--output", str(output), *SHORT)
    train_ok(*arguments)
    (output / "summary.json").unlink()
    checkpoint = output / "checkpoints/step-00000006"
    (file,) = checkpoint.glob("*.pt")
    state = torch.load(file, weights_only=True)
    torch.save(state | {"payload": Payload(marker)}, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    done = train(*arguments)
    assert not marker.exists()
    assert done.returncode == 1
    assert f"{checkpoint} holds more than tensors and plain values" in done.stderr
    assert "Traceback" not in done.stderr
    # The payload works: it is the loading that keeps it from running.
    torch.load(file, weights_only=False)
    assert marker.exists()
