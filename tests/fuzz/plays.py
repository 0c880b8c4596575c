"""What is done with a drawn call: run it, give it outputs, let them overlap inputs, spoil it, go past its checks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_kernels as ak
from operator_cases import same_within_ulps

from .calls import draw_call
from .draws import Draw
from .judges import bits, parts
from .memory import Watch, is_plain, overlapping, same_memory

REFUSED = (TypeError, ValueError)
REFUSED_RAW = (TypeError, ValueError, RuntimeError, IndexError)


def legal(draw: Draw) -> str | None:
    """The result is right, and nothing else changed."""
    call, watch = draw_call(draw), Watch()
    for name, value in call.arguments.items():
        watch.keep(name, value)
    result = call()
    return "; ".join(filter(None, [call.judge(result, call), *watch.complaints()])) or None


def into_outputs(draw: Draw) -> str | None:
    """``out=`` and ``cast=`` get what would be returned, and not a byte around them is written."""
    call, watch = draw_call(draw), Watch()
    if not call.outputs:
        return legal(draw)
    for name, value in call.arguments.items():
        watch.keep(name, value)
    chosen = {name: watch.output(draw, name, _writable(like)) for name, like in call.outputs.items()}
    expected = _wide(call)
    result = call(**chosen)
    wrong = watch.complaints()
    if result is not chosen["out"]:
        wrong.append("what is returned is not out")
    for name, out in chosen.items():
        if not _same(call, out, expected.to(out.dtype)):
            wrong.append(f"{name} has {_count(out, expected.to(out.dtype))} other values than a new tensor")
    return "; ".join(wrong) or None


def into_overlap(draw: Draw) -> str | None:
    """An output that shares memory with an argument is refused, or gets the right values."""
    call = draw_call(draw)
    shared = [name for name, value in call.arguments.items() if isinstance(value, Tensor) and value.numel()]
    if not call.outputs or not shared:
        return legal(draw)
    name, target = draw.one_of(shared), draw.one_of(list(call.outputs))
    out, argument = overlapping(draw, _writable(call.outputs[target]), call.arguments[name])
    expected = _wide(call, **{name: argument.clone()}).to(out.dtype)
    try:
        call(**{name: argument, target: out})
    except REFUSED as error:
        return None if str(error) else "refused without a word"
    return None if _same(call, out, expected) else f"{target} overlaps {name}: {_count(out, expected)} values are wrong"


def spoiled(draw: Draw) -> str | None:
    """One argument is garbage: refused by name, or both backends make the same of it."""
    call = draw_call(draw)
    name = draw.one_of([name for name in call.arguments if name != "key"])  # None is a fresh one
    garbage = _garbage(draw, call.arguments[name])
    try:
        result = call(**{name: garbage})
    except REFUSED as error:
        return None if str(error) else f"{name}={garbage!r} is refused without a word"
    except RuntimeError:  # PyTorch's own, of a tensor without numbers in memory
        if isinstance(garbage, Tensor) and not is_plain(garbage):
            return None
        raise
    if any(t.is_meta for t in parts(result)):
        return None
    try:
        return call.judge(result, call, **{name: garbage})
    except REFUSED as error:
        return f"{name}={garbage!r} is taken, but not by the reference: {error}"


def _same(call: Any, a: Tensor, b: Tensor) -> bool:
    """In l2 and l1 the memory format may change the order of a sum, and so the last bit in float64."""
    return same_memory(a, b) if call.judge is bits else same_within_ulps(a, b, b.nan_to_num(0, 0, 0))


def _wide(call: Any, **changed: Any) -> Any:
    """The result for 16-bit images in float32, so that an output of any dtype is rounded once."""
    given = {**call.arguments, **changed}
    images = {name: given[name] for name in ("adv", "old", "x", "v") if name in given}
    return call(**{**changed, **{name: t.float() for name, t in images.items() if t.element_size() == 2}})


class _Recorder(TorchDispatchMode):
    """The raw operators that a public function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "atlas_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def raw(draw: Draw) -> str | None:
    """A raw operator with an argument exchanged: an exception, or what the reference makes of it; never a crash."""
    call, watch = draw_call(draw), Watch()
    with _Recorder() as recorder:
        call()
    if not recorder.calls:
        return None
    operator, args = draw.one_of(recorder.calls)
    schema = operator._schema.arguments
    written = [i for i, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write]
    changed = _exchanged(draw, args)
    for i in written:
        if is_plain(changed[i]) and changed[i].is_contiguous() and draw.chance(0.7):
            changed[i] = watch.output(draw, schema[i].name, changed[i])
    for i, value in enumerate(changed):
        if i not in written and not any(value is changed[j] for j in written):
            watch.keep(schema[i].name, value)
    again = [value.clone() if is_plain(value) else value for value in changed]
    try:
        operator(*changed)
    except REFUSED_RAW as error:
        return "; ".join(watch.complaints()) or (None if str(error) else "refused without a word")
    wrong = watch.complaints()
    norms = [value for argument, value in zip(schema, changed, strict=True) if argument.name == "norm"]
    if call.judge is bits and not any(norms) and not _share_memory(changed):
        wrong += _other_than_reference(operator, written, changed, again)
    return "; ".join(wrong) or None


