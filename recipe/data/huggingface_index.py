"""Which images a data set of Hugging Face holds and what they show, by the package ``datasets``; needs no torch.

Arrow files are mapped into memory. Other files, such as Parquet, ``datasets`` converts to Arrow once, into its cache,
while the other ranks of the host wait. It runs no code that comes with a data set.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recipe.config import printable
from recipe.data.folder_index import hold_out

HELD_OUT = ("validation", "val", "test")
"""Splits to validate on, the first that is there."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SAVED = ("dataset_dict.json", "state.json")  # of what save_to_disk writes


@dataclass(eq=False)
class Split:
    """Labelled images: rows of one split of a data set."""

    name: str
    """of the data set and the split, for messages"""
    images: Any
    """a ``datasets.Dataset`` whose only column holds bytes and the original file's name"""
    rows: npt.NDArray[np.int64]
    """the places of the images in it"""
    labels: npt.NDArray[np.int64]
    """the class of each image"""
    classes: list[str]
    """the names of the classes in the order of their numbers"""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, chosen: npt.NDArray[np.bool_]) -> "Split":
        """The images for which ``chosen`` is true."""
        return Split(self.name, self.images, self.rows[chosen], self.labels[chosen], self.classes)


def is_hub_name(path: str) -> bool:
    """Whether this is a name on the hub: owner/name, and no folder here."""
    return not Path(path).is_dir() and bool(_HUB_NAME.fullmatch(path))


def is_huggingface(path: str) -> bool:
    """Whether this is a name on the hub, or a folder that holds what ``save_to_disk`` wrote, or Parquet files."""
    files = (*_SAVED, "*.parquet", "data/*.parquet")
    return is_hub_name(path) or any(next(Path(path).glob(pattern), None) is not None for pattern in files)


def list_huggingface(path: str, validation_share: float | None = None) -> tuple[Split, Split]:
    """Return (training, validation) of a data set in a folder, or of that name on the hub.

    Where it has no split to validate on, ``validation_share`` takes a part of each class of the training split, see
    ``hold_out``. Refuses a data set that is not there, has not one column of images and one of classes, or has an image
    without a class.
    """
    splits = _load(path)
    if "train" not in splits:
        raise ValueError(printable(f"{path} has no split train, only {', '.join(splits)}"))
    train, held_out = _read_split(path, "train", splits["train"]), _held_out(splits)
    if validation_share is not None:
        if held_out is not None:
            raise ValueError(f"{path} has a split {held_out}; remove recipe.data.validation_share")
        # Files need not have names here, but every image has a place.
        names = [b"%d" % row for row in range(len(train))]
        is_held_out = hold_out(train.classes, train.labels, names, validation_share, train.name)
        return train.part(~is_held_out), train.part(is_held_out)
    if held_out is None:
        raise ValueError(f"{path} has no split {' or '.join(HELD_OUT)}; write recipe.data.validation_share 0.1")
    validation = _read_split(path, held_out, splits[held_out])
    if train.classes != validation.classes:
        raise ValueError(f"{path}: the classes of the splits train and {held_out} differ, in names or in order")
    return train, validation


def list_validation(path: str, validation_share: float | None = None) -> Split:
    """Return what of a data set is to be evaluated on: what it holds out, or its only split."""
    if validation_share is not None:
        return list_huggingface(path, validation_share)[1]
    splits = _load(path)
    name = _held_out(splits) or next(iter(splits))
    return _read_split(path, name, splits[name])


def _held_out(splits: Mapping[str, Any]) -> str | None:
    return next((name for name in HELD_OUT if name in splits), None)


def _load(path: str) -> Mapping[str, Any]:
    """The splits of a data set by their names."""
    is_folder = Path(path).is_dir()
    if not is_folder and not is_hub_name(path):
        raise ValueError(f"there is no folder {path}; a data set on the hub is called owner/name")
    try:
        import datasets
    except ImportError as error:
        what = path if is_folder else f"there is no folder {path}, and what is on the hub"
        problem = f"{what} is read by the package datasets, which cannot be imported ({error})"
        raise ValueError(f"{problem}; pip install datasets") from error
    try:
        if is_folder and any(Path(path, name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(path)
        else:  # as an absolute path: "csv" would name a format
            found = datasets.load_dataset(str(Path(path).resolve()) if is_folder else path)
    except Exception as error:  # each format and each way to the hub has its own
        problem = " ".join(str(error).split()) or type(error).__name__
        where = path if is_folder else f"there is no folder {path}, nor can such a data set be had from the hub"
        raise ValueError(printable(f"{where}: {problem}")) from error
    splits = found if isinstance(found, dict) else {"train": found}
    if empty := [name for name, split in splits.items() if name in ("train", *HELD_OUT) and not len(split)]:
        raise ValueError(printable(f"{path}: the split {empty[0]} is empty; fill it, or remove it"))
    return splits


def _read_split(path: str, name: str, split: Any) -> Split:
    import datasets

    image = _the_column(path, name, split.features, datasets.Image)
    label = _the_column(path, name, split.features, datasets.ClassLabel)
    column = split.select_columns(label).with_format("arrow")[:].column(0)
    labels = column.fill_null(-1).to_numpy().astype(np.int64)
    classes = [printable(one) for one in split.features[label].names]
    if unlabelled := int(((labels < 0) | (labels >= len(classes))).sum()):
        raise ValueError(
            f"{path}: {unlabelled:,} of the {len(labels):,} images of the split {name} have no class: their {label} is "
            f"not from 0 to {len(classes) - 1}, as in the test splits of competitions; remove them, or the split"
        )
    # A saved data set keeps the format in which it was used last, such as tensors of torch.
    images = split.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format(None)
    return Split(f"{path}: {name}", images, np.arange(len(labels)), labels, classes)


def _the_column(path: str, name: str, features: Mapping[str, Any], kind: type) -> str:
    """The name of the one column that is of a kind of feature."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    columns = f"{len(found)} columns ({', '.join(found)})" if found else "no column"
    raise ValueError(
        printable(
            f"{path}: the split {name} has {columns} of type {kind.__name__}, and needs one; its columns are "
            f"{', '.join(features)}; remove_columns and cast_column of the package datasets mend it"
        )
    )
