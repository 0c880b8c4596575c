"""Processes of ``torch.distributed`` that share a piece of work: what they tell each other, and which are lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from itertools import count as numbers_from
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_FOREVER = timedelta(days=365)  # a process may be done long before the others
_CLOSED = ("closed", "reset")  # what gloo says of a process that is no more, in far more words
_GONE = "gone without a word, killed perhaps"


class LostProcesses(RuntimeError):
    """Some processes did not come to an end. rows: the samples whose verdicts are known; result: these verdicts, None
    if there are none."""

    def __init__(self, message: str, rows: Tensor | None = None, result: Any = None) -> None:
        super().__init__(message)
        self.rows = torch.zeros(0, dtype=torch.int64) if rows is None else rows
        self.result = result


class Processes:
    """The processes that share a call. Each exchanges objects with the first one alone, through the memory of its
    CPU, and all make the same exchanges in the same order.

    rank, count: as in ``torch.distributed``. lost: in the first process, by rank, why others ended early.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None, name: str = "") -> None:
        self.rank, self.count, self.group, self.name = rank, count, group, name
        self.lost: dict[int, str] = {}

    def gather(self, mine: T) -> dict[int, T]:
        """By rank, in the first process what each of them gives, but for those that are lost; elsewhere ``mine``."""
        if self.rank:
            with self._with_first():
                dist.send_object_list([mine], dst=0, group=self.group)
        given = {self.rank: mine}
        for other in self._others():
            box: list[Any] = [None]
            with self._with(other):
                dist.recv_object_list(box, src=other, group=self.group)
                given[other] = box[0]
        return given

    def share(self, value: T | None) -> T:
        """The first process's value, in all of them."""
        box: list[Any] = [value]
        if self.rank:
            with self._with_first():
                dist.recv_object_list(box, src=0, group=self.group)
        for other in self._others():
            with self._with(other):
                dist.send_object_list(box, dst=other, group=self.group)
        made: T = box[0]
        return made

    def require_same(self, values: dict[str, Any]) -> None:
        """Raises ValueError in all of them where one has another value than the first."""
        others = self.gather(values)
        wrong = [
            f"process {rank} has other {name} than process 0"
            for rank, theirs in others.items()
            for name in values
            if theirs[name] != values[name]
        ]
        if wrong := self.share(wrong):
            raise ValueError(f"{'; '.join(wrong)}: give every process the same, they deal the samples out themselves")

    def about_lost(self, what: str = "ended early") -> str:
        """Which are lost, and why."""
        told = ", ".join(f"process {rank} ({why})" for rank, why in self.lost.items())
        return f"{told} of {self.count} {what}"

    def _others(self) -> list[int]:
        return [] if self.rank else [rank for rank in range(1, self.count) if rank not in self.lost]

    @contextmanager
    def _with(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.lost[other] = self._word_of(other) or _in_short(error)

    @contextmanager
    def _with_first(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.lost[0] = self._word_of(0) or _in_short(error)
            raise LostProcesses(self.about_lost()) from error

    def _leave_word(self, error: BaseException) -> None:
        """For the others, why this process ends: in the store where the processes met."""
        with suppress(Exception):
            said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
            _store().set(f"{self.name}/{self.rank}", said[:200])

    def _word_of(self, rank: int) -> str | None:
        with suppress(Exception):
            key = f"{self.name}/{rank}"
            if _store().check([key]):
                return str(_store().get(key), "utf-8", "replace")
        return None

    def _killed(self) -> dict[int, str]:
        """Which of the others are no more and left no word. After this the processes cannot talk any longer."""
        for other in self._others():
            try:
                header = torch.zeros(1, dtype=torch.int64)
                dist.irecv(header, src=other, group=self.group).wait(timedelta(milliseconds=1))  # type: ignore[union-attr]
            except RuntimeError as error:
                if _in_short(error) == _GONE and self._word_of(other) is None:
                    self.lost[other] = _GONE
        return self.lost


_CURRENT: ContextVar[Processes | None] = ContextVar("atlas_processes", default=None)
_NUMBERS = numbers_from()


@contextmanager
def together() -> Iterator[Processes]:
    """The processes of ``torch.distributed``, all of which must enter it; a second one inside gives the same. Without a
    process group, or within ``alone``, it is this process.

    Where the first process is told to end (SystemExit), and another was killed, it raises LostProcesses that names it:
    torchrun ends all as soon as one is lost.
    """
    if (outer := _CURRENT.get()) is not None:
        yield outer
        return
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Processes()
        return
    group = dist.new_group(backend="gloo", timeout=_FOREVER)
    processes = Processes(dist.get_rank(), dist.get_world_size(), group, f"atlas_processes/{next(_NUMBERS)}")
    token = _CURRENT.set(processes)
    try:
        yield processes
    except BaseException as error:
        processes._leave_word(error)
        if isinstance(error, SystemExit) and processes._killed():
            raise LostProcesses(processes.about_lost("ended early, and with it the others")) from error
        raise
    finally:
        _CURRENT.reset(token)
        dist.destroy_process_group(group)
        processes.group = group = None  # the last ones, so that who waits for this process hears that it has left


@contextmanager
def alone() -> Iterator[Processes]:
    """Inside, ``together`` is this process, whatever group it is in."""
    token = _CURRENT.set(single := Processes())
    try:
        yield single
    finally:
        _CURRENT.reset(token)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _in_short(error: BaseException) -> str:
    return _GONE if any(word in str(error) for word in _CLOSED) else str(error).strip().split("\n")[0][-80:]
