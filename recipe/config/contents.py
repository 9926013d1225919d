"""What the folder of a config's data holds, counted: the data room counts it, the plan checks the config against it."""

from dataclasses import dataclass, field

SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """The images of an imagefolder, a pack or a data set of Hugging Face, counted."""

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

    def name_imbalance(self) -> str:
        """The smallest and the largest class in words, with a warning beyond 1 : 10; "" where all are of one size."""
        (few, smallest), (many, largest) = self.classes[0], self.classes[-1]
        if smallest == largest:
            return ""
        warning = ", which is beyond 1 : 10: the rare ones will hardly be learnt" if largest > 10 * smallest else ""
        return f"{smallest:,} ({few}) to {largest:,} ({many}) images per class{warning}"

    def name_left_out(self) -> str:
        """What was left out in words; "" where nothing was."""
        shown = [f"{count:,} {extension or 'without an extension'}" for extension, count in self.left_out.items()]
        others = f" and {len(shown) - SHOWN} other kinds" if len(shown) > SHOWN else ""
        return f"left out: {', '.join(shown[:SHOWN])}{others}" if shown else ""
