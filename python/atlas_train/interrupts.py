"""Signals that end a process: they become exceptions, so that what is under way is put in order on the way out, and
wait where it must not be broken off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any

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


class Unbroken:
    """A context in which the first signal waits for its end, which is told. broken: an exception ended it, a second
    signal say."""

    def __init__(self, tell: Callable[[], object]) -> None:
        self.broken, self._tell = False, tell
        self._waiting: Callable[[], Any] | None = None
        self._inside = False

    def __enter__(self) -> None:
        self.broken = self._inside = True

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._inside = False
        if kind is not None:
            return
        self.broken = False
        if self._waiting:
            waiting, self._waiting = self._waiting, None
            waiting()

    def handle(self, handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
        """Calls the handler of a signal, now or at the end of the context."""
        if self._inside and self._waiting is None:
            self._waiting = lambda: handler(number, None)
            self._tell()
        else:
            handler(number, frame)


@contextmanager
def unbroken(tell: Callable[[], object]) -> Iterator[Unbroken]:
    """Gives an ``Unbroken`` for what SIGINT, SIGTERM and SIGHUP must not break off, where Python handles them."""
    made, handlers = Unbroken(tell), {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDING)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number, handler in handlers.items():
        signal.signal(number, partial(made.handle, handler))
    try:
        yield made
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as ``terminable`` leaves it once one has come
                signal.signal(number, handler)
