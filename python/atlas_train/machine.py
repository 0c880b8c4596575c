"""The machine that a network runs on: its device, its CPU threads, and the numbers it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from atlas_kernels import keep_memory
from atlas_kernels.checks import whole

from .options import one_line, shown

#: CPU threads that anybody has; of a million torch ends the process.
MOST_THREADS = 1024


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda where there is one. Raises ValueError for a CUDA device that is not there."""
    known = "write cpu, cuda or cuda:N"
    try:
        device = torch.device(name.lower() if name else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:  # with a list of all that torch has a word for
        raise ValueError(f"device {shown(name)} cannot be used: {known}") from error
    try:
        if device.type != "cuda":
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {shown(name)} cannot be used ({one_line(error)}): {known}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {shown(name)} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> torch.autocast:
    """The network in "fp32" or "bf16". cache: whether a cast weight is kept for its next use."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache)


@contextmanager
def cudnn_benchmark(wanted: bool) -> Iterator[None]:
    """cuDNN chooses its algorithms by trying them, if ``wanted``, and then as before."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def on_host(threads: int | None) -> Iterator[None]:
    """torch with so many CPU threads (None: as it is) and with freed memory kept, and then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else whole("threads", threads, 1, MOST_THREADS))
    try:
        with keep_memory():
            yield
    finally:
        torch.set_num_threads(before)
