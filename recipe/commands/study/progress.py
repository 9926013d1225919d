"""How far a study is: one bar over all of its runs, or lines where there is no terminal."""

from pathlib import Path

from recipe.commands.study.file import Training
from recipe.reporting import terminal


class Progress(terminal.Progress):
    """Counts images, not steps: they are a measure of the time left, whatever the batch size."""

    def __init__(self, runs: int, runs_over: int, images: int, images_over: int) -> None:
        """``runs_over`` of ``runs`` are complete or have diverged, which are ``images_over`` of ``images``."""
        super().__init__(images, done=images_over)
        self.runs, self.runs_over, self.images_over = runs, runs_over, images_over
        self._under_way: dict[Training, int] = {}
        self._waited_for: set[Path] = set()

    def starts(self, training: Training) -> None:
        """A run has been launched."""
        self._under_way[training] = 0
        self.say(f"{self.runs_over + len(self._under_way)} of {self.runs}: {training} …")

    def images(self, training: Training, images: int) -> None:
        """A run has trained on so many images so far."""
        self._under_way[training] = images
        self._show()

    def over(self, training: Training, result: str) -> None:
        """A run has ended; what it left out, as one that diverged does, is no longer to be waited for."""
        self._under_way.pop(training, None)
        self.runs_over += 1
        self.images_over += training.images
        self.say(f"[{self.runs_over}/{self.runs}] {training}: {result}")
        self._show()

    def wait_for(self, folder: Path) -> None:
        """Say once that another process writes to the folder of a run."""
        if folder not in self._waited_for:
            self._waited_for.add(folder)
            self.say(f"another process is writing to {folder}: waiting for its end")

    def _show(self) -> None:
        self.update(self.images_over + sum(self._under_way.values()), f"{self.runs_over} of {self.runs} runs")
