"""``python -m atlas_kernels``: what was built, what can run on this machine, and if not, why and what to do."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .backends import BACKENDS, default_for, unavailable_reason
from .core import ISAS, core
from .environment import problems
from .precision import cpu_report


def report() -> list[tuple[str, str]]:
    """(subject, finding) lines."""
    lines = [
        ("atlas-kernels", f"{__version__} in {Path(__file__).parent}"),
        ("python, torch", f"{platform.python_version()}, {torch.__version__} on {platform.platform()}"),
    ]
    lines += [("WARNING", problem) for problem in problems()]
    if shadowed := _shadowed():
        lines.append(("WARNING", shadowed))
    lines += [("CPU", cpu_report()), *_cpu_lines(), *_cuda_lines()]
    for name in BACKENDS:
        for device_type in ("cpu", "cuda"):
            reason = unavailable_reason(name, device_type)
            mark = " (default)" if reason is None and default_for(device_type) == name else ""
            lines.append((f"{name} on {device_type}", f"yes{mark}" if reason is None else f"no: {reason}"))
    settings = {k: v for k, v in os.environ.items() if k.startswith("ATLAS_")}
    told = ", ".join(f"{k}={v!r}" for k, v in sorted(settings.items()))
    lines.append(("environment", told or "no ATLAS_* variable set"))
    return lines


def _shadowed() -> str | None:
    """A source tree in the way of the installed package (or the other way round)."""
    try:
        installed = metadata.version("atlas-kernels")
    except metadata.PackageNotFoundError:
        return "the package is not installed, only found through the path: run `pip install -e .`"
    if installed != __version__:
        return f"version {installed} is installed, but {__version__} is imported from {Path(__file__).parent}"
    if not list(Path(__file__).parent.glob("_C*")):
        return f"{Path(__file__).parent} is a source tree that was never built and hides the install: leave that folder"
    return None


def _cpu_lines() -> list[tuple[str, str]]:
    try:
        module = core()
    except (ImportError, ValueError) as error:
        return [("CPU kernels", f"missing: {error}")]
    isa = ISAS[module.current_isa()]
    if module.openmp:
        threads = f"OpenMP, up to {torch.get_num_threads()} threads (torch.set_num_threads)"
    else:
        threads = "built WITHOUT OpenMP, so one thread; install libgomp (g++) or libomp (clang), then reinstall"
    return [("CPU kernels", f"instruction set {isa} (best here: {ISAS[module.best_isa()]}); {threads}")]


def _cuda_lines() -> list[tuple[str, str]]:
    try:
        notes = core().build_notes
    except (ImportError, ValueError):
        return []
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        devices = "torch sees no CUDA device"
    return [("CUDA kernels", f"built with: {notes}; {devices}")]


def main() -> None:
    """Print the report."""
    for subject, finding in report():
        print(f"{subject:<20} {finding}")


if __name__ == "__main__":
    main()
