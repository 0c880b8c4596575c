"""The most memory that torch holds at once: in a call, and in training."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .machine import autocast
from .passes import step_on_copies
from .run import Run


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch holds at once in ``call()`` at most, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # Every allocation of the call and the end of each; the end of an older one is not reported.
    events = profile.profiler.kineto_results.events()
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Notes the peak of what is trained inside, on CUDA, where torch counts it anyway (from 0 on at the beginning)."""
    if run.device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(run.device)
    yield
    note(run)


def note(run: Run) -> None:
    """Notes the peak so far, on CUDA."""
    if run.device.type == "cuda":
        run.peak_memory = max(run.peak_memory, torch.cuda.max_memory_allocated(run.device))


def of_training(run: Run) -> int | None:
    """The most bytes that torch held at once while it trained: weights, the optimiser's memory, averages, what the
    method remembers, a batch and all that a step makes of it.

    On CUDA as ``watched`` has seen it, in the epochs of this run and of those that it goes on from. A CPU's allocator
    does not count, and the memory of the process is no measure, as it holds the libraries, the images and what earlier
    runs have left: there it is counted, for one step on copies. None where that cannot be had.
    """
    if run.device.type == "cuda":
        return run.peak_memory or None
    if (step := _of_step(run)) is None:
        return None
    networks = [run.model, *([run.average.holder] if run.average else [])]
    kept = [value for network in networks for value in (*network.parameters(), *network.buffers())]
    kept += [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return step + sum(value.nbytes for value in (*kept, *run.memory.values()))


def _of_step(run: Run) -> int | None:
    with step_on_copies(run) as made, autocast(run.config.train_precision, run.device), run.execution:
        enabled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        if made is None or enabled:  # of profilers there can be one in a process
            return None
        peak = max(peak_memory(step, run.device) for _, step in made.steps)
        return peak + sum(value.nbytes for value in made.batch)
