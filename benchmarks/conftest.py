"""Collects the rows of a benchmark run and prints them as one table, with the environment; --results writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness import HEADER, Row, as_json, environment

ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write the benchmark rows and the environment to FILE (JSON)")


@pytest.fixture
def report(benchmark):  # type: ignore[no-untyped-def]
    """Record a row, and time its "ours" through pytest-benchmark as well. A row that failed its check fails the run."""

    def record(row: Row, ours) -> None:  # type: ignore[no-untyped-def]
        assert row.checked, f"{row.op} at {row.size} gave a wrong result: no time is reported"
        ROWS.append(row)
        benchmark.extra_info.update(times=row.times, copy_bandwidth=row.copy_bandwidth, bytes=row.bytes)
        benchmark.pedantic(ours, rounds=9, iterations=5, warmup_rounds=1)

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write("medians, one process, contenders in turn; floor = bytes of the model at the copy bandwidth of the same run")
    for name, value in environment().items():
        write(f"  {name}: {value}")
    lines = [HEADER, *(row.table_line() for row in ROWS)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    for line in lines:
        write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if target := config.getoption("--results"):
        path = Path(target)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(as_json(ROWS), indent=1) + "\n")
        os.replace(temporary, path)
        write(f"written to {path}")
