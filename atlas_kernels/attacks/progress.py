"""How a long attack goes: when to say it, and how long it will take."""

from __future__ import annotations

import time

SAY_EVERY, WARM_UP = 30.0, 10.0  # seconds


class Progress:
    """Counts passes of one attack, and estimates by the speed that it has after a warm-up: the first iterations compile
    and choose kernels, so they would say far too much."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.warm: tuple[float, int] | None = None

    def is_due(self, passed: int) -> bool:
        """Whether it is time to say something. passed: passes so far, of whatever count."""
        now = time.monotonic()
        if self.warm is None and now - self.began >= WARM_UP:
            self.warm = now, passed
        due = now - self.said >= SAY_EVERY
        self.said = now if due else self.said
        return due

    def left(self, passed: int, to_come: int) -> str:
        """The time left, in words; nothing while that is not known."""
        if self.warm is None:
            return ""
        since, then = self.warm
        if passed <= then:
            return ""
        seconds = (time.monotonic() - since) * to_come / (passed - then)
        return f", about {duration(seconds)} left"


def counted(number: int, what: str) -> str:
    """1 image, 2 images, 1,000 images."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
