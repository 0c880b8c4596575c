"""What is asked of every call of an operator, whatever backend runs it: tensors that are needed are there, and have
memory; none that is written shares memory with another argument; numbers are known, and fit each other.

What a tensor must be (dtype, shape, layout) is in the operator's line of ``schema.py``. The native core asks all of
this by itself, and comes here for what it is not sure of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import LOW, has_memory, is_channels_last
from ..schema import NORMS, SHARES, arguments_of, require_given


class DoorError(RuntimeError):
    """An argument must not be handed to a kernel."""


# Least and largest value, by name: what a kernel would take for another choice, or count beyond its words.
_RANGES = {"objective": (0, 4), "norm": (0, 2), "local": (0, 3), "global_term": (0, 3), "distance": (0, 3),
           "count": (0, 2**24 - 1), "steps": (2, 2**31 - 1)}  # fmt: skip
# Inputs that may lie in ``out``, exactly where their own results go.
_IN_PLACE = {
    "random_start": ("x",),
    "random_start_norm": ("x",),
    "label_noise_start": ("x",),
    "pgd_step": ("adv", "grad", "x"),
    "pgd_step_norm": ("adv", "grad", "x"),
    "apgd_step": ("adv", "old", "grad", "x"),
    "apgd_step_norm": ("adv", "old", "grad", "x"),
    "project": ("v", "x"),
    "hyperplane_step": ("adv", "grad", "x"),
    "sample_neighbours": ("adv",),
    "pgd_step_neighbours": ("adv", "x"),
    "stored_start": ("x",),
    "stored_step": ("x", "grad"),
}


def takes_in_place(operator: str, told: str) -> bool:
    """Whether this is ``out``, or an input that may be ``out`` itself whatever the other arguments are."""
    return not operator.endswith("neighbours") and told in ("out", *_IN_PLACE.get(operator, ()))


def require_plain(operator: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, checked, with plain memory in place of lazy tensors."""
    check = guard(operator)
    if not check(args):
        args = materialised(operator, args)
        check(args)
    return args


@cache
def guard(operator: str) -> Callable[[tuple[Any, ...]], bool]:
    """A check of a call's arguments, made before anything is written. It raises ``TypeError`` and ``ValueError`` that
    name the argument, and is False where a tensor is lazy: ``materialised`` then makes plain memory of it."""
    arguments = arguments_of(operator)
    inputs = [i for i, a in enumerate(arguments) if a.is_tensor and not a.written]
    outputs = [i for i, a in enumerate(arguments) if a.written]
    required = {i for i, a in enumerate(arguments) if not a.optional}
    numbers = [(i, *_RANGES[a.name]) for i, a in enumerate(arguments) if a.name in _RANGES]
    complaint, names = _COMPLAINTS.get(operator), [a.name for a in arguments]
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
        for i, least, largest in numbers:
            if not least <= args[i] <= largest:
                name = arguments[i].name
                raise DoorError(f"{operator}: {name} is {args[i]}, which is unknown: expected {least} to {largest}")
        if key is not None and args[key] is not None and args[key].shape != (2,):
            raise DoorError(f"{operator}: key is {list(args[key].shape)}, expected [2]: seed and base")
        if complaint is not None and (wrong := complaint(dict(zip(names, args, strict=True)))):
            raise DoorError(f"{operator}: {wrong}")
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


_Given = Mapping[str, Any]


def _wrong_rows(given: _Given) -> str | None:
    """Results of the l_inf operators: [x;] [adv';] z_0; z_1; ..."""
    first = given["adv"] if "adv" in given else given["x"]
    slices = given.get("include_x", 0) + ("grad" in given) + given.get("count", "grad" not in given)
    rows, expected = given["out"].shape[:1].numel(), slices * first.shape[:1].numel()
    return None if rows == expected else f"out is {list(given['out'].shape)}, expected {expected} rows"


