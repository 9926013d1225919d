"""Image counts of a data set, which the data room reads and the plan compares with the config."""

from dataclasses import dataclass

SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """Image counts of an imagefolder, a pack or a Hugging Face data set."""

    classes: tuple[tuple[str, int], ...]
    """name and number of training images, the smallest first, as a folder that is not a class tends to be small"""

    train_images: int
    validation_images: int
    left_out: dict[str, int]
    """the number of files per extension that is not an image's"""

    def name_classes(self) -> str:
        """The smallest classes in words."""
        shown = [f"{name} ({images:,})" for name, images in self.classes[:SHOWN]]
        others = len(self.classes) - len(shown)
        return ", ".join(shown) + (f" and {others:,} more" if others else "")

    def name_imbalance(self) -> str:
        """The smallest and largest class in words, with a warning beyond 1 : 10; "" if all have the same size."""
        (few, smallest), (many, largest) = self.classes[0], self.classes[-1]
        if smallest == largest:
            return ""
        warning = ", beyond 1 : 10: the rare classes will hardly be learnt" if largest > 10 * smallest else ""
        return f"{smallest:,} ({few}) to {largest:,} ({many}) images per class{warning}"

    def name_left_out(self) -> str:
        """The ignored files in words; "" if there are none."""
        shown = [f"{count:,} {extension or 'without an extension'}" for extension, count in self.left_out.items()]
        others = f" and {len(shown) - SHOWN} other kinds" if len(shown) > SHOWN else ""
        return f"left out: {', '.join(shown[:SHOWN])}{others}" if shown else ""
