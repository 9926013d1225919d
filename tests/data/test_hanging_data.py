"""Data that never arrives ends a real run, loader processes and all."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.data.images import write_folder
from tests.launch import DIGITS, train, wait_until

pytestmark = pytest.mark.slow


def test_image_that_cannot_be_read_to_its_end_is_reported_before_the_timeout(tmp_path: Path) -> None:
    """One image becomes a pipe without a writer, as a file on a hanging server would block its reader."""
    data, output, pipe = write_folder(tmp_path / "images", images=32), tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = [f"--deepspeed_config={DIGITS}", f"--output={output}", f"--data={data}", "--set=train_batch_size=16"]
    arguments += ["--set=recipe.model.num_classes=2", "--set=recipe.max_micro_batch_size=4"]
    arguments += ['--set=recipe.data={"source": "imagefolder", "path": "nowhere", "image_size": 32, "workers": 1}']
    arguments += ["--set=recipe.distributed.timeout_seconds=10"]
    with ThreadPoolExecutor() as pool:
        run = pool.submit(train, *arguments, ranks=2)
        wait_until(lambda: (output / "train.log").exists())
        pipe.replace(data / "train/c1/7.jpg")  # a pipe is refused when the folder is listed
        done = run.result()
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("recipe: ")]
    assert re.fullmatch(
        r"recipe: rank \d on \S+ failed at step \d+: TimeoutError: no images from the data loader for [89] s",
        said[-1],
    ), done.stderr
