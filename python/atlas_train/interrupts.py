"""Signals that end a process: they become exceptions, so that what is under way is put in order on the way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


class Terminated(SystemExit):
    """The process was told to end. Its exit status is the usual one, 128 plus the signal's number."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated, where nobody else handles or ignores them; further ones are ignored."""
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in _ENDING if main and signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(128 + number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
