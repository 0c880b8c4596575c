"""The CUDA kernels without a GPU: g++ compiles them as plain C++, every operator runs on them under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
HERE = TESTS / "cuda_on_host"
CUDA = TESTS.parent / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DATLAS_HD=inline"]
FLAGS += ["-fno-sanitize=shift-base"]  # negative numbers are shifted, which C++20 defines


def runtime_libraries() -> list[str]:
    """What must be in the process before anything else, since Python itself is not built with a sanitizer."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"g++ comes without {name}")
        found.append(path)
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("g++"):
        pytest.skip("g++ was not found")
    runtime_libraries()
    out = tmp_path_factory.mktemp("cuda_on_host") / "libatlas_cuda_on_host.so"
    sources = [*sorted(CUDA.glob("*.cu")), HERE / "observe.cpp", TESTS / "reduce.cu"]
    command = ["g++", *FLAGS, f"-I{HERE}", "-x", "c++", *map(str, sources), "-ldl", "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


def test_operators_on_the_cuda_kernels(library: Path):
    environment = {
        **os.environ,
        "ATLAS_CUDA_ON_HOST": str(library),
        "LD_PRELOAD": " ".join(runtime_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    # --capture=sys: what a sanitizer prints while the process dies must not be lost.
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys"]
    files = [HERE / "operators_losses.py", HERE / "operators.py"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-12000:]