def _wrong_share(given: _Given) -> str | None:
    low, high = given["share_low"], given["share_high"]
    if not 0 <= low <= high <= SHARES:
        return f"share_low and share_high are {low} and {high}, expected 0 <= share_low <= share_high <= {SHARES}"
    if len(given["x"]) and not len(given["label_noise"]):
        return "label_noise has no rows, expected one for each class"
    return _wrong_rows(given)


def _wrong_norm(given: _Given) -> str | None:
    if ("grad" in given or "key" in given) and given["norm"] == 0:
        return f"norm is 0, expected an index of {NORMS}, of linf for project alone"
    entries, largest = given.get("adv", given["x"]).shape[1:].numel(), given.get("largest", 0)
    if 0 <= largest <= entries:
        return None
    return f"largest is {largest}, expected 0 to {entries}, the entries of a sample"


def _wrong_apgd(given: _Given) -> str | None:
    if given["norm"] == 2 and given["largest"] is None and len(given["x"]):
        return "largest must be given in l1: how many of a sample's entries move"
    return _wrong_norm({**given, "largest": 0})


def _lacks_a_key(given: _Given) -> str | None:
    whole = [side + 2 * given["padding"] for side in given["images"].shape[2:]]
    needed = given["flip"] or list(given["out"].shape[2:]) != whole
    return "noise needs a key" if needed and given["key"] is None else None


def _wrong_scale(given: _Given) -> str | None:
    return None if given["scale"] else "scale is 0, which pairs are divided by"


def _wrong_likeness(given: _Given) -> str | None:
    """BatchNorm's tensors lie in memory as x does."""
    x = given["x"]
    for name in ("cotangent", "x_cotangent", "cotangent_grad", "x_grad"):
        t = given[name]
        if t is not None and (t.dtype != x.dtype or is_channels_last(t) != is_channels_last(x)):
            return f"{name} is {t.dtype} with strides {t.stride()}, expected {x.dtype} with strides {x.stride()}, as x"
    return None


def _lacks_a_part(given: _Given) -> str | None:
    """An objective has what it looks at."""
    lacks, objective = None, given["objective"]
    predicts = given["correct"] is not None or given["kappa"] is not None
    if given["labels"] is None and (objective != 1 or predicts):
        lacks = "labels"
    elif given["reference"] is None and objective == 1:
        lacks = "reference"
    elif given["targets"] is None and objective == 4:
        lacks = "targets"
    return lacks and f"objective {objective} needs {lacks}, got None"


def _wrong_batches(given: _Given) -> str | None:
    """Joint logits: [x;] adv; z_1; ..; z_n, x where there is a global term, z where there is a local one."""
    rows, batch, first = len(given["logits"]), len(given["labels"]), 1 if given["global_term"] == 3 else 2
    parts, rest = divmod(rows, batch) if batch else (first, rows)
    if rest or parts < first or (given["local"] == 3 and parts > first):
        return f"logits have {rows} rows, which is not [x; adv; z_1; ..; z_n] of {batch} labels"
    return None


def _wrong_truth(given: _Given) -> str | None:
    """A label, or a distribution, says what a sample is."""
    known = given["labels"] is not None or given["distributions"] is not None or not len(given["logits"])
    return None if known else "labels or distributions must be given, got None"


# What numbers and tensors must be beside each other: in words, what is wrong.
_COMPLAINTS: dict[str, Callable[[_Given], str | None]] = {
    **dict.fromkeys(("random_start", "pgd_step", "apgd_step", "sample_neighbours", "pgd_step_neighbours"), _wrong_rows),
    "label_noise_start": _wrong_share,
    **dict.fromkeys(("random_start_norm", "pgd_step_norm", "project"), _wrong_norm),
    "apgd_step_norm": _wrong_apgd,
    "augment": _lacks_a_key,
    "compactness": _wrong_scale,
    "batch_norm_double_backward": _wrong_likeness,
    "attack_cotangent": _lacks_a_part,
    "consistency_loss": _wrong_truth,
    "atlas_loss": _wrong_batches,
}


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
