"""``pytest --failures=FILE``: a line for each failure as it happens, so that an interrupted run still tells which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", metavar="FILE", type=Path, help="write each failed test to FILE as it happens")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--failures")
    if path and not hasattr(config, "workerinput"):  # workers of pytest-xdist report to the process that started them
        config.pluginmanager.register(Failures(path))


class Failures:
    def __init__(self, path: Path) -> None:
        try:
            self.file = path.open("w", buffering=1, encoding="utf-8", errors="backslashreplace")  # by lines
        except OSError as error:
            raise pytest.UsageError(f"--failures cannot be written: {error}") from error

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else report.longreprtext
            self.file.write(f"{report.nodeid} [{report.when}] {' '.join(said.split())[:1000]}\n")

    pytest_collectreport = pytest_runtest_logreport

    def pytest_unconfigure(self) -> None:
        self.file.close()
