"""Numbers on their way from the device, looked at as they arrive: nobody waits for the work that is queued behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in the device's queue."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def synchronize(self) -> None:
        """Waits until it has."""


class Sent(NamedTuple):
    """A number of step ``step`` as the host will see it, past ``event`` (None: it is here), and what belongs to it."""

    step: int
    number: Tensor
    event: Event | None
    about: Any


def send(number: Tensor) -> tuple[Tensor, Event | None]:
    """The number on the host, and the event past which it is there; on CUDA into pinned memory, without waiting."""
    if not number.is_cuda:
        return number, None
    copy = number.to("cpu", non_blocking=True)  # which pins the memory that it allocates
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(number.device))
    return copy, event


class Arrivals:
    """Looks at numbers in the order in which they were sent, each when it has arrived or ``lag`` steps later.

    The CPU is then at most ``lag`` steps ahead of the device; with 0, every number is waited for.

    Args:
        look: called as ``look(step, number, about)``, the number on the host. What it raises comes out of ``add``.
        lag: steps after which a number is waited for.
        send: see there.
    """

    def __init__(
        self,
        look: Callable[[int, Tensor, Any], None],
        lag: int,
        send: Callable[[Tensor], tuple[Tensor, Event | None]] = send,
    ) -> None:
        self._look, self._lag, self._send = look, lag, send
        self._under_way: deque[Sent] = deque()

    def add(self, step: int, number: Tensor, about: Any) -> None:
        """Sends a 0-dim tensor, and looks at what has come."""
        self._under_way.append(Sent(step, *self._send(number), about))
        self._collect(step - self._lag)

    def finish(self) -> None:
        """Everything has been looked at."""
        if self._under_way:
            self._collect(self._under_way[-1].step)

    def _collect(self, due: int) -> None:
        """Looks at what is there, and waits for the numbers of the steps up to ``due``."""
        while self._under_way:
            step, number, event, about = self._under_way[0]
            if event is not None and not event.query():
                if step > due:
                    return
                event.synchronize()
            self._under_way.popleft()
            self._look(step, number, about)
