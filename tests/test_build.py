"""The build: ninja under a thin setup.py, incremental, and clear when something is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = [m for m in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(m) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"building needs {', '.join(MISSING)}: pip install -e '.[dev]'")


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "ATLAS_CUDA": "0", "CXXFLAGS": "-O0", **environment}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that refuses -fopenmp. (The installation, and the build of test_sanitizers.py, have OpenMP.)"""
    compiler = tmp_path_factory.mktemp("compiler") / "plain-c++"
    compiler.write_text(
        f'#!/bin/sh\nfor a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    return str(compiler)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, plain: str) -> Path:
    """A copy of the sources, built once without CUDA and without OpenMP."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "atlas_kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "atlas_kernels/__init__.py"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "python").mkdir()
    done = build(tree, CXX=plain)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OpenMP OFF" in done.stdout
    return tree


def libraries(tree: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (tree / "atlas_kernels").glob("*.so")}


def test_only_what_changed_is_compiled_again(tree, plain):
    assert libraries(tree) == {"_C"}
    assert "no work to do" in build(tree, CXX=plain).stdout
    source = tree / "csrc" / "cpu" / "isa.cpp"
    source.write_text(source.read_text() + "\n// changed\n")
    compiled = [line for line in build(tree, CXX=plain).stdout.splitlines() if "c++ " in line]
    assert len(compiled) == 1 and compiled[0].endswith("isa.cpp")


def test_a_compiler_failure_shows_its_message_and_the_remedy(tree, plain):
    source = tree / "csrc" / "cpu" / "isa.cpp"
    good = source.read_text()
    source.write_text("#error the compiler's own words\n")
    done = build(tree, CXX=plain)
    source.write_text(good)
    assert done.returncode != 0
    assert "the compiler's own words" in done.stdout + done.stderr and "CXX names one" in done.stdout + done.stderr


def test_a_missing_compiler_or_nvcc_is_named(tree, tmp_path):
    done = build(tree, PATH=str(tmp_path))
    assert done.returncode != 0 and "no C++ compiler found" in done.stderr
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return  # the usual folder is looked at as well, so nvcc cannot be hidden here
    done = build(tree, ATLAS_CUDA="1", PATH=os.pathsep.join(_without_nvcc()), CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "ATLAS_CUDA=1, but nvcc was not found" in done.stderr


def _without_nvcc() -> list[str]:
    return [p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists()]


def test_unknown_settings_are_refused(tree):
    assert "ATLAS_CUDA='yes' is unknown: use auto, 0 or 1" in build(tree, ATLAS_CUDA="yes").stderr
    if Path("/usr/local/cuda/bin/nvcc").exists():
        told = build(tree, ATLAS_CUDA="1", ATLAS_CUDA_ARCHS="80,hopper").stderr
        assert "ATLAS_CUDA_ARCHS='80,hopper' is unknown: list compute capabilities, such as 80,90" in told


def test_without_openmp_it_still_builds_and_says_so(tree):
    code = f"import sys; sys.path.insert(0, {str(tree / 'atlas_kernels')!r}); import _C; print(_C.openmp)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
