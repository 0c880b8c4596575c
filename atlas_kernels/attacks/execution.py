"""How attacks are run, as opposed to what they compute: a context around any code that attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .arguments import require_choice
from .graphs import Graphs
from .prepared import Preparations

if TYPE_CHECKING:
    from .objective import Model
    from .pgd import PGD, Batch

Result = TypeVar("Result")

#: By name, the dtype of the network's forwards and backwards; "keep" leaves autocast as it is found.
PRECISIONS = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class Execution:
    """Settings for every attack inside ``with Execution(...):``, those of drop-ins and training methods too.

    Make one and enter it around each step; it may own what it has prepared, which goes when it goes. Nested contexts:
    the inner one counts alone.

    Args:
        precision: of the network in the attack: "bf16" or "fp16" by autocast, "fp32" with autocast off, "keep" as
            found. Iterates, steps and projections stay in the dtype of the images whatever it is, so every adversary
            is in its ball exactly. In 16 bits weights are cast once per attack. "fp16" also runs in float32, a second
            time, those samples whose gradient it loses; on CUDA the host waits in every step to know (see
            ``float16.py``, also for CUDA graphs). "bf16" has the range of float32 and loses none.
        fold_batchnorm: in eval mode, run a convolution or linear layer and the BatchNorm that alone reads its output as
            one layer; equal to rounding. What folds is seen in one forward, made before the first attack on a network;
            where nothing does, or the network is compiled, a warning says so. A network that later runs another way
            raises RuntimeError; weights that change within an attack are heeded.
        cuda_graphs: record each kind of attack on CUDA tensors as one CUDA graph and replay that (see ``graphs.py``:
            what it remembers, what it costs in memory, and which attacks run as ever, with a warning that says why).

    Raises ValueError for an unknown choice.
    """

    precision: str = "keep"
    fold_batchnorm: bool = False
    cuda_graphs: bool = False
    graphs: Graphs | None = field(default=None, init=False, repr=False)
    _preparations: Preparations = field(default_factory=Preparations, init=False, repr=False)
    _tokens: list[Token[Execution]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, tuple(PRECISIONS))
        self.graphs = Graphs() if self.cuda_graphs else None

    def __enter__(self) -> Execution:
        self._tokens.append(_CURRENT.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._tokens.pop())

    def run(self, attack: PGD, loop: Callable[[PGD, Model, Batch], Result], model: Model, batch: Batch) -> Result:
        """``loop(attack, model, batch)``: the one door to the loops of ``PGD``."""
        if self.graphs is None:
            return loop(attack, model, batch)
        settings = tuple(getattr(self, f.name) for f in fields(self) if f.init)
        return self.graphs.run(attack, loop, model, batch, settings)

    @contextmanager
    def around(self, model: Callable[[Tensor], Tensor], device: torch.device) -> Iterator[None]:
        """What an attack on ``model``, its weights frozen and its modes set, runs in."""
        dtype = PRECISIONS[self.precision]
        with ExitStack() as stack:
            if dtype is not None:
                low = dtype != torch.float32
                stack.enter_context(torch.autocast(device.type, dtype if low else None, enabled=low))
            stack.enter_context(self._preparations.around(model, device, self.fold_batchnorm))
            yield


_CURRENT: ContextVar[Execution] = ContextVar("execution")
_DEFAULT = Execution()


def current_execution() -> Execution:
    """The innermost ``Execution`` entered, or the default one."""
    return _CURRENT.get(_DEFAULT)


def device_of(model: Callable[[Tensor], Tensor], key: Tensor | None) -> torch.device:
    """Where an attack on ``model`` runs."""
    if key is not None:
        return key.device
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device
