"""What is asked of every call of an operator, whatever backend runs it: tensors that are needed are there, and have
memory; none that is written shares memory with another argument; numbers that stand for a choice are known.

What the kernels of a backend ask besides (dtype, shape, layout) they check themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import LOW, has_memory
from ..schema import arguments_of, require_given
from .door import DoorError

# Least and largest value, by name: what a kernel would take for another choice, or count beyond its words.
_RANGES = {"objective": (0, 4), "norm": (0, 2), "local": (0, 3), "global_term": (0, 3), "count": (0, 2**24 - 1),
           "steps": (2, 2**31 - 1)}  # fmt: skip
# Inputs that may lie in ``out``, exactly where their own results go.
_IN_PLACE = {
    "random_start": ("x",),
    "random_start_norm": ("x",),
    "pgd_step": ("adv", "grad", "x"),
    "pgd_step_norm": ("adv", "grad", "x"),
    "project": ("v", "x"),
    "sample_neighbours": ("adv",),
    "pgd_step_neighbours": ("adv", "x"),
}


def guard(operator: str) -> Callable[[tuple[Any, ...]], bool]:
    """A check of a call's arguments, made before anything is written. It raises ``TypeError`` and ``ValueError`` that
    name the argument, and is False where a tensor is lazy: ``materialised`` then makes plain memory of it."""
    arguments = arguments_of(operator)
    inputs = [i for i, a in enumerate(arguments) if a.is_tensor and not a.written]
    outputs = [i for i, a in enumerate(arguments) if a.written]
    required = {i for i, a in enumerate(arguments) if not a.optional}
    ranges = [(i, *_RANGES[a.name]) for i, a in enumerate(arguments) if a.name in _RANGES]
    also = _require_parts if operator == "attack_cotangent" else None
    key = next((i for i, a in enumerate(arguments) if a.name == "key"), None)

    def check(args: tuple[Any, ...]) -> bool:
        written: list[tuple[int, int, int]] = []
        for i in outputs:
            t = args[i]
            if t is not None:
                start = t.data_ptr()
                if t.is_neg() or (start < LOW and not has_memory(arguments[i].told, t)):
                    return False
                end = start + t.nbytes
                for out, low, high in written:
                    if start < high and low < end:
                        _require_in_place(operator, i, out, args)
                if start:  # not of the meta device
                    written.append((i, start, end))
            elif i in required:
                require_given(operator, args)
        for i in inputs:
            t = args[i]
            if t is not None:
                start = t.data_ptr()
                if t.is_neg() or (start < LOW and not has_memory(arguments[i].told, t)):
                    return False
                for out, low, high in written:
                    if start < high and low < start + t.nbytes:
                        _require_in_place(operator, out, i, args)
            elif i in required:
                require_given(operator, args)
        for i, least, largest in ranges:
            if not least <= args[i] <= largest:
                name = arguments[i].name
                raise DoorError(f"{operator}: {name} is {args[i]}, which is unknown: expected {least} to {largest}")
        if key is not None and args[key] is not None and args[key].shape != (2,):
            raise DoorError(f"{operator}: key is {list(args[key].shape)}, expected [2]: seed and base")
        if also is not None:
            also(*args)
        return True

    return check


def materialised(operator: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with plain memory in place of lazily negated tensors, and of zeros that are none."""
    made = list(args)
    for i, argument in enumerate(arguments_of(operator)):
        t = args[i]
        if isinstance(t, Tensor) and (t.is_neg() or t._is_zerotensor()):
            if argument.written:
                raise ValueError(f"{argument.told} is a lazy view, which cannot be written: make one by torch.empty")
            made[i] = t.resolve_neg() if t.is_neg() else torch.zeros_like(t)
    return tuple(made)


def _require_parts(logits, labels, targets, reference, objective, descend, cotangent, correct, kappa, value):  # type: ignore[no-untyped-def]
    """An objective has what it looks at."""
    lacks = None
    if labels is None and (objective != 1 or correct is not None or kappa is not None):
        lacks = "labels"
    elif reference is None and objective == 1:
        lacks = "reference"
    elif targets is None and objective == 4:
        lacks = "targets"
    if lacks is not None:
        raise DoorError(f"attack_cotangent: objective {objective} needs {lacks}, got None")


def _require_in_place(operator: str, written: int, other: int, args: tuple[Any, ...]) -> None:
    arguments, out, t = arguments_of(operator), args[written], args[other]
    name, told = arguments[written].told, arguments[other].told
    row = -1
    if name == "out" and told in _IN_PLACE.get(operator, ()):
        row = _row_of_result(operator, told, args)
        if row == 0 and t is out:
            return
        there = out.data_ptr() + row * out.stride(0) * out.element_size()
        if row >= 0 and t.data_ptr() == there and t.dtype == out.dtype and t.stride() == out.stride():
            return
    itself = f"{name}={told} itself, or " if row >= 0 else ""
    raise ValueError(f"{name} shares memory with {told}: pass {itself}a tensor of its own")


def _row_of_result(operator: str, told: str, args: tuple[Any, ...]) -> int:
    """The row of ``out`` at which what becomes of an input begins; -1: nowhere."""
    if not operator.endswith("neighbours"):
        return 0
    given = {a.name: value for a, value in zip(arguments_of(operator), args, strict=True)}
    if operator == "sample_neighbours":
        return 0 if given["count"] == 1 else -1
    if told == "x":
        return 0 if given["include_x"] else -1
    return len(given["adv"]) if given["include_x"] else 0
