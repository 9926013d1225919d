"""Counts the images and classes of a data set for a plan, without torch."""

from collections import Counter
from pathlib import Path

from recipe.config import Contents, printable


def look(source: str, path: str, validation_share: float | None = None) -> Contents:
    """Count the images of an imagefolder, a pack or a Hugging Face data set.

    Raises:
        ValueError: there is no such data, it is not what ``source`` says, or this user may not read it.
    """
    try:
        return _count(source, path, validation_share)
    except OSError as error:
        raise ValueError(printable(f"{path} cannot be read: {error.strerror}; name another folder")) from None


def _count(source: str, path: str, validation_share: float | None) -> Contents:
    # Imported here, because a plan that counts nothing need not wait for numpy.
    import numpy as np

    from recipe.data.folder_index import list_imagefolder
    from recipe.data.huggingface_index import list_huggingface
    from recipe.data.pack_format import open_index, read_header

    left_out: dict[str, int] = {}
    if source == "pack":
        header = read_header(Path(path))
        labels = open_index(Path(path), header, header.train)[0]["label"]
        classes, validation_images = header.classes, header.validation.images
    elif source == "huggingface":
        split, held_out = list_huggingface(path, validation_share)
        labels, classes, validation_images = split.labels, tuple(split.classes), len(held_out)
    else:
        train, validation = list_imagefolder(Path(path), validation_share)
        labels, classes, validation_images = train.labels, tuple(train.classes), len(validation)
        left_out = dict((Counter(train.left_out) + Counter(validation.left_out)).most_common())
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    fewest_first = sorted(zip(classes, counts, strict=True), key=lambda named: named[1])
    return Contents(tuple(fewest_first), len(labels), validation_images, left_out)
