"""Workers of pytest-xdist begin with the files that take long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from order import LONG

HERE = Path(__file__).parent


def test_the_long_files_are_there() -> None:
    assert [name for name in LONG if not (HERE / f"{name}.py").exists()] == []


def test_workers_begin_with_them_then_with_the_most_tests_and_waiting_threads_leave_the_core(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    for name, tests in (("test_few", 1), ("test_many", 3), (LONG[1], 1), (LONG[0], 2)):
        lines = [f"def test_{number}(): assert os.environ['OMP_WAIT_POLICY'] == 'passive'\n" for number in range(tests)]
        (tmp_path / f"{name}.py").write_text("import os\n" + "".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "order",
        "-p",
        "xdist.plugin",
        "-n",
        "1",
        "--dist",
        "loadfile",
    ]
    env = os.environ | {"PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env.pop("OMP_WAIT_POLICY", None)
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    begun = [line.split("PASSED ")[1].partition(".py")[0] for line in said.splitlines() if "PASSED" in line]
    assert begun == [LONG[0]] * 2 + [LONG[1]] + ["test_many"] * 3 + ["test_few"]
