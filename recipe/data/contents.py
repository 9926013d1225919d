"""What the folder of a config holds, for a plan and for what is refused before a run begins: without torch."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from recipe.config import FOLDERS, Config

SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """The images of an imagefolder or a pack, counted."""

    classes: tuple[tuple[str, int], ...]
    """name and number of training images; those with the fewest first, as a folder that is no class has few"""

    train_images: int
    validation_images: int
    left_out: dict[str, int] = field(default_factory=dict)
    """the number of files that are no images by their extension, by that"""

    def name_classes(self) -> str:
        """The first of them in words."""
        shown = [f"{name} ({images:,})" for name, images in self.classes[:SHOWN]]
        others = len(self.classes) - len(shown)
        return ", ".join(shown) + (f" and {others:,} more" if others else "")

    def name_left_out(self) -> str:
        """What was left out in words; "" where nothing was."""
        shown = [f"{count:,} {extension or 'without an extension'}" for extension, count in self.left_out.items()]
        others = f" and {len(shown) - SHOWN} other kinds" if len(shown) > SHOWN else ""
        return f"left out: {', '.join(shown[:SHOWN])}{others}" if shown else ""


def look(config: Config) -> Contents | None:
    """Count what lies in ``recipe.data.path``; None for data that lies in no folder.

    Raises:
        ValueError: there is no such folder, or it is not what ``recipe.data.source`` says.
    """
    data = config.recipe.data
    if data.source not in FOLDERS:
        return None
    assert data.path is not None, "the config refuses a folder without a path"
    try:
        return (_pack if data.source == "pack" else _imagefolder)(Path(data.path))
    except ValueError as error:
        raise ValueError(f"{config.source.file}: recipe.data.path: {error}") from error


def _imagefolder(path: Path) -> Contents:
    from recipe.data.folder_index import list_imagefolder  # numpy: not for a plan that looks at nothing

    train, validation = list_imagefolder(path)
    left_out = Counter(train.left_out) + Counter(validation.left_out)
    classes = sorted(zip(train.classes, train.counts.tolist(), strict=True), key=lambda one: one[1])
    return Contents(tuple(classes), len(train), len(validation), dict(left_out.most_common()))


def _pack(path: Path) -> Contents:
    import numpy as np

    from recipe.data.pack_format import open_index, read_header

    header = read_header(path)
    images, _ = open_index(path, header, header.train)
    counts = np.bincount(images["label"], minlength=len(header.classes)).tolist()
    classes = sorted(zip(header.classes, counts, strict=True), key=lambda one: one[1])
    return Contents(tuple(classes), header.train.images, header.validation.images)
