"""Progress for people: one line that rewrites itself on a terminal, plain lines otherwise, nothing when quiet. No dependency, no thread."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

BAR_WIDTH = 24
REDRAW_SECONDS = 0.1
LINE_SECONDS = 5.0


class Progress:
    """Shows how far a long job is. `stream` is standard error unless given; `clock` gives seconds.

    On a terminal `update` redraws the line at most every 0.1 s; elsewhere it prints a line every 5 s, and the last one.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet, self.clock = quiet, clock
        self.terminal = not quiet and self.stream.isatty()
        self.drawn = ""
        self.started = self.shown_at = float("-inf")

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` parts of the job `label`; `note` is whatever is worth seeing now."""
        now = self.clock()
        if self.started == float("-inf"):
            self.started = now
        if self.quiet or (done < total and now - self.shown_at < (REDRAW_SECONDS if self.terminal else LINE_SECONDS)):
            return
        self.shown_at = now
        if self.terminal:
            self._draw(bar(label, done, total, note, now - self.started))
        else:
            self.say(f"{label}: {done}/{total}{'  ' + note if note else ''}")
        if done >= total:
            self.finish()

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.quiet:
            return
        self._erase()
        print(text, file=self.stream, flush=True)

    def finish(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self.drawn:
            print(file=self.stream, flush=True)
        self.drawn, self.started, self.shown_at = "", float("-inf"), float("-inf")

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Say that a stage begins (on a terminal), and how long it took when it ends."""
        started = self.clock()
        if self.terminal:
            self._draw(f"{label} ...")
        yield
        self.say(f"{label}: {self.clock() - started:.1f} s")

    def _draw(self, text: str) -> None:
        text = text[: max(20, shutil.get_terminal_size().columns - 1)]
        self.stream.write("\r" + text.ljust(len(self.drawn)))
        self.stream.flush()
        self.drawn = text

    def _erase(self) -> None:
        if self.drawn:
            self.stream.write("\r" + " " * len(self.drawn) + "\r")
            self.drawn = ""


def bar(label: str, done: int, total: int, note: str, seconds: float) -> str:
    """`train [########        ] 12/40  loss 3.21  0:04 left`."""
    filled = BAR_WIDTH * min(done, total) // max(1, total)
    left = seconds / done * (total - done) if 0 < done < total else 0.0
    end = f"{int(left) // 60}:{int(left) % 60:02d} left" if 0 < done < total else f"{seconds:.1f} s"
    return "  ".join(part for part in (f"{label} [{'#' * filled}{' ' * (BAR_WIDTH - filled)}] {done}/{total}", note, end) if part)
