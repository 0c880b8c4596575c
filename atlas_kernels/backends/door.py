"""The way of an operator's arguments to the native core, which takes raw pointers and trusts them.

Whoever calls an operator, by whatever way, passes here. A ``Plan`` of the core is made of the operator's line in
``schema.py``: it reads every tensor once, and what is there as declared it hands on. What is not, or may not be, is
looked at again in Python, by ``backends/guard.py``, which says what is wrong. The messages of this file are for
developers; users meet the checks of the public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import OTHER_FILES, core
from ..layout import plane_shape
from ..schema import FIXED, Argument, arguments_of, parse
from .guard import DoorError, require_plain, takes_in_place

_COLUMNS = 32  # kPairColumns of csrc/core/pairwise.h
_SUMMED, _SUMS = 2048, 1024  # entries of a gradient that are worth a block of a sum, and the most blocks
_SHARE, _SHARES = 64, 512  # how much of a channel a block of BatchNorm's sums covers at least, and the most blocks
_LANES = 8  # kNuclearLanes of csrc/core/nuclear_norm.h
# What a kernel needs besides, and how it is made of the operator's arguments: the core never allocates.
_WORKSPACES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "compactness": (
        "float64[blocks, batch]! partial",
        lambda h, *_: torch.empty((-(-h.shape[-1:].numel() // _COLUMNS), *h.shape[:1]), dtype=torch.float64,
                                  device=h.device),
    ),
    "batch_norm_double_backward": (
        "float64[blocks, 8, channels]! partial",
        lambda x, *_: torch.empty(_sums_shape(*plane_shape(x.shape)), dtype=torch.float64, device=x.device),
    ),
    "stored_step": (
        "float64[blocks]! partial",
        lambda x, *_: torch.empty(min(max(x.numel() // _SUMMED, 1), _SUMS), dtype=torch.float64, device=x.device),
    ),
    "nuclear_norm": (
        "float64[room]! work",
        lambda d, *_: torch.empty(_vectors_room(*d.shape), dtype=torch.float64, device=d.device),
    ),
}  # fmt: skip


def _vectors_room(*shape: int) -> int:
    """NuclearLayout of csrc/core/nuclear_norm.h."""
    if len(shape) != 2:  # refused later
        return 0
    short, long = (-(-side // _LANES) * _LANES for side in sorted(shape))
    return min(shape) * (long + 3 * short + 1)


def _sums_shape(batch: int, channels: int, pixels: int) -> tuple[int, int, int]:
    return min(max(batch * pixels // _SHARE, 1), _SHARES), 8, channels


def plan_of(stem: str, operator: str, workspace: bool = True) -> Any:
    """The core's plan of the operator, with its ``workspace`` as a last argument."""
    arguments = arguments_of(operator)
    if workspace and operator in _WORKSPACES:
        arguments = (*arguments, *parse(_WORKSPACES[operator][0]))
    words = [_words(operator, a) for a in arguments]
    try:
        return core().Plan(stem, operator, words, dict(FIXED.get(operator, {})))
    except IndexError as error:  # it has no such stem
        raise ImportError(f"{operator}: {OTHER_FILES}") from error


def _words(operator: str, a: Argument) -> tuple[Any, ...]:
    sides = list(a.sides) if a.is_tensor else None
    return a.field, a.type, sides, a.optional, a.written, takes_in_place(operator, a.told)


def implementation(stem: str, operator: str) -> Callable[[tuple[Any, ...]], None]:
    """What runs the operator on CPU and CUDA tensors, of its arguments as one tuple."""
    plan, done, threads = plan_of(stem, operator), core().DONE, torch.get_num_threads
    workspace = _WORKSPACES[operator][1] if operator in _WORKSPACES else None

    def run(args: tuple[Any, ...]) -> None:
        given = args if workspace is None else (*args, workspace(*args))
        if plan(given, threads(), False) != done:
            args = require_plain(operator, args)
            given = args if workspace is None else (*args, workspace(*args))
            require_declared(operator, args, plan(given, threads(), True))

    return run


def require_declared(operator: str, args: tuple[Any, ...], told: int) -> None:
    """Raise for the argument that is not as declared, by its number."""
    if told == core().DONE:
        return
    if not 0 <= told < len(args):
        raise DoorError(f"{operator}: the arguments do not fit each other, or their device is none of the core")
    a, t = arguments_of(operator)[told], args[told]
    if not isinstance(t, Tensor):
        raise DoorError(f"{operator}: {a.told} is {t!r}, expected {a.shown}")
    shape, strides = (list(t.shape), t.stride()) if t.layout == torch.strided else (list(t.shape), t.layout)
    raise DoorError(
        f"{operator}: {a.told} is {t.dtype} {shape} with strides {strides} on {t.device}, expected {a.shown} on "
        f"{args[0].device}, see schema.Argument"
    )
