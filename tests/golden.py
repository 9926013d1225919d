"""``python -m tests.golden``: regenerate ``golden_losses.json`` after a change that is meant to change training."""

import json
import tempfile
from pathlib import Path

from tests.launch import DIGITS, SIX_STEPS, losses, train_ok

GOLDEN = Path(__file__).with_name("golden_losses.json")
# CPU models round differently, and training multiplies a difference by up to a hundred per step: within five steps the
# losses differ by 1e-4 in fp32, and by less than 1e-10 in double precision.
FP64 = "--set=recipe.precision=fp64"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train_ok("--deepspeed_config", DIGITS, "--output", folder, *SIX_STEPS, FP64)
        content = {"config": DIGITS, "overrides": [*SIX_STEPS, FP64], "losses": losses(Path(folder))}
        GOLDEN.write_text(json.dumps(content, indent=2) + "\n")