def _exchanged(draw: Draw, args: tuple[Any, ...]) -> list[Any]:
    changed = list(args)
    for _ in range(draw.integer(1, 2)):
        i = draw.integer(0, len(changed) - 1)
        changed[i] = _raw_garbage(draw, changed[i], changed)
    return changed


def _other_than_reference(operator: Any, written: list[int], args: list[Any], again: list[Any]) -> list[str]:
    """Which written arguments have other bits than those that the reference writes; it may refuse more."""
    try:
        with ak.backend("reference"):
            operator(*again)
    except REFUSED_RAW:
        return []
    pairs = [(operator._schema.arguments[i].name, args[i], again[i]) for i in written if type(args[i]) is Tensor]
    return [f"{name} has {_count(a, b)} other values" for name, a, b in pairs if not same_memory(a, b)]


def _writable(like: Tensor) -> Tensor:
    """A tensor as ``like``, in a memory format that results may have."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return like
    return like.contiguous()


def _share_memory(values: list[Any]) -> bool:
    places = [v.untyped_storage().data_ptr() for v in values if is_plain(v)]
    return len(set(places)) < len(places)


def _count(a: Tensor, b: Tensor) -> int:
    if a.shape != b.shape:
        return a.numel()
    return int((~((a == b) | (a.isnan() & b.isnan()))).sum())


_NUMBERS = (
    0,
    1,
    -1,
    3,
    2**31,
    2**63 - 1,
    2**70,
    -(2**63),
    0.5,
    -0.5,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
)
_THINGS: tuple[Any, ...] = (
    None,
    "0",
    "",
    b"1",
    [],
    [0.1],
    (1, 2, 3),
    {},
    object,
    1j,
    np.float32(0.5),
    np.int64(2),
    np.bool_(1),
)


def _garbage(draw: Draw, value: Any) -> Any:
    if isinstance(value, Tensor) and draw.chance(0.7):
        return _other_tensor(draw, value)
    return draw.one_of(_THINGS if draw.chance(0.5) else _NUMBERS)


def _raw_garbage(draw: Draw, value: Any, others: list[Any]) -> Any:
    tensors = [t for t in others if isinstance(t, Tensor)]
    kind = draw.random.random()
    if kind < 0.3:
        return None
    if isinstance(value, Tensor) or (value is None and kind < 0.6):
        if kind < 0.5 or value is None:
            return draw.one_of(tensors)  # one of the others, or a second time the same
        return _other_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.one_of(_NUMBERS)
    return draw.one_of(_THINGS)


def _other_tensor(draw: Draw, t: Tensor) -> Any:
    """Nearly ``t``: another shape, dtype, layout, device, kind, or other values."""
    return draw.one_of(_OTHERS)(draw, t) if is_plain(t) else t


def _resized(draw: Draw, t: Tensor) -> Tensor:
    sizes = [max(0, size + draw.integer(-1, 1)) for size in t.shape]
    return torch.zeros(sizes, dtype=t.dtype)


def _cast(draw: Draw, t: Tensor) -> Tensor:
    kinds = [torch.bool, torch.int32, torch.int64, torch.uint8, torch.complex64, torch.float16, torch.float64]
    return t.to(draw.one_of(kinds))


def _emptied(draw: Draw, t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _extreme(draw: Draw, t: Tensor) -> Tensor:
    if t.is_floating_point():
        return draw.with_special(t.float(), 0.5).to(t.dtype)
    return draw.integers(2**62, t.shape, -(2**62)).to(t.dtype)


def _quantized(draw: Draw, t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t.float().nan_to_num(0, 0, 0), 0.1, 0, torch.quint8)


_OTHERS = (
    _resized,
    _resized,
    _cast,
    _cast,
    _emptied,
    _extreme,
    _extreme,
    _quantized,
    lambda draw, t: t.to("meta"),
    lambda draw, t: t.reshape(-1),
    lambda draw, t: t[None],
    lambda draw, t: t[:1].expand(t.shape) if t.ndim and len(t) else t,
    lambda draw, t: t.reshape(-1)[0] if t.numel() else t,
    lambda draw, t: t.detach().to_sparse() if not t.is_neg() else t,
    lambda draw, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda draw, t: t.detach().resolve_neg().resolve_conj().numpy() if t.dtype != torch.bfloat16 else None,
    lambda draw, t: torch.nn.Parameter(t.clone(), requires_grad=t.is_floating_point()),
    lambda draw, t: torch.complex(t.float(), t.float()).conj() if t.dtype != torch.bfloat16 else t,
    lambda draw, t: torch.nested.nested_tensor([t[i] for i in range(len(t))]) if t.ndim > 1 and len(t) else t,
    lambda draw, t: draw.laid_out(t),
)

#: Each play, and its share of all calls.
PLAYS = {legal: 0.4, into_outputs: 0.1, into_overlap: 0.15, spoiled: 0.15, raw: 0.2}
