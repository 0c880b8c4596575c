"""A whole training step as one CUDA graph: attack, loss, backward, update and metrics, replayed for every batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor, nn

from atlas_kernels.capture import Capture, CaptureFailed, Recorder, capturing, cuda_graph

from .descent import OptimizerDescent
from .methods import Batch, Method, Metrics, State
from .methods.base import on_device
from .remembered import unchanged

Outcome = tuple[Tensor, Metrics]
#: Settings of an optimiser that schedules move.
_HELD = ("momentum", "betas", "weight_decay")


class StepGraph:
    """``method.step``; its ``train_step`` is recorded once for each shape of batches, phase and variant of the method,
    then replayed.

    A momentum (betas, weight decay) that changed makes a new phase, as the optimiser's kernels take it from the host.

    The first batch of a kind is trained on eagerly. It makes what lasts (the optimiser's state, the method's memory,
    compiled code) outside of the graph's memory, and has its values checked, which a graph does not. A recording trains
    nothing: weights, statistics, memory and random state are as before it.

    The weights are those of eager steps, but for this: under autocast each use of a weight casts it anew, so that their
    gradients add up in float32; and random layers in attacks that run in train mode draw from the device's generator,
    not by the step's key. Hooks of the network run in recordings alone. The average of the weights and the look at the
    loss stay outside.

    Gradients are made and freed inside the graph, in memory that they share with the rest of the step; static ones
    would hold theirs all the time, and cost kernels that zero them and add to them.

    Args:
        method: what trains.
        optimizer: of the weights, with the state that an eager step moves. It reads its learning rate on the device:
            torch's fused SGD and Adam do.
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
        require_recordable(method, optimizer)
        self._method, self._say, self._recorder, self._optimizer = method, say, recorder, optimizer
        optimizer.register_step_pre_hook(_require_state)
        self._phase: Hashable = None
        self._memory: dict[str, Tensor] = {}
        self._captures: dict[Hashable, Capture[Outcome] | None] = {}  # None: seen once, not yet recorded
        self._works = True

    def __call__(self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: OptimizerDescent) -> Outcome:
        """As ``method.step``, for the same network at every call."""
        method = self._method
        with _uncached(batch.x.device.type):
            method.before_step(model, batch, key, state)
        self._settle(state.memory)
        phase = method.phase(state)
        here = phase, *self._settings(), *map(id, state.memory.values())
        if here != self._phase:
            self._captures.clear()  # a phase that is over does not come back, nor does memory of another kind
            self._phase = here
        kind = method.variant(state), *map(_kind, batch)
        if phase is None or not self._works or kind not in self._captures:
            outcome = self._step(model, batch, key, state, descent)
            self._captures[kind] = None
            return outcome
        rates = [descent.rate(update) for update in range(method.updates)]
        try:
            inputs = (*batch, key, on_device([*rates, *method.changing(state)], key.device))
            capture = self._captures[kind] = self._captures[kind] or self._record(model, state, inputs)
        except CaptureFailed as failure:
            self._works = False
            self._say(f"cuda_graphs='step' cannot be had here, and the run goes on without: {failure}")
            self._optimizer.zero_grad(set_to_none=True)
            return self._step(model, batch, key, state, descent)
        loss, metrics = capture(*inputs)
        for group in self._optimizer.param_groups:
            group["lr"] = rates[-1]
        descent.look(loss, metrics)
        return loss, metrics

    def _settle(self, memory: dict[str, Tensor]) -> None:
        """Memory that was made anew moves into the tensors that the graphs know, if it is of their kind."""
        for name, value in memory.items():
            known = self._memory.get(name)
            if known is not None and known is not value and _kind(known) == _kind(value):
                memory[name] = known.copy_(value)
        self._memory = dict(memory)

    def _settings(self) -> list[Hashable]:
        """What the optimiser's kernels take from the host, so that a graph has it for good: all but the rate."""
        return [group.get(name) for group in self._optimizer.param_groups for name in _HELD]

    def _step(self, model: nn.Module, batch: Batch, key: Tensor, state: State, descent: OptimizerDescent) -> Outcome:
        """One step of the method, recorded or not."""
        with _uncached(batch.x.device.type):
            return self._method.train_step(model, batch, key, state, descent)

    def _record(self, model: nn.Module, state: State, inputs: tuple[Tensor, ...]) -> Capture[Outcome]:
        def step(x: Tensor, y: Tensor, ids: Tensor, key: Tensor, numbers: Tensor) -> Outcome:
            rates, changing = numbers.tensor_split([self._method.updates])
            descent = OptimizerDescent(self._optimizer, rates.unbind().__getitem__)
            return self._step(model, Batch(x, y, ids), key, replace(state, numbers=changing), descent)

        moved = [value for kept in self._optimizer.state.values() for value in kept.values()]
        written = [*model.parameters(), *model.buffers(), *moved]
        shared = next(filter(None, self._captures.values()), None)
        with unchanged(self._method, state.memory, inputs[2]):
            # One run before, the rehearsal: the step before was an ordinary one.
            return Capture(step, inputs, warmup=1, restore=written, share=shared, recorder=self._recorder)


def _kind(t: Tensor) -> Hashable:
    return t.shape, t.stride(), t.dtype, t.device


def _uncached(device: str) -> torch.autocast:
    """Autocast as it is, but without its cache.

    A cast weight that the cache kept would be the graph's memory in eager code, or the other way round. Steps that are
    not recorded do without it too, as ``torch.compile`` compiles for one setting of it.
    """
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)


def _require_state(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """State that is made while a graph is recorded would begin anew at every replay."""
    if capturing(cuda=False) and optimizer.state:
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        if not all(optimizer.state.get(weight) for weight in weights):
            raise RuntimeError("the optimiser moves a weight for the first time")


def require_recordable(method: Method, optimizer: torch.optim.Optimizer, on_nonfinite: str = "stop") -> None:
    """Raises ValueError for settings with which a step cannot be one graph, naming what to do."""
    if method.no_graph:
        raise ValueError(f"cuda_graphs='step' cannot be had with {method.no_graph}; set cuda_graphs='attack'")
    if on_nonfinite == "skip":
        raise ValueError(
            "on_nonfinite='skip' looks at every loss before the update, which a graph of the whole step cannot: set "
            "on_nonfinite='stop', or cuda_graphs='attack'"
        )
    if not all(group.get("fused") and group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(
            f"cuda_graphs='step' needs an optimiser that reads its learning rate on the device, and this "
            f"{type(optimizer).__name__} is not fused: torch's fused SGD and Adam take weights of real numbers that "
            "are dense in memory; change the others, or set cuda_graphs='attack'"
        )
