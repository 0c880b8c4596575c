"""A call on a CUDA device, recorded as one graph: what Python and the launches cost is paid once, not at every call.

A graph repeats the recorded kernels on the recorded addresses. What Python computes in the call (numbers, branches,
shapes) is a constant of it; what the kernels read (inputs, weights, buffers) is read anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Outputs = TypeVar("Outputs")

_recording: ContextVar[bool] = ContextVar("atlas_recording", default=False)


class CaptureFailed(RuntimeError):
    """A call cannot be recorded as a graph; the message says why and what to do. The device can be used on."""


def capturing(cuda: bool = True) -> bool:
    """Whether what runs now is recorded, or rehearsed for it: then nothing may look at a value on the device."""
    return _recording.get() or (cuda and torch.cuda.is_current_stream_capturing())


@contextmanager
def recording() -> Iterator[None]:
    """For recorders: inside, ``capturing`` is true, and what goes wrong is a ``CaptureFailed``."""
    token = _recording.set(True)
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CaptureFailed(
            f"no CUDA graph can be made of it ({type(error).__name__}: {reason}). Inside a graph nothing may wait for "
            "the device: no .item(), .cpu() or print of a tensor, no if on a tensor's value, no nonzero or bool mask, "
            "no tensor made from Python numbers (register a buffer instead), no other random generator than the default"
        ) from error
    finally:
        # A weight that was cast before the graph is not read anew in it; one cast in it holds nothing until it runs.
        torch.clear_autocast_cache()
        _recording.reset(token)


@dataclass(frozen=True)
class Recording:
    """What a recorder makes. ``replay`` overwrites ``outputs`` in place; ``pool`` is the memory pool of the graph."""

    outputs: Any
    replay: Callable[[], None]
    pool: Any = None


class Recorder(Protocol):
    """Runs ``call`` ``warmup`` times, the last time as a rehearsal under the rules of a recording, and records it."""

    def __call__(self, call: Callable[[], Any], device: torch.device, *, warmup: int, pool: Any) -> Recording: ...


def cuda_graph(call: Callable[[], Any], device: torch.device, *, warmup: int, pool: Any = None) -> Recording:
    """The recorder of CUDA devices: ``torch.cuda.graph`` on a stream of its own, one per device.

    Libraries make handles and workspaces per stream, so the runs before are on that stream too. The rehearsal, in which
    torch raises where it would wait for the device, is there because a capture that such a call breaks leaves torch's
    allocator and random generator behind in disorder; nothing has begun when the rehearsal fails.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph, main, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    try:
        with torch.cuda.device(device), torch.cuda.stream(side):
            for _ in range(warmup - 1):
                call()
            with recording(), _waiting_forbidden():
                call()
            with recording():
                outputs = _captured(call, graph, pool, side)
    finally:
        main.wait_stream(side)
    return Recording(outputs, graph.replay, pool)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _captured(call: Callable[[], Any], graph: torch.cuda.CUDAGraph, pool: Any, side: torch.cuda.Stream) -> Any:
    """The outputs of ``call``, captured; what breaks the capture is raised, not what ending a broken one says."""
    cause: Exception | None = None
    try:
        # thread_local: a data loader's thread that pins memory meanwhile does no harm.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            try:
                return call()
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        _clean_up(pool, side)
        raise cause or error from None


def _clean_up(pool: Any, side: torch.cuda.Stream) -> None:
    """After a capture that broke: torch leaves its allocator and its generator in the belief that it goes on."""
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(side.device_index, pool)
        torch._C._cuda_releasePool(side.device_index, pool)
    mend = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local")
    with suppress(RuntimeError), mend:
        torch.zeros(1, device=side.device)  # a capture that ends well sets the generator right


class Capture(Generic[Outputs]):
    """``call(*inputs)``, recorded here as one graph; called with other inputs of the same kind, it replays that.

    ``call`` takes the tensors and gives a tensor, or tuples, named tuples or dicts of tensors and what else there is
    (which is a constant). It runs ``warmup`` times before, for real, so that libraries are initialised: the first runs
    are ordinary ones, whose errors are the call's own; the last is a rehearsal. Those runs leave the random state as it
    was, and the values of ``restore``.

    Random numbers from the device's default generator are new at every replay. Hooks and whatever else Python does
    happen at the recording only. The graph keeps the memory that one run needs at most, next to that of eager code.

    Args:
        call: what to record. It, and all that it reads, is held by nobody afterwards: keep the weights alive.
        inputs: tensors on one device; their shapes, dtypes and strides are those of the graph.
        warmup: runs before the recording, 1 or more.
        restore: tensors that ``call`` writes, put back after these runs: parameters, buffers, the optimiser's state.
        share: another capture of this device, whose memory pool this one uses too.
        recorder: ``cuda_graph``, or in tests what stands in for it.

    All calls of captures that share a pool, on one stream, one after the other. Raises CaptureFailed where a capture
    forbids what ``call`` does; what it raises in an ordinary run passes.
    """

    def __init__(
        self,
        call: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        *,
        warmup: int = 2,
        restore: Iterable[Tensor] = (),
        share: Capture[Any] | None = None,
        recorder: Recorder = cuda_graph,
    ) -> None:
        if not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup must be an integer of at least 1, the rehearsal, got {warmup!r}")
        device = inputs[0].device
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = tuple(torch.empty_like(t).copy_(t) for t in inputs)
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []), _put_back(restore):
            made = recorder(
                lambda: call(*self.inputs), device, warmup=warmup, pool=None if share is None else share.pool
            )
        self.pool: Any = made.pool
        self._replay = made.replay
        # Without what autograd saved, whose memory a capture that shares the pool may have.
        self._outputs: Outputs = tree_map_only(Tensor, Tensor.detach, made.outputs)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """What ``call`` makes of ``inputs``, in tensors of the caller's own; raises ValueError for another kind."""
        with torch.inference_mode(False), torch.no_grad():
            for i, (mine, given) in enumerate(zip(self.inputs, inputs, strict=True)):
                if given.shape != mine.shape or given.dtype != mine.dtype or given.device != mine.device:
                    raise ValueError(
                        f"input {i} is {given.dtype} {list(given.shape)} on {given.device}, but the graph was captured "
                        f"for {mine.dtype} {list(mine.shape)} on {mine.device}: make another Capture"
                    )
                mine.copy_(given)
            self._replay()
            return tree_map_only(Tensor, Tensor.clone, self._outputs)


@contextmanager
def _put_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    before = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
