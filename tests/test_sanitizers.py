"""The CPU core under AddressSanitizer and UndefinedBehaviorSanitizer: its own bitwise tests, in a build of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_build import ROOT, build, pytestmark  # noqa: F401  # skipped where nothing can be built
from test_cuda_on_host import runtime_libraries

FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("g++"):
        pytest.skip("g++ was not found")
    tree = tmp_path_factory.mktemp("sanitized")
    for name in ("csrc", "atlas_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "python").mkdir()
    done = build(tree, CXX="g++", CXXFLAGS=FLAGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def test_operators_are_clean(tree):
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "LD_PRELOAD": " ".join(runtime_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    imported = "import atlas_kernels._C as c; print(c.__file__)"
    where = subprocess.run([sys.executable, "-c", imported], env=environment, cwd=tree, capture_output=True, text=True)
    assert str(tree) in where.stdout, where.stderr
    tests = [str(ROOT / "tests" / f"test_{stem}.py") for stem in ("perturb", "noise", "augment", "pairwise", "guard")]
    chosen = "(bits or in_place or cast or buffer or noise or empty or outside or sizes or guard) and not streamed"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]
