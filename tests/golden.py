"""``python -m tests.golden``: make ``golden_losses.json`` anew, after a change that is meant to change training."""

import json
import tempfile
from pathlib import Path

from tests.launch import DIGITS, SHORT, losses, train_ok

GOLDEN = Path(__file__).with_name("golden_losses.json")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train_ok("--deepspeed_config", DIGITS, "--output", folder, *SHORT)
        GOLDEN.write_text(json.dumps({"config": DIGITS, "overrides": SHORT, "losses": losses(Path(folder))}, indent=2))
