"""Builds the native kernels: writes one ninja file and runs it. No torch is needed, nor any GPU.

Environment: CXX, CXXFLAGS, NVCCFLAGS; ATLAS_CUDA=auto|0|1 (auto: if nvcc is found); ATLAS_CUDA_ARCHS=80,90 (default:
the GPUs present, else 80 and 90); CUDA_HOME. Everything else about the project is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import _StaticPth, editable_wheel

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "libatlas_cuda.so"
# Numerics are a promise (the same bits everywhere), so: no contraction of a*b+c, and never fast-math.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"  # vectors are never passed
CXX_FLAGS += " -ffp-contract=off -fno-math-errno -fno-trapping-math"
NVCC_FLAGS = "-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden -cudart static"


def find_compiler() -> str:
    """The C++ compiler of CXX, else the first one on the PATH."""
    found = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    return found or sys.exit("atlas-kernels: no C++ compiler found. Install g++ (or clang++), or name one in CXX.")


def openmp_flag(cxx: str) -> str:
    """-fopenmp if the compiler can compile and link with it, else nothing: the kernels then use one thread."""
    probe = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    command = [*shlex.split(cxx), "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    return "-fopenmp" if subprocess.run(command, input=probe, text=True, capture_output=True).returncode == 0 else ""


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, or of the usual folder; None if it is not wanted or not there."""
    wanted = os.environ.get("ATLAS_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"atlas-kernels: ATLAS_CUDA={wanted!r} is unknown: use auto, 0 or 1.")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = next((str(p) for h in homes if h and (p := Path(h, "bin", "nvcc")).exists()), None) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        sys.exit("atlas-kernels: ATLAS_CUDA=1, but nvcc was not found. Install the CUDA toolkit, or set CUDA_HOME.")
    return nvcc


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for, such as ["80", "90"]."""
    named = os.environ.get("ATLAS_CUDA_ARCHS")
    if named:
        archs = [a.strip().removeprefix("sm_").replace(".", "") for a in re.split("[,;]", named) if a.strip()]
        if not archs or not all(re.fullmatch(r"[0-9]{2,3}[af]?", arch) for arch in archs):
            sys.exit(f"atlas-kernels: ATLAS_CUDA_ARCHS={named!r} is unknown: list compute capabilities, such as 80,90.")
        return archs
    if smi := shutil.which("nvidia-smi"):
        query = subprocess.run(
            [smi, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
        )
        if query.returncode == 0 and query.stdout.strip():
            return sorted({line.strip().replace(".", "") for line in query.stdout.splitlines() if line.strip()})
    return ["80", "90"]


def write_ninja(folder: Path, core: str) -> list[str]:
    """Write build.ninja into ``folder``; the names of the libraries that it builds there."""
    cxx, nvcc = find_compiler(), find_nvcc()
    openmp, archs = openmp_flag(cxx), cuda_archs() if nvcc else []
    # For these GPUs machine code; for later ones PTX of the newest.
    targets = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    targets += [f"-gencode arch=compute_{a},code=compute_{a}" for a in archs[-1:]]
    absent = "ATLAS_CUDA=0" if os.environ.get("ATLAS_CUDA") == "0" else "nvcc was not found"
    notes = f"nvcc {nvcc}, sm_{', sm_'.join(archs)}" if nvcc else absent
    # pybind11 itself is found through the environment (see build): its path changes with every isolated build.
    binding_flags = f"-I{sysconfig.get_path('include')} -DATLAS_PYBIND11={pybind11.__version__}"
    binding_flags += f' -DATLAS_BUILD_NOTES="\\"{notes}\\""'
    user_flags = os.environ.get("CXXFLAGS", "")
    lines = [
        f"rule cxx\n  command = {cxx} {CXX_FLAGS} $extra {openmp} {user_flags} -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link\n  command = {cxx} -shared {openmp} {user_flags} $in -ldl -o $out\n  description = link $out",
    ]
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) + [ROOT / "csrc" / "bindings.cpp"]
    for source in sources:
        extra = binding_flags.replace("$", "$$") if source.name == "bindings.cpp" else ""
        extra += "-O2 -fvect-cost-model=dynamic" if source.stem.startswith("lanes") else ""  # vectors as written
        lines.append(f"build {source.stem}.o: cxx {source}\n  extra = {extra}")
    lines.append(f"build {core}: link {' '.join(f'{s.stem}.o' for s in sources)}")
    if nvcc:
        lines.append(
            f"rule nvcc\n  command = {nvcc} {NVCC_FLAGS} {' '.join(targets)} {os.environ.get('NVCCFLAGS', '')} "
            "-MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in"
        )
        lines.append(f"rule cudalink\n  command = {nvcc} -shared -cudart static $in -o $out\n  description = link $out")
        kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        lines += [f"build {k.stem}.cu.o: nvcc {k}" for k in kernels]
        lines.append(f"build {CUDA_LIBRARY}: cudalink {' '.join(f'{k.stem}.cu.o' for k in kernels)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    print(f"atlas-kernels: {cxx}, OpenMP {'on' if openmp else 'OFF (one thread)'}, CUDA: {notes}", flush=True)
    return [core, CUDA_LIBRARY] if nvcc else [core]


def build(core: str) -> list[Path]:
    """Compile what changed since the last build; the libraries' paths."""
    folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    folder.mkdir(parents=True, exist_ok=True)
    names = write_ninja(folder, core)
    environment = {**os.environ, "CPLUS_INCLUDE_PATH": pybind11.get_include()}
    result = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder, *names], env=environment)
    if result.returncode:
        sys.exit(
            "atlas-kernels: the compiler stopped; its message is above. The CPU kernels need a C++17 compiler (CXX "
            "names one); a failing nvcc can be left out with ATLAS_CUDA=0."
        )
    return [folder / name for name in names]


class NinjaBuild(build_ext):
    """build_ext whose compiler is ninja; the CUDA library lies beside the extension module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for library in build(target.name):
            shutil.copy2(library, target.parent)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built, installed = Path(self.build_lib, "atlas_kernels", CUDA_LIBRARY), ROOT / "atlas_kernels" / CUDA_LIBRARY
        installed.unlink(missing_ok=True)
        if built.exists():
            shutil.copy2(built, installed)


class EditablePaths(editable_wheel):
    """Editable installs by plain paths: type checkers and editors cannot follow setuptools' import hook."""

    def _select_strategy(self, name: str, tag: str, build_lib: str) -> _StaticPth:
        return _StaticPth(self.distribution, name, [ROOT, ROOT / "python"])


COMMANDS = {"build_ext": NinjaBuild, "editable_wheel": EditablePaths}
setup(ext_modules=[Extension("atlas_kernels._C", [])], cmdclass=COMMANDS)
