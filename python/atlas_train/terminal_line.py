"""How far a download, or the reading of many files, is."""

from __future__ import annotations

import sys
import time


class Line:
    """A line on a terminal's standard error that says how far something is, from the third second on."""

    def __init__(self, what: str, total: int, unit: str = "") -> None:
        self.what, self.total, self.unit = what, total, unit
        self._next, self._shown = time.monotonic() + 2, False

    def show(self, done: int) -> None:
        if (now := time.monotonic()) >= self._next and sys.stderr.isatty():
            print(f"\r{self.what}: {done:,} of {self.total:,}{self.unit}", end="", file=sys.stderr, flush=True)
            self._next, self._shown = now + 0.1, True

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)
