"""A whole training step as one CUDA graph: attack, loss, backward, update and metrics, replayed for every batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from atlas_kernels.capture import Capture, CaptureFailed, Recorder, cuda_graph

from .methods import Batch, Descent, Method, Metrics, State
from .updates import Updates

Outcome = tuple[Tensor, Metrics]


class Schedule(Descent, Protocol):
    """What a graph needs of the engine's ``OptimizerSteps``."""

    def start(self, batch: Batch) -> None:
        """Begins a batch: no gradients, no updates yet."""

    def rate(self) -> float:
        """The learning rate of the batch's next update."""

    def look_at(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Has the loss of the batch checked."""


class StepGraph:
    """``method.train_step``, recorded once for each shape of batches and phase of the method, then replayed.

    The first batch of a kind is trained on eagerly. It makes what lasts (the optimiser's state, the method's memory,
    compiled code) outside of the graph's memory, and has its values checked, which a graph does not. A recording trains
    nothing: weights, statistics, memory and random state are as before it.

    The weights are those of eager steps, but for this: on CUDA, Adam rounds one product otherwise (see ``Updates``);
    under autocast each use of a weight casts it anew, so that their gradients add up in float32; and random layers in
    attacks that run in train mode draw from the device's generator, not by the step's key. Hooks of the network run in
    recordings alone. The average of the weights and the look at the loss stay outside.

    Args:
        method: what trains.
        optimizer: SGD or Adam, of the weights and with the state that an eager step moves.
        say: told once if a step cannot be recorded; all further ones are then eager.
        recorder: ``cuda_graph``, or in tests what stands in for it.

    Raises ValueError for a method or an optimiser of which no graph can be made.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
        recorder: Recorder = cuda_graph,
    ) -> None:
        require_recordable(method)
        self._method, self._say, self._recorder = method, say, recorder
        self._updates = Updates(optimizer)
        self._phase: Hashable = None
        self._captures: dict[Hashable, Capture[Outcome] | None] = {}  # None: seen once, not yet recorded
        self._works = True

    def __call__(self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: Schedule) -> Outcome:
        """As ``method.train_step``, for the same network at every call."""
        method, phase = self._method, self._method.phase(state)
        here = phase, *map(id, state.memory.values())
        if here != self._phase:
            self._captures.clear()  # a phase that is over does not come back, nor does memory that was replaced
            self._phase = here
        kind = tuple((t.shape, t.stride(), t.dtype) for t in batch)
        if phase is None or not self._works or kind not in self._captures:
            self._captures[kind] = None
            return method.train_step(model, batch, key, state, descent)
        try:
            numbers = self._updates.numbers([descent.rate() for _ in range(method.updates)])
            inputs = (*batch, key, numbers.to(key.device, non_blocking=True))
            capture = self._captures[kind] = self._captures[kind] or self._record(model, state, inputs)
        except CaptureFailed as failure:
            self._works = False
            self._say(f"cuda_graphs='step' cannot be had here, and the run goes on without: {failure}")
            descent.start(batch)
            return method.train_step(model, batch, key, state, descent)
        loss, metrics = capture(*inputs)
        self._updates.count(len(numbers))
        descent.look_at(loss, metrics)
        return loss, metrics

    def _record(self, model: nn.Module, state: State, inputs: tuple[Tensor, ...]) -> Capture[Outcome]:
        def step(x: Tensor, y: Tensor, ids: Tensor, key: Tensor, numbers: Tensor) -> Outcome:
            device = x.device.type
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            # No cache: a cast weight that it kept would be the graph's memory in eager code, or the other way round.
            with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
                return self._method.train_step(model, Batch(x, y, ids), key, state, _Recorded(self._updates, numbers))

        written = [*model.parameters(), *model.buffers(), *self._updates.state, *state.memory.values()]
        shared = next(filter(None, self._captures.values()), None)
        # One run before, the rehearsal: the step before was an ordinary one.
        return Capture(step, inputs, warmup=1, restore=written, share=shared, recorder=self._recorder)


class _Recorded:
    """The ``Descent`` of a recording.

    Gradients are made and freed inside the graph, in memory that they share with the rest of the step; static ones
    would hold theirs all the time, and cost kernels that zero them and add to them.
    """

    def __init__(self, updates: Updates, numbers: Tensor) -> None:
        self._updates, self._numbers = updates, list(numbers.unbind())

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor] | None = None) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()

    def step(self) -> None:
        self._updates.step(self._numbers.pop(0))


def require_recordable(method: Method, on_nonfinite: str = "stop") -> None:
    """Raises ValueError for settings with which a step cannot be one graph, naming what to do."""
    if method.no_graph:
        raise ValueError(f"cuda_graphs='step' cannot be had with {method.no_graph}; set cuda_graphs='attack'")
    if on_nonfinite == "skip":
        raise ValueError(
            "on_nonfinite='skip' looks at every loss before the update, which a graph of the whole step cannot: set "
            "on_nonfinite='stop', or cuda_graphs='attack'"
        )
