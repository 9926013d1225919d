"""Lists the images and labels of a Hugging Face data set with the package ``datasets``, without torch.

Arrow files are memory-mapped. ``datasets`` converts other files, such as Parquet, to Arrow once, into its cache, while
the other ranks on the host wait. No code that comes with a data set is run.
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
"""Names of the validation split; the first that exists is used."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SAVED = ("dataset_dict.json", "state.json")  # written by save_to_disk


@dataclass(eq=False)
class Split:
    """Labelled images: rows of one split of a data set."""

    name: str
    """the data set and the split, for messages"""
    images: Any
    """a ``datasets.Dataset`` whose only column holds each image's bytes and original file name"""
    rows: npt.NDArray[np.int64]
    """the images' rows in it"""
    labels: npt.NDArray[np.int64]
    """the class number of each image"""
    classes: list[str]
    """the names of the classes, by number"""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, chosen: npt.NDArray[np.bool_]) -> "Split":
        """Return the images for which ``chosen`` is true."""
        return Split(self.name, self.images, self.rows[chosen], self.labels[chosen], self.classes)


def is_hub_name(path: str) -> bool:
    """Return whether this is a name on the hub, owner/name, and not a local folder."""
    return not Path(path).is_dir() and bool(_HUB_NAME.fullmatch(path))


def is_huggingface(path: str) -> bool:
    """Return whether this is a name on the hub, or a folder that ``save_to_disk`` wrote or that has Parquet files."""
    files = (*_SAVED, "*.parquet", "data/*.parquet")
    return is_hub_name(path) or any(next(Path(path).glob(pattern), None) is not None for pattern in files)


def list_huggingface(path: str, validation_share: float | None = None) -> tuple[Split, Split]:
    """Return (training, validation) of the data set in a folder or with a name on the hub.

    If there is no validation split, ``validation_share`` takes a part of each class of the training split; see
    ``hold_out``. Raises a ValueError if the data set does not exist, does not have exactly one column of images and one
    of classes, or has an image without a class.
    """
    splits = _load(path)
    if "train" not in splits:
        raise ValueError(printable(f"{path} has no split train, only {', '.join(splits)}"))
    train, held_out = _read_split(path, "train", splits["train"]), _held_out(splits)
    if validation_share is not None:
        if held_out is not None:
            raise ValueError(f"{path} has a split {held_out}; remove recipe.data.validation_share")
        # Images need not have file names here, but every image has a row.
        names = [b"%d" % row for row in range(len(train))]
        is_held_out = hold_out(train.classes, train.labels, names, validation_share, train.name)
        return train.part(~is_held_out), train.part(is_held_out)
    if held_out is None:
        raise ValueError(f"{path} has no split {' or '.join(HELD_OUT)}; set recipe.data.validation_share to 0.1")
    validation = _read_split(path, held_out, splits[held_out])
    if train.classes != validation.classes:
        raise ValueError(f"{path}: the classes of the splits train and {held_out} differ, in names or in order")
    return train, validation


def list_validation(path: str, validation_share: float | None = None) -> Split:
    """Return the part of a data set to evaluate on: its validation split or share, or its only split."""
    if validation_share is not None:
        return list_huggingface(path, validation_share)[1]
    splits = _load(path)
    name = _held_out(splits) or next(iter(splits))
    return _read_split(path, name, splits[name])


def _held_out(splits: Mapping[str, Any]) -> str | None:
    return next((name for name in HELD_OUT if name in splits), None)


def _load(path: str) -> Mapping[str, Any]:
    """Return the splits of a data set by name."""
    is_folder = Path(path).is_dir()
    if not is_folder and not is_hub_name(path):
        raise ValueError(f"there is no folder {path}; a data set on the hub is called owner/name")
    try:
        import datasets
    except ImportError as error:
        what = path if is_folder else f"there is no folder {path}, and a data set on the hub"
        problem = f"{what} is read by the package datasets, which cannot be imported ({error})"
        raise ValueError(f"{problem}; pip install datasets") from error
    try:
        if is_folder and any(Path(path, name).is_file() for name in _SAVED):
            found = datasets.load_from_disk(path)
        else:  # an absolute path, because "csv" would be the name of a format
            found = datasets.load_dataset(str(Path(path).resolve()) if is_folder else path)
    except Exception as error:  # each format and each way to the hub raises its own kind
        problem = " ".join(str(error).split()) or type(error).__name__
        where = path if is_folder else f"there is no folder {path}, nor can this name be loaded from the hub"
        raise ValueError(printable(f"{where}: {problem}")) from error
    splits = found if isinstance(found, dict) else {"train": found}
    if empty := [name for name, split in splits.items() if name in ("train", *HELD_OUT) and not len(split)]:
        raise ValueError(printable(f"{path}: the split {empty[0]} is empty; fill it, or remove it"))
    return splits


def _read_split(path: str, name: str, split: Any) -> Split:
    import datasets

    image = _only_column(path, name, split.features, datasets.Image)
    label = _only_column(path, name, split.features, datasets.ClassLabel)
    column = split.select_columns(label).with_format("arrow")[:].column(0)
    labels = column.fill_null(-1).to_numpy().astype(np.int64)
    classes = [printable(one) for one in split.features[label].names]
    if unlabelled := int(((labels < 0) | (labels >= len(classes))).sum()):
        raise ValueError(
            f"{path}: {unlabelled:,} of the {len(labels):,} images of the split {name} have no class: their {label} is "
            f"not from 0 to {len(classes) - 1}, as in the test splits of competitions; remove them, or the split"
        )
    # A saved data set remembers its last output format, such as torch tensors.
    images = split.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format(None)
    return Split(f"{path}: {name}", images, np.arange(len(labels)), labels, classes)


def _only_column(path: str, name: str, features: Mapping[str, Any], kind: type) -> str:
    """Return the name of the only column with this kind of feature."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    columns = f"{len(found)} columns ({', '.join(found)})" if found else "no column"
    raise ValueError(
        printable(
            f"{path}: the split {name} has {columns} of type {kind.__name__}, but needs exactly one; its columns are "
            f"{', '.join(features)}; change them with remove_columns and cast_column of the package datasets"
        )
    )
