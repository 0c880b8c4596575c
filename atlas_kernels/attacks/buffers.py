"""Buffers of a network that a forward must not move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def copied_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules work on copies of their buffers (BatchNorm statistics); the originals are not written to."""
    # remove_duplicate=False: one module may know the same buffer under two names.
    buffers = [(m, *named) for m in modules for named in m.named_buffers(recurse=False, remove_duplicate=False)]
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}  # a buffer that two modules share stays shared
    try:
        for module, name, buffer in buffers:
            setattr(module, name, copies[id(buffer)])
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
