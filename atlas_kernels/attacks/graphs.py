"""Whole attacks as CUDA graphs: each kind of call is recorded at its first use and replayed after.

A kind is: what the caller says is constant (an attack's settings), the model, the shapes, dtypes and strides of what is
given, the modes of the modules (for ``attack_mode="keep"``), autocast and backend. Images, labels, logits, start,
noise key, ids and per-sample or per-channel numbers are inputs of the graph; the noise is that of the call's own key.
Weights and buffers are read anew at every replay, so an optimiser that writes in place is seen; weights that are
replaced (``.to()``, ``load_state_dict(assign=True)``) are noticed, and recorded anew.

What Python does in the model happens at the recording only: an attribute that changes later is not seen, unless it is a
parameter or a buffer; nor are torch's global switches. Under a graph random layers draw from the device's generator,
which moves on: a replayed key repeats an attack's noise, but not its dropout masks.

A graph in float16 also says whether it lost a gradient (``float16.py``): the host waits for that, and where it did, the
attack runs as ever.

An ``Execution`` keeps ``LIMIT`` graphs per model, the last used ones, and they share one pool of memory: in the end the
largest attack's activations, held for as long as the graphs are. Graphs go with the model or the ``Execution``. All
attacks of one ``Execution`` belong on one stream; those of several threads take turns.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import chain
from threading import RLock
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends import forced_backend
from ..capture import Capture, CaptureFailed, Recorder, capturing, cuda_graph
from ..checks import class_indices
from .batch import Batch
from .objective import Model

Result = TypeVar("Result", covariant=True)

#: Graphs per model. A training makes two per attack (the last batch of an epoch may be smaller), an evaluation too.
LIMIT = 16
#: From LIMIT recordings on, at least so many calls for each: a recording costs three attacks and a pause.
CALLS_PER_RECORDING = 8
_TOO_MANY = (
    "too many of its calls are of a kind not seen before, each of which takes a recording; keep shapes and settings (a "
    "radius that changes: give it as a tensor [B]), keep the model, and write its weights in place"
)


class Call(Protocol[Result]):
    """An attack on a batch. again: it comes after a replay, which has moved BatchNorm's running statistics already."""

    def __call__(self, batch: Batch, again: bool = False) -> Result: ...


@dataclass(frozen=True)
class _Graph:
    capture: Capture[Any]
    classes: int | None


@dataclass
class _OfModel:
    """kinds: graphs, or why there is none. tensors: addresses, dtypes and shapes of weights and buffers at recording
    time, by which replaced ones are noticed. told: reasons that a warning has given."""

    kinds: dict[Hashable, _Graph | str] = field(default_factory=dict)
    tensors: list[Hashable] = field(default_factory=list)
    told: set[str] = field(default_factory=set)


