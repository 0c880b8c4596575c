"""A stand-in for a CUDA graph that needs no GPU: records the operators a call dispatches and runs them again.

What Python computed meanwhile is frozen, as in a graph: an operator gets the very tensors and numbers of the recording,
and its results go into the very same memory. Like a capture, the recording computes nothing that lasts: what it wrote
in memory from before is put back, and its own results are poisoned until the first replay. What a capture forbids, to
wait for the device or to make a tensor from Python numbers, raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlas_kernels.capture import Recording, recording

#: Operators that read values on the device, or copy numbers from the host.
FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::unique_dim",
    "aten::masked_select", "aten::_unique2", "aten::repeat_interleave", "aten::lift_fresh", "aten::bincount",
}  # fmt: skip
_WRITES_UNANNOUNCED = {"aten::native_batch_norm": (3, 4), "aten::_batch_norm_impl_index": (3, 4)}


class NotPermitted(RuntimeError):
    """As CUDA says it."""


def recorded(call: Callable[[], Any], device: torch.device, *, warmup: int, pool: Any = None) -> Recording:
    """A recorder for ``Capture`` on any device."""
    for _ in range(warmup - 1):
        call()
    with recording(), _Strict():
        call()
    tape = _Tape()
    with recording(), tape:
        outputs = call()
    tape.forget()
    return Recording(outputs, tape.replay, pool or tape)


class _Strict(TorchDispatchMode):
    """Raises where a capture would."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as such inside, as it does in a capture; else torch would leave it out for good."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masked = name.startswith("aten::index") and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if name in FORBIDDEN or masked:
            raise NotPermitted(f"operation not permitted when stream is capturing: {name}")
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class _Tape(_Strict):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Sequence[Any], dict[str, Any], list[Tensor]]] = []
        self.made: set[int] = set()  # storages of the recording's own
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what it wrote elsewhere

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        for t in _written(func, args, kwargs):
            storage = _storage(t)
            if storage not in self.made and storage not in self.before:
                whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                self.before[storage] = whole, whole.clone()
        result = func(*args, **kwargs)
        outs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.made.update({_storage(t) for t in outs} - given)
        self.operators.append((func, args, kwargs, outs))
        return result

    def forget(self) -> None:
        """The recording is over: nothing was computed."""
        for _, _, _, outs in self.operators:
            for t in outs:
                if _storage(t) in self.made:
                    t.detach().fill_(torch.nan if t.is_floating_point() else 1)
        for whole, value in self.before.values():
            whole.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outs in self.operators:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for mine, new in zip(outs, again, strict=True):
                    if _storage(mine) != _storage(new):
                        mine.detach().copy_(new)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments an operator writes into."""
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    out = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    out += [args[i] for i in _WRITES_UNANNOUNCED.get(func._schema.name, ())]
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]
