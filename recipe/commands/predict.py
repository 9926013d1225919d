"""``python -m recipe predict``: the most probable classes of image files according to a trained model."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands import refusing
from recipe.commands.evaluate import COUNT, add_model_options, default_output, load
from recipe.config import printable
from recipe.distributed import say
from recipe.reporting import Parser, Progress

if TYPE_CHECKING:
    from recipe.commands.trained import Trained

TOP = 5
SHOWN_FILES = 20
CSV, JSONL = "predictions.csv", "predictions.jsonl"


@refusing
def main(argv: Sequence[str]) -> int:
    """Predict; return 0, 1 if files could not be read, or 2 if the input is refused."""
    parser = Parser(prog="python -m recipe predict", description="Print and write the most probable classes of images.")
    add_model_options(parser, "predictions")
    parser.add_argument("images", type=Path, nargs="+", metavar="FILE|DIR", help="image files, or folders of them")
    parser.add_argument(
        "--micro-batch", type=COUNT, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    arguments = parser.parse_args(argv)
    output: Path = arguments.output or default_output(arguments.model, "predictions")
    files = list(image_files(arguments.images))
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, arguments.images))}")
    trained = load(arguments)
    output.mkdir(parents=True, exist_ok=True)
    unreadable = _write(trained, files, output, micro_batch=arguments.micro_batch, workers=arguments.workers)
    classified = f"{len(files) - len(unreadable):,} of {len(files):,} images classified"
    print(f"\n{classified}; results in {printable(str(output))}: {CSV}, {JSONL}")
    for file in unreadable:
        say(f"{file} could not be read")
    return 1 if unreadable else 0


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The named files, and the images below the named folders in order of name, without hidden ones."""
    from recipe.data import IMG_EXTENSIONS

    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                # A broken link counts, and is reported as an image that cannot be read.
                is_image = file.is_file() or not file.exists()
                if file.suffix.lower() in IMG_EXTENSIONS and not is_hidden and is_image:
                    yield file
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path} is neither a file nor a folder" if path.exists() else f"there is no file {path}")


def _write(trained: "Trained", files: Sequence[Path], output: Path, *, micro_batch: int, workers: int) -> list[Path]:
    """Write one line per file, in order, and print the first ones; return the files that could not be read."""
    ranks = range(1, min(TOP, trained.num_classes) + 1)
    columns = [column for rank in ranks for column in (f"class_{rank}", f"probability_{rank}")]
    found = predictions(trained, files, micro_batch, workers)
    unreadable = []
    with (
        (output / CSV).open("w", encoding="utf-8", newline="") as table,
        (output / JSONL).open("w") as lines,
        Progress(len(files), "images") as progress,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["file", *columns])
        for number, (file, best) in enumerate(zip(files, found, strict=True)):
            progress.add(1)
            if number == SHOWN_FILES:
                progress.say(f"… the rest are in {printable(str(output / CSV))}")
            if best is None:
                unreadable.append(file)
                continue
            path = printable(str(file))
            rows.writerow([path, *(cell for name, p in best for cell in (name, f"{p:.6f}"))])
            record = {"file": path, "top": [{"class": name, "probability": p} for name, p in best]}
            lines.write(json.dumps(record) + "\n")
            if number < SHOWN_FILES:
                shown = ", ".join(f"{printable(name)} {100 * p:.1f} %" for name, p in best)
                progress.say(f"{path}: {shown}")
    return unreadable


def predictions(
    trained: "Trained", files: Sequence[Path], micro_batch: int, workers: int
) -> Iterator[list[tuple[str, float]] | None]:
    """For each file, in order, its ``TOP`` most probable classes with their probabilities; None if it is unreadable."""
    import numpy as np
    import torch

    from recipe.commands.trained import validation_loader
    from recipe.data import FolderIndex, ImageFiles

    paths = b"".join(os.fsencode(file) + b"\0" for file in files)
    index = FolderIndex("", [""], np.array([len(files)]), np.frombuffer(paths, np.uint8), left_out={})
    crop = trained.plan.config.recipe.data.crop
    view: dict[str, Any] = {"image_size": trained.plan.validation_image_size, "crop": crop, "flip": False, "seed": 0}
    dataset = ImageFiles(index, **view, on_bad_image="skip")
    model = trained.build(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loader = validation_loader(trained, model, dataset, micro_batch=micro_batch, rank=0, world_size=1, workers=workers)
    names = trained.classes or [str(place) for place in range(trained.num_classes)]
    left = len(files)  # the last batch is padded
    with torch.inference_mode():
        for batch in loader.batches():
            probabilities = model(batch.images).double().softmax(1)
            values, places = (tensor.tolist() for tensor in probabilities.topk(min(TOP, len(names))))
            for weight, row, classes in list(zip(batch.weights.tolist(), values, places, strict=True))[:left]:
                yield [(names[place], value) for place, value in zip(classes, row, strict=True)] if weight else None
            left -= micro_batch
    loader.close()
