"""The processes that torchrun starts, or a launcher that sets the same variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """Which of them this one is; 0 where it is alone."""
    return int(os.environ["RANK"]) if _several() else 0


@contextmanager
def launched() -> Iterator[int]:
    """Their process group, while it lasts; gives how many they are, 1 where it is alone.

    It is of gloo on GPUs too, as what they tell each other lies on their CPUs.
    """
    if dist.is_available() and dist.is_initialized():
        yield dist.get_world_size()
        return
    if not _several():
        yield 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def own_device(name: str | None) -> str | None:
    """The device that is meant, where each process of a machine has a GPU of its own."""
    if _several() and name in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return name


def _several() -> bool:
    return all(name in os.environ for name in _SET) and os.environ["WORLD_SIZE"] != "1"
