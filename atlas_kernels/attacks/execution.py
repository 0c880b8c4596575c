"""How attacks are run, as opposed to what they compute: a context around any code that attacks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import flag, require_choice
from ..precision import taken, warn_if_slow
from .batch import Batch
from .cast_weights import cast_once
from .contract import leave_no_trace
from .graphs import Graphs
from .held import at_the_end, modules_of
from .objective import Model

Result = TypeVar("Result")

#: By name, the dtype of the network's forwards and backwards; "keep" leaves autocast as it is found.
PRECISIONS = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"


@dataclass(eq=False)
class Execution:
    """Settings for every attack inside ``with Execution(...):``, those of drop-ins and training methods too.

    Make one and enter it around each step; it owns the graphs it has recorded, which go when it goes. Nested contexts:
    the inner one counts alone. It is in force in the thread or asyncio task that enters it; others may enter it too.

    Args:
        precision: of the network in the attack: "bf16" or "fp16" by autocast, "fp32" with autocast off, "keep" as
            found. Iterates, steps and projections stay in the dtype of the images whatever it is, so that an adversary
            keeps to its ball as well as that dtype can: to rounding in float32 and float64, while 16-bit images miss
            it by up to 6 % of eps (see ``perturb``). In 16 bits weights are cast once per attack. "fp16" also runs in
            float32, a second time, those samples whose gradient it loses; on CUDA the host waits in every step to know
            (see ``float16.py``, also for CUDA graphs). "bf16" has the range of float32 and loses none. "auto" is "bf16"
            where that is known to be faster, and "fp32" elsewhere; ``precision_on`` says which. A precision that is
            far slower than "fp32" on the device, such as "bf16" on a CPU without instructions for it, is warned of
            once.
        cuda_graphs: record each kind of attack on CUDA tensors as one CUDA graph and replay that (see ``graphs.py``:
            what it remembers, what it costs in memory, and which attacks run as ever, with a warning that says why).

    Raises ValueError for an unknown choice, TypeError for a switch that is neither True nor False.
    """

    precision: str = "keep"
    cuda_graphs: bool = False
    graphs: Graphs | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, (*PRECISIONS, AUTO))
        flag("cuda_graphs", self.cuda_graphs)
        self.graphs = Graphs() if self.cuda_graphs else None

    def __reduce__(self) -> tuple[type[Execution], tuple[object, ...]]:
        """For pickle and copy: the settings alone, since its graphs belong to the networks of here."""
        return type(self), self._settings()

    def _settings(self) -> tuple[object, ...]:
        return tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def __enter__(self) -> Execution:
        entered = _ENTERED.get()
        try:
            _ENTERED.set((*entered, self))
            return self
        except KeyboardInterrupt:
            _ENTERED.set(entered)
            raise

    def __exit__(self, *_: object) -> None:
        entered = _ENTERED.get()
        try:
            self._leave(entered)
        except KeyboardInterrupt:
            self._leave(entered)
            raise

    def _leave(self, entered: tuple[Execution, ...]) -> None:
        if self not in entered:
            raise RuntimeError(
                "this Execution is left in another thread or task than it was entered in, where it stays in force: "
                "write `with execution:` around the attacks themselves"
            )
        last = len(entered) - 1 - entered[::-1].index(self)  # not always the innermost: generators end in any order
        _ENTERED.set(entered[:last] + entered[last + 1 :])

    @contextmanager
    def around(self, model: Callable[[Tensor], Tensor], device: torch.device) -> Iterator[None]:
        """What an attack on ``model``, its weights frozen and its modes set, runs in."""
        with self._autocast(device), cast_once(model, device.type):
            yield

    def precision_on(self, device: torch.device | str) -> str:
        """The precision of attacks on that device: what "auto" comes to there."""
        return taken(self.precision, torch.device(device))

    @contextmanager
    def _autocast(self, where: torch.device) -> Iterator[None]:
        precision, device = taken(self.precision, where), where.type
        dtype = PRECISIONS[precision]
        if dtype is None:
            yield
            return
        warn_if_slow(precision, where)
        enabled, before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        steps = partial(torch.set_autocast_enabled, device, enabled), partial(torch.set_autocast_dtype, device, before)
        low = dtype != torch.float32
        with at_the_end(*steps), torch.autocast(device, dtype if low else None, enabled=low):
            yield


@contextmanager
def attacking(
    model: Callable[[Tensor], Any],
    attack_mode: str,
    key: Tensor | None,
    *,
    update_buffers: bool = False,
    device: torch.device | None = None,
) -> Iterator[None]:
    """What any attack runs in: ``leave_no_trace``, where the arguments are explained, and how the ``Execution`` around
    has the network run. device: where; default: that of the key, or of the network's first parameter."""
    with (
        leave_no_trace(model, attack_mode, key, update_buffers=update_buffers),
        current_execution().around(model, device or _device_of(model, key)),
    ):
        yield


def run(
    loop: Callable[[Model, Batch], Result],
    model: Model,
    batch: Batch,
    attack_mode: str,
    update_buffers: bool = False,
    *,
    constant: Callable[[], Hashable],
    no_graph: str | None = None,
) -> Result:
    """``loop(model, batch)`` while ``attacking``, by a CUDA graph where the ``Execution`` around asks for it.

    constant: gives what else than model and batch ``loop`` goes by, its name included: each value has a graph of its
    own. no_graph: why there can be none, if so.
    """

    def call(batch: Batch, again: bool = False) -> Result:
        with attacking(
            model,
            attack_mode,
            batch.key if batch.seeded else None,
            update_buffers=update_buffers and not again,
            device=batch.x.device,
        ):
            return loop(model, batch)

    execution = current_execution()
    if execution.graphs is None:
        return call(batch)
    kind = constant(), update_buffers, execution._settings()
    return execution.graphs.run(call, model, batch, kind, attack_mode, no_graph)


#: In this thread or task, the outermost first.
_ENTERED: ContextVar[tuple[Execution, ...]] = ContextVar("atlas_executions", default=())
_DEFAULT = Execution()


def current_execution() -> Execution:
    """The innermost ``Execution`` entered, or the default one."""
    entered = _ENTERED.get()
    return entered[-1] if entered else _DEFAULT


def _device_of(model: Callable[[Tensor], Tensor], key: Tensor | None) -> torch.device:
    """Where an attack on ``model``, or on the modules that a function calls, runs."""
    if key is not None:
        return key.device
    first = next((parameter for module in modules_of(model) for parameter in module.parameters()), None)
    return torch.device("cpu") if first is None else first.device
