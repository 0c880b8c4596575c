"""The compiled CPU core (``_C``, always built): how it is loaded, and what of it serves beside the operators.

Below the checks and the backends, which both need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from .environment import CHOICES, setting

ISAS = CHOICES["ATLAS_ISA"]
OTHER_FILES = "the native core was built from other files than these; run `pip install -e .` in the source tree again"
_HUGE = 4 << 20  # two huge pages, of which one at least is aligned


@lru_cache(maxsize=1)
def core() -> ModuleType:
    """The compiled CPU core. Raises ``ImportError`` with the remedy if it was not built for this Python."""
    # torch was imported above, first: so the core binds to the OpenMP runtime that torch has loaded.
    try:
        module = importlib.import_module("atlas_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"the native core is not built for this Python ({error}); run `pip install -e .` in the source tree, and "
            "start Python where no other folder is called atlas_kernels"
        ) from error
    if not hasattr(module, "plain"):
        raise ImportError(OTHER_FILES)
    wanted = setting("ATLAS_ISA")
    if wanted is not None:
        force_isa(wanted, module)
    return module


def force_isa(name: str, module: ModuleType | None = None) -> None:
    """Run the CPU kernels' ``name`` variant: "baseline", "v3" (AVX2) or "v4" (AVX-512).

    Raises ``ValueError`` if the name is unknown or this machine cannot run it.
    """
    module = module or core()
    if name not in ISAS:
        raise ValueError(f"ATLAS_ISA={name!r} is unknown: choose from {', '.join(ISAS)}")
    if not module.force_isa(ISAS.index(name)):
        raise ValueError(f"ATLAS_ISA={name!r}: this machine runs at most {ISAS[module.best_isa()]!r}")


def available_isas() -> tuple[str, ...]:
    """The variants of the CPU kernels that this machine can run, plainest first."""
    return ISAS[: core().best_isa() + 1]


def problem() -> str | None:
    """Why the core cannot be used, or None if it can."""
    try:
        core()
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def advise_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """``t``, just allocated; if it is a large CPU tensor, with huge pages under it where the system has them."""
    if not t.is_cpu or t.nbytes < _HUGE or torch.compiler.is_compiling() or type(t) is not torch.Tensor:
        return t
    if problem() is None:
        core().advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


_PLAIN = {torch.Tensor, float, int, bool, type(None)}


def plain_check() -> Callable[[tuple[Any, ...]], bool]:
    """What says, quickly, whether arguments are of the types that eager code has: no subclass of Tensor among them."""
    if problem() is None:
        check: Callable[[tuple[Any, ...]], bool] = core().plain
        return check
    return lambda args: _PLAIN.issuperset(map(type, args))


def alike(*images: torch.Tensor) -> bool:
    """True, quickly, if these are plain dense float tensors of one shape and device, the first two of one type; False
    may mean that it was not looked at."""
    return not torch.compiler.is_compiling() and problem() is None and core().alike(*images)


def first_outside(indices: torch.Tensor, classes: int) -> int:
    """Row of the first index that is not in [0, classes), or their number; contiguous int64 indices."""
    if indices.is_cpu and type(indices) is torch.Tensor and not indices.is_neg() and problem() is None:
        address = indices.data_ptr()
        if address:  # lazy zeros have none
            row: int = core().first_outside(address, indices.shape[0], classes)
            return row
    outside = ((indices < 0) | (indices >= classes)).nonzero()
    return int(outside[0]) if len(outside) else indices.shape[0]
