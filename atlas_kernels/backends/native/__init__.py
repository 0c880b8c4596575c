"""The native kernels: C++ for the CPU (``core.py``) and CUDA C++ (a second library, loaded on first use)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ...core import core, problem
from ..door import implementation as implementation

CUDA_LIBRARY = Path(__file__).resolve().parents[2] / "libatlas_cuda.so"


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
        return problem()
    if device_type == "cuda":
        return problem() or cuda_problem()  # the core loads the CUDA library
    return f"there are native kernels for cpu and cuda, not for {device_type}"
