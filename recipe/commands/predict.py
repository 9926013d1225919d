"""``python -m recipe predict``: the most probable classes of image files, by a trained model."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.commands import refusing
from recipe.commands.evaluate import COUNT, add_model_options, load, usual_output
from recipe.config import printable
from recipe.distributed import say
from recipe.reporting import Parser, Progress

if TYPE_CHECKING:
    from recipe.commands.trained import Trained
    from recipe.data import ImageDataset

TOP = 5
SHOWN_FILES = 20
CSV, JSONL = "predictions.csv", "predictions.jsonl"


@refusing
def main(argv: Sequence[str]) -> int:
    """Predict; return 0, 1 where files could not be read, or 2 where the input is refused."""
    parser = Parser(prog="python -m recipe predict", description="Print and write the most probable classes of images.")
    add_model_options(parser, "predictions")
    parser.add_argument("images", type=Path, nargs="+", metavar="FILE|DIR", help="image files, or folders of them")
    parser.add_argument("--micro-batch", type=COUNT, default=64, metavar="N", help="images per forward pass (64)")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output or usual_output(arguments.model, "predictions")
    files = list(image_files(arguments.images))
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, arguments.images))}")
    trained = load(arguments)
    output.mkdir(parents=True, exist_ok=True)
    unreadable = _write(trained, files, output, micro_batch=arguments.micro_batch, workers=arguments.workers)
    print(f"\n{len(files) - len(unreadable):,} of {len(files):,} images in {printable(str(output))}: {CSV}, {JSONL}")
    for file in unreadable:
        say(f"{file} could not be read")
    return 1 if unreadable else 0


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Each file that is named, and the images below each folder, in the order of their names; hidden names are none.

    Raises:
        ValueError: A path is not there.
    """
    from recipe.data import IMG_EXTENSIONS

    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                # A link that leads nowhere is an image that cannot be read, and is reported as such.
                is_image = file.is_file() or not file.exists()
                if file.suffix.lower() in IMG_EXTENSIONS and not is_hidden and is_image:
                    yield file
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path} is neither a file nor a folder" if path.exists() else f"there is no file {path}")


def _write(trained: "Trained", files: Sequence[Path], output: Path, *, micro_batch: int, workers: int) -> list[Path]:
    """Write a line for each file, in order, and print the first; return those that could not be read."""
    names = trained.classes or tuple(str(place) for place in range(trained.num_classes))
    top = min(TOP, trained.num_classes)
    columns = [column for place in range(1, top + 1) for column in (f"class_{place}", f"probability_{place}")]
    unreadable = []
    with (
        (output / CSV).open("w", encoding="utf-8", newline="") as table,
        (output / JSONL).open("w") as lines,
        Progress(len(files), "images") as progress,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["file", *columns])
        for number, (file, best) in enumerate(
            zip(files, predictions(trained, files, top, micro_batch, workers), strict=True)
        ):
            progress.add(1)
            if best is None:
                unreadable.append(file)
                continue
            named = [(names[place], probability) for place, probability in best]
            rows.writerow([printable(str(file)), *(cell for name, p in named for cell in (name, f"{p:.6f}"))])
            record = {"file": printable(str(file)), "top": [{"class": name, "probability": p} for name, p in named]}
            lines.write(json.dumps(record) + "\n")
            if number < SHOWN_FILES:
                shown = ", ".join(f"{printable(name)} {100 * p:.1f} %" for name, p in named)
                progress.say(f"{printable(str(file))}: {shown}")
            elif number == SHOWN_FILES:
                progress.say(f"… the others are in {printable(str(output / CSV))}")
    return unreadable


def predictions(
    trained: "Trained", files: Sequence[Path], top: int, micro_batch: int, workers: int
) -> Iterator[list[tuple[int, float]] | None]:
    """For each file, in order, its ``top`` most probable classes with their probabilities; None if it is unreadable."""
    import torch

    from recipe.commands.trained import validation_loader

    model = trained.build(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loader = validation_loader(trained, model, _as_data(trained, files), micro_batch=micro_batch, workers=workers)
    left = len(files)
    with torch.inference_mode():
        for batch in loader.batches():
            probabilities = model(batch.images).double().softmax(1)
            values, places = (tensor.tolist() for tensor in probabilities.topk(top))
            for weight, row, classes in list(zip(batch.weights.tolist(), values, places, strict=True))[:left]:
                yield list(zip(classes, row, strict=True)) if weight else None
            left -= micro_batch
    loader.close()


def _as_data(trained: "Trained", files: Sequence[Path]) -> "ImageDataset":
    import numpy as np

    from recipe.data import FolderIndex, ImageFiles

    names = b"".join(os.fsencode(file) + b"\0" for file in files)
    index = FolderIndex("", [""], np.array([len(files)]), np.frombuffer(names, np.uint8), left_out={})
    crop = trained.plan.config.recipe.data.crop
    view: dict[str, Any] = {"image_size": trained.plan.validation_image_size, "crop": crop, "flip": False, "seed": 0}
    return ImageFiles(index, **view, on_bad_image="skip")
