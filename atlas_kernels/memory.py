"""Host memory that a training loop frees and asks for again, kept instead of given back to the system in between.

glibc returns large freed blocks to the kernel at once. A network's activations are such blocks, so every pass asks for
the same pages again, and has them zeroed again; `benchmarks/choices.py` measures what that costs.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

# mallopt's parameters, from malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc's thresholds have grown to by themselves once blocks of 32 MiB and more were freed.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}

_lock, _depth = Lock(), 0


def can_keep_memory() -> bool:
    """Whether the process's allocator is glibc's, which ``keep_memory`` is for."""
    return platform.libc_ver()[0] == "glibc" and hasattr(ctypes.CDLL(None), "mallopt")


@contextmanager
def keep_memory() -> Iterator[None]:
    """Inside, freed host memory stays with the process, which then holds as much as it ever had in use at once, or
    a few blocks more where small ones that are in use lie between those that were freed.

    At the end the free memory is given back, and glibc behaves as it does in a process that has freed large blocks.
    It is a setting of the whole process, threads included; nested contexts count as one. With another allocator (macOS,
    Windows, musl, a preloaded jemalloc) nothing changes; see ``can_keep_memory``. Memory of a GPU is not concerned.
    """
    global _depth
    libc = ctypes.CDLL(None) if can_keep_memory() else None
    with _lock:
        _depth += 1
        if libc and _depth == 1:
            _set(libc, _KEPT)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if libc and _depth == 0:
                _set(libc, _USUAL)
                libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
