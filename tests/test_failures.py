"""``--failures``: what failed is on disk as soon as it has failed, also where the run comes to no end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "said\\nin two lines, \u00b5"
@pytest.fixture
def broken(): raise RuntimeError("no device")
def test_setup(broken): pass
def test_dies(): os._exit(3)
"""
FAILED = [
    "test_some.py::test_fails [call] AssertionError: said in two lines, µ assert 1 == 2",
    "test_some.py::test_setup [setup] RuntimeError: no device",
]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_some.py").write_text(TESTS, encoding="utf-8")
    (folder / "test_other.py").write_text("import not_there")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "failures", *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0"}  # a machine whose files are in ASCII, if nobody says otherwise
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_run_that_dies_has_told_what_failed(tmp_path: Path) -> None:
    assert run(tmp_path, "test_some.py", "--failures=failures.txt").returncode == 3
    assert (tmp_path / "failures.txt").read_text(encoding="utf-8").splitlines() == FAILED


def test_workers_are_heard(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    assert run(tmp_path, "test_some.py", "-p", "xdist.plugin", "-n", "1", "--failures=failures.txt").returncode == 1
    *failed, dead = (tmp_path / "failures.txt").read_text(encoding="utf-8").splitlines()
    assert failed == FAILED
    assert dead.startswith("test_some.py::test_dies") and "crashed" in dead


def test_a_file_that_cannot_be_collected(tmp_path: Path) -> None:
    run(tmp_path, "test_other.py", "--failures=failures.txt")
    (line,) = (tmp_path / "failures.txt").read_text(encoding="utf-8").splitlines()
    assert line.startswith("test_other.py [collect]") and "No module named 'not_there'" in line


def test_a_place_that_cannot_be_written_is_refused_before_the_tests(tmp_path: Path) -> None:
    ended = run(tmp_path, "test_some.py", "--failures=nowhere/failures.txt")
    assert ended.returncode == 4 and "--failures cannot be written" in ended.stderr
