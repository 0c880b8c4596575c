"""The native kernels: C++ for the CPU (``_C``, always built) and CUDA C++ (a second library, loaded on first use)."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from ...environment import CHOICES, setting

CUDA_LIBRARY = Path(__file__).resolve().parents[2] / "libatlas_cuda.so"
_HUGE = 4 << 20  # two huge pages, of which one at least is aligned
ISAS = CHOICES["ATLAS_ISA"]


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


def advise_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """``t``, just allocated; if it is a large CPU tensor, with huge pages under it where the system has them."""
    if t.nbytes < _HUGE or not t.is_cpu or torch.compiler.is_compiling() or type(t) is not torch.Tensor:
        return t
    if unavailable_reason("cpu") is None:
        core().advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


def first_outside(indices: torch.Tensor, classes: int) -> int:
    """Row of the first index that is not in [0, classes), or their number; contiguous int64 indices."""
    if indices.is_cpu and type(indices) is torch.Tensor and not indices.is_neg() and unavailable_reason("cpu") is None:
        address = indices.data_ptr()
        if address:  # lazy zeros have none
            row: int = core().first_outside(address, indices.shape[0], classes)
            return row
    outside = ((indices < 0) | (indices >= classes)).nonzero()
    return int(outside[0]) if len(outside) else indices.shape[0]


def available_isas() -> tuple[str, ...]:
    """The variants of the CPU kernels that this machine can run, plainest first."""
    return ISAS[: core().best_isa() + 1]


@lru_cache(maxsize=1)
def cuda_problem() -> str | None:
    """Load the CUDA library once; why it cannot be used, or None if it can."""
    if not CUDA_LIBRARY.exists():
        notes = core().build_notes
        return f"the CUDA library was not built ({notes}); install nvcc and run `ATLAS_CUDA=1 pip install -e .`"
    try:
        core().load_cuda(str(CUDA_LIBRARY))
    except RuntimeError as error:
        return f"{CUDA_LIBRARY.name} could not be loaded ({error}); run `ATLAS_CUDA=1 pip install -e .` again"
    built, driver, devices, trouble = core().cuda_runtime()
    if driver == 0:
        return "no CUDA driver is installed on this machine"
    # Minor versions of one major are compatible; an older major is not.
    if driver // 1000 < built // 1000:
        return (
            f"the driver supports CUDA {_version(driver)}, the kernels were built with {_version(built)}: update the "
            "driver, or build with an older nvcc; ATLAS_BACKEND=triton works meanwhile"
        )
    if devices == 0:
        return f"the driver sees no CUDA device ({trouble})"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def unavailable_reason(device_type: str) -> str | None:
    """Why the native kernels cannot run on ``device_type``, or None if they can."""
    if device_type == "cpu":
        try:
            core()
        except (ImportError, ValueError) as error:
            return str(error)
        return None
    if device_type == "cuda":
        return unavailable_reason("cpu") or cuda_problem()  # the core loads the CUDA library
    return f"there are native kernels for cpu and cuda, not for {device_type}"
