"""The processes that train or evaluate together: who is who, what they must agree on, and how they end together.

``torchrun --nproc-per-node N -m atlas_train train ...`` starts N of them (or evaluate); in a script of your own
``torch.distributed.init_process_group`` does. Each has all of the settings, the data and the network, and does the same
at the same time, so that each comes to the same decisions; the first one alone writes and speaks (``is_first``).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .noise import noise_keys
from .options import plain

Value = TypeVar("Value")
#: Seconds that a process has to end by itself once it is told to. One that waits on a GPU for a process which is gone
#: does not hear of a signal.
GRACE = 20.0
_ENDED = "atlas/ended"


class LostProcess(RuntimeError):
    """Another process has ended, so that this one cannot go on."""


def place() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def count() -> int:
    return place()[1]


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return place()[0] == 0


def unsaid(text: str) -> None:
    """Says nothing, in place of what the first process says."""


def of_first(make: Callable[[], Value]) -> Value:
    """What ``make`` gives in the first process, in all of them; an exception that it raises there is raised in all."""
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    made: Value = outcome[0]
    return made


def agreed(value: Value) -> Value:
    """The first process's value."""
    return of_first(lambda: value)


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def require_same(what: str, value: Any) -> None:
    """Raises ValueError in all processes where one has another value, and says which and how it differs."""
    first, *others = gathered(value)
    for rank, other in enumerate(others, 1):
        if other != first:
            there, here = _difference(other, first)
            raise ValueError(
                f"process {rank} of {1 + len(others)} has other {what} than process 0: {there}, not {here}. All must "
                "be started with the same settings, on the same files"
            )


def _difference(a: Any, b: Any) -> tuple[str, str]:
    """Two values that differ, where they are mappings in what differs alone."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        a, b = ({name: value.get(name) for name in names} for value in (a, b))
    return plain(a), plain(b)


@torch.no_grad()
def make_alike(model: nn.Module) -> None:
    """Gives every process the weights and buffers of the first one."""
    if count() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dense = tensor.detach().contiguous()
            dist.broadcast(torch.view_as_real(dense) if dense.is_complex() else dense, src=0)
            tensor.copy_(dense)


def own_device(device: torch.device) -> torch.device:
    """Of the machine's GPUs the one of this process. Raises ValueError where there is none for it."""
    if count() == 1 or device.type != "cuda":
        return device
    here, gpus = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(f"device: {device} cannot be that of {count()} processes: write cuda, and each takes its own")
    if here >= gpus:
        raise ValueError(
            f"device: process {here} of this machine has no GPU of its own, for torch sees {gpus}: start at most that "
            "many (--nproc-per-node), or take the CPUs (--device cpu)"
        )
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def seed_others(seed: int, step: int) -> None:
    """Seeds torch's generators in all processes but the first, whose state is what checkpoints keep. Else dropout would
    leave out the same of every process's samples."""
    if rank := place()[0]:
        torch.manual_seed(int(noise_keys(seed, step, 1)[0, 0]) % 2**62 + rank)


@contextmanager
def joined() -> Iterator[None]:
    """In the group of the processes that torchrun has started, if it has started this one with others."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(min(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() - 1))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with _ending(), losses_said():
        yield
    dist.destroy_process_group()  # not after an exception, as the others may be elsewhere


def leave(status: int) -> None:
    """Ends the process after an error at once, if there are others: torch's own end may wait for one that is gone."""
    if status and count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def losses_said() -> Iterator[None]:
    """Where another process is gone, what torch raises becomes ``LostProcess``, which says why."""
    try:
        yield
    except LostProcess:
        raise
    except Exception as error:
        if not _is_of_connection(error):
            last_word(" ".join(str(error).split()) or type(error).__name__)
            raise
        rank, message = _ended_first(wait=2.0)
        who = f"process {rank} of {count()} ended: {message}"
        if not message:
            who = f"another of {count()} processes ended without a word (killed, or out of memory); torchrun says which"
        raise LostProcess(who) from error


def _is_of_connection(error: Exception) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    of_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)  # it has no type of its own
    return count() > 1 and (of_gloo or isinstance(error, kinds))


def last_word(message: str) -> bool:
    """Leaves for the others why this process ends. Whether it is to be printed: not what another has said already."""
    rank, said = _ended_first(message=message)
    return rank == place()[0] or said not in message


def _ended_first(message: str = "", wait: float = 0.0) -> tuple[int, str]:
    """The process that ended first, and its message; with ``message`` this one, if there is none before it."""
    if count() == 1:
        return 0, message
    try:
        store = dist.distributed_c10d._get_default_store()
        until = time.monotonic() + wait
        while not message and not store.check([_ENDED]):
            if time.monotonic() > until:
                return -1, ""
            time.sleep(0.05)
        own = json.dumps([place()[0], message])
        found: tuple[int, str] = tuple(json.loads(store.compare_set(_ENDED, "", own)))
        return found
    except (RuntimeError, ValueError):  # the store has gone with the process that had it
        return place()[0] if message else -1, message


@contextmanager
def _ending() -> Iterator[None]:
    """A signal that is to end the process does so within ``GRACE`` seconds, also where Python does not come to handle
    it. After the first Ctrl-C further ones, which torchrun sends besides the terminal, do nothing."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_end_late, args=(read,), daemon=True).start()
    before = signal.signal(signal.SIGINT, interrupt), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before[0])
        signal.set_wakeup_fd(before[1])
        os.close(write)


def _end_late(pipe: int) -> None:
    """Ends the process some time after a signal of those that end it."""
    while numbers := os.read(pipe, 1):
        if numbers[0] in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            time.sleep(GRACE)
            os._exit(128 + numbers[0])
