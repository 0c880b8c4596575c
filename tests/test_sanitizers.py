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

FLAGS = "-Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
FLAGS += " --param=asan-instrumentation-with-call-threshold=0"  # calls of checks compile faster than checks in line


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


def run(tree: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of Python on the sanitized build."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "LD_PRELOAD": " ".join(runtime_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, *command], env=environment, cwd=cwd or tree, capture_output=True, text=True)


def test_operators_are_clean(tree):
    where = run(tree, "-c", "import atlas_kernels._C as c; print(c.__file__)")
    assert str(tree) in where.stdout, where.stderr
    stems = "perturb", "noise", "augment", "pairwise", "batch_norm", "nuclear_norm", "stored", "hyperplane", "guard"
    tests = [str(ROOT / "tests" / f"test_{stem}.py") for stem in stems]
    chosen = "(bits or in_place or cast or buffer or noise or empty or outside or sizes or guard) and not streamed"
    done = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests)
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]


def test_random_calls_are_clean(tree):
    done = run(tree, "-m", "fuzz", "--calls", "500", "--seed", "1", cwd=ROOT / "tests")
    assert done.returncode == 0 and "500 calls, 0 wrong" in done.stdout, (done.stdout + done.stderr)[-12000:]