class Graphs:
    """The graphs of one ``Execution``. ``recorder`` and ``device_type``: what records, on which devices."""

    def __init__(self, recorder: Recorder = cuda_graph, device_type: str = "cuda") -> None:
        self.recordings = self.calls = 0
        self._recorder, self._device_type = recorder, device_type
        self._lock = RLock()  # the inputs and outputs of a graph are there once
        self._models: WeakKeyDictionary[nn.Module, _OfModel] = WeakKeyDictionary()
        self._functions = _OfModel()

    def run(
        self, call: Call[Result], model: Model, batch: Batch, constant: Hashable, attack_mode: str, no_graph: str | None
    ) -> Result:
        """``call(batch)``, an attack on ``model``, by a graph where one can be had.

        constant: what else than these ``call`` goes by. no_graph: why there can be none, if so.
        """
        if not len(batch.x) or capturing(batch.x.is_cuda):
            return call(batch)
        with self._lock:
            self.calls += 1
            found = no_graph or self._find(call, model, batch, constant, attack_mode)
            if isinstance(found, _Graph):
                if batch.goal.labels is not None and found.classes is not None:
                    class_indices("y", batch.goal.labels, batch.x, found.classes, attack=True)
                made: Result
                made, lost = found.capture(*batch.tensors())
                if lost is None or not bool(lost):
                    return made
            else:
                self._say_once(model, found)
        return call(batch, again=isinstance(found, _Graph))

    def _find(self, call: Call[Any], model: Model, batch: Batch, constant: Hashable, attack_mode: str) -> _Graph | str:
        """The graph for this call, made if need be, or why there is none."""
        if batch.x.device.type != self._device_type:
            return f"x is on {batch.x.device}; put model and images on a CUDA device, or leave cuda_graphs out"
        if not isinstance(model, nn.Module):
            return f"the weights of a {type(model).__name__} cannot be found; pass the torch.nn.Module itself"
        state = _state(model)
        if state is None:
            return f"{type(model).__name__} has hooks, which a replay would not call; remove them"
        of, (modes, tensors) = self._models.setdefault(model, _OfModel()), state
        if of.tensors != tensors:
            of.kinds.clear()
            of.tensors = tensors
        kind = constant, attack_mode, modes if attack_mode == "keep" else None, *_kind(batch)
        try:
            hash(kind)
        except TypeError as error:
            return f"what the attack is made of must not change unseen ({error}): give a tuple instead of a list"
        if kind in of.kinds:
            found = of.kinds.pop(kind)
        elif self.recordings >= LIMIT and self.recordings * CALLS_PER_RECORDING > self.calls:
            return _TOO_MANY
        else:
            found = self._record(call, model, batch)
        of.kinds[kind] = found  # the last used one is the last
        if len(of.kinds) > LIMIT:
            del of.kinds[next(iter(of.kinds))]
        return found

    def _record(self, call: Call[Any], model: nn.Module, batch: Batch) -> _Graph | str:
        self.recordings += 1
        classes: int | None = None

        def recorded(*tensors: Tensor) -> Any:
            nonlocal classes
            held = batch.holding(tensors)
            held.goal.watched = True
            result = call(held)
            classes = held.goal.classes
            return result, held.goal.lost

        share = next(self._captures(batch.x.device), None)
        try:
            # The buffers: where update_buffers lets BatchNorm's move, one call is to move them once.
            capture = Capture(recorded, batch.tensors(), restore=model.buffers(), share=share, recorder=self._recorder)
        except CaptureFailed as error:
            return f"{type(model).__name__}: {error}"
        return _Graph(capture, classes)

    def _captures(self, device: torch.device) -> Any:
        graphs = chain.from_iterable(of.kinds.values() for of in self._models.values())
        return (g.capture for g in graphs if isinstance(g, _Graph) and g.capture.inputs[0].device == device)

    def _say_once(self, model: Model, reason: str) -> None:
        of = self._models.setdefault(model, _OfModel()) if isinstance(model, nn.Module) else self._functions
        if reason not in of.told:
            of.told.add(reason)
            warnings.warn(f"cuda_graphs: an attack runs without: {reason}", stacklevel=8)


def _kind(batch: Batch) -> tuple[Hashable, ...]:
    """What is constant in a graph for such a batch, the model and what is done with it apart."""
    device = batch.x.device
    given = ((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in batch.values())
    return (
        device, *given, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type), forced_backend()
    )  # fmt: skip


def _state(model: nn.Module) -> tuple[tuple[bool, ...], list[Hashable]] | None:
    """The modes of the modules, and where and what their tensors are; None if any has hooks."""
    modes: list[bool] = []
    tensors: list[Hashable] = []
    for m in model.modules():
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return None
        modes.append(getattr(m, "training", False))  # a frozen script has none
        for t in chain(m._parameters.values(), m._buffers.values()):
            if t is not None:
                tensors.append((t.data_ptr(), t.dtype, t.shape, t.stride()))
    return tuple(modes), tensors
