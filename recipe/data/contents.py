"""Counts what lies in the folder of the data, for a plan, without torch."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from recipe.config import Contents


def look(source: str, path: str, validation_share: float | None = None) -> Contents:
    """Count the images of an imagefolder, of a pack or of a data set of Hugging Face.

    Raises:
        ValueError: there is no such folder, or it is not what ``source`` says.
    """
    if source == "huggingface":
        return _huggingface(path, validation_share)
    return _pack(Path(path)) if source == "pack" else _imagefolder(Path(path), validation_share)


def _imagefolder(path: Path, validation_share: float | None) -> Contents:
    from recipe.data.folder_index import list_imagefolder  # numpy: not for a plan that looks at nothing

    train, validation = list_imagefolder(path, validation_share)
    left_out = Counter(train.left_out) + Counter(validation.left_out)
    classes = _fewest_first(train.classes, train.counts.tolist())
    return Contents(classes, len(train), len(validation), dict(left_out.most_common()))


def _pack(path: Path) -> Contents:
    import numpy as np

    from recipe.data.pack_format import open_index, read_header

    header = read_header(path)
    images, _ = open_index(path, header, header.train)
    counts = np.bincount(images["label"], minlength=len(header.classes)).tolist()
    return Contents(_fewest_first(header.classes, counts), header.train.images, header.validation.images)


def _huggingface(path: str, validation_share: float | None) -> Contents:
    import numpy as np

    from recipe.data.huggingface_index import list_huggingface

    train, validation = list_huggingface(path, validation_share)
    counts = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    return Contents(_fewest_first(train.classes, counts), len(train), len(validation))


def _fewest_first(classes: Sequence[str], counts: Sequence[int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(zip(classes, counts, strict=True), key=lambda one: one[1]))
