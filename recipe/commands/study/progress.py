"""How far a study is: one bar over all of its runs, or lines where there is no terminal."""

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from recipe.commands.study.file import Training

LINE_EVERY_SECONDS = 60.0


class Progress:
    """Counts images, not steps: they tell what is left of the time, whatever the batch."""

    def __init__(self, runs: int, runs_over: int, images: int, images_over: int) -> None:
        """``runs_over`` of ``runs`` are complete or have diverged, which are ``images_over`` of ``images``."""
        self.runs, self.runs_over = runs, runs_over
        self.total_images, self.images_over = images, images_over
        self._under_way: dict[Training, int] = {}
        self._waited_for: set[Path] = set()
        self._line_printed_at = time.monotonic()
        self.bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                desc=self._counted(),
                total=images,
                initial=images_over,
                dynamic_ncols=True,
                bar_format="{desc} |{bar}| {percentage:3.0f} % of the images [{elapsed} gone, {remaining} left]",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def starts(self, training: Training) -> None:
        """A run has been launched."""
        self._under_way[training] = 0
        self._say(f"{self.runs_over + len(self._under_way)} of {self.runs}: {training} …")

    def images(self, training: Training, images: int) -> None:
        """A run has trained on so many images so far."""
        self._under_way[training] = images
        self._show()

    def over(self, training: Training, result: str) -> None:
        """A run has ended; what it left out, as one that diverged does, is no longer to be waited for."""
        self._under_way.pop(training, None)
        self.runs_over += 1
        self.images_over += training.images
        self._say(f"[{self.runs_over}/{self.runs}] {training}: {result}")
        self._show()

    def wait_for(self, folder: Path) -> None:
        """Say once that another process writes to the folder of a run."""
        if folder not in self._waited_for:
            self._waited_for.add(folder)
            self._say(f"another process is writing to {folder}: waiting for its end")

    def _counted(self) -> str:
        return f"{self.runs_over} of {self.runs} runs"

    def _show(self) -> None:
        done = self.images_over + sum(self._under_way.values())
        if self.bar is not None:
            # Not update(), whose estimate follows the last moments: a launch comes on for long before it trains.
            self.bar.n = done
            self.bar.set_description_str(self._counted())
        elif time.monotonic() - self._line_printed_at > LINE_EVERY_SECONDS:
            self._say(f"{self._counted()}, {done / self.total_images:.0%} of the images")

    def _say(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()
        self._line_printed_at = time.monotonic()
