"""How far a pack is: a bar, or a line a minute where there is no terminal."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

LINE_EVERY_SECONDS = 60.0


class Progress:
    """Counts ``total`` images that go into files, or bytes of files that are looked at.

    Args:
        total: Images, or bytes.
        files: Shards, or files.
        unit: "image" or "byte".
    """

    def __init__(self, total: int, files: int, unit: str = "image") -> None:
        self._total, self._files, self._unit = total, files, unit
        self._done = 0
        self._lock = threading.Lock()
        self._line_printed_at, self._done_then = time.monotonic(), 0
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=f" {unit}s", unit_scale=unit == "byte", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, number: int) -> None:
        """So many more are done; any thread may say so."""
        with self._lock:
            self._done += number
            self._show("")

    def show(self, done: int, files_done: int) -> None:
        """So many are done in all, and so many shards."""
        with self._lock:
            self._done = done
            self._show(f", {files_done} of {self._files} shards")

    def _show(self, files: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(files.removeprefix(", "), refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif (seconds := time.monotonic() - self._line_printed_at) > LINE_EVERY_SECONDS:
            # The rate since the line before: what an earlier launch has packed is done in no time.
            line = tqdm.format_meter(
                self._done,
                self._total,
                seconds,
                rate=(self._done - self._done_then) / seconds,
                unit=f" {self._unit}s",
                unit_scale=self._unit == "byte",
                bar_format="{n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left",
            )
            self._line_printed_at, self._done_then = time.monotonic(), self._done
            print(f"{line}{files}", file=sys.stderr, flush=True)
