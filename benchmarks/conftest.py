"""Collects the rows of a benchmark run and prints them as one table, with the environment.

``--results=FILE`` writes them, as they come.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import step_table
from atlas_train.tables import aligned
from atlas_train.writing import write_json
from harness import HEADER, Row, as_json, environment
from step_table import StepRow

ROWS: list[Row] = []
STEP_ROWS: list[StepRow] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write the benchmark rows and the environment to FILE (JSON)")


@pytest.fixture
def report(benchmark, pytestconfig):  # type: ignore[no-untyped-def]
    """Record a row, and time its "ours" through pytest-benchmark as well. A row that failed its check fails the run."""

    def record(row: Row, ours) -> None:  # type: ignore[no-untyped-def]
        assert row.checked, f"{row.op} at {row.size} gave a wrong result: no time is reported"
        ROWS.append(row)
        if target := pytestconfig.getoption("--results"):
            write_json(Path(target), as_json(ROWS))
        benchmark.extra_info.update(times=row.times, copy_bandwidth=row.copy_bandwidth, bytes=row.bytes)
        benchmark.pedantic(ours, rounds=9, iterations=5, warmup_rounds=1)

    return record


@pytest.fixture
def report_step(benchmark):  # type: ignore[no-untyped-def]
    """As ``report``, for whole training steps. A row whose loss is not the published one fails the run."""

    def record(row: StepRow, ours) -> None:  # type: ignore[no-untyped-def]
        assert not row.problem, f"{row.step}: {row.problem}"
        STEP_ROWS.append(row)
        benchmark.extra_info.update(seconds=row.seconds, passes=row.passes, memory=row.memory)
        benchmark.pedantic(ours, rounds=3, iterations=1, warmup_rounds=1)

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    if ROWS or STEP_ROWS:
        write("")
        for name, value in environment().items():
            write(f"  {name}: {value}")
    if ROWS:
        write("medians, one process, contenders in turn; floor = bytes of the model at the run's own copy bandwidth")
        write(aligned([HEADER, *(row.table_line() for row in ROWS)]))
        for line in filter(None, (row.target_line() for row in ROWS)):
            write(line)
    if STEP_ROWS:
        for line in ("", "whole training steps, small", *step_table.NOTES, aligned(step_table.table(STEP_ROWS))):
            write(line)
    if ROWS and (target := config.getoption("--results")):
        write(f"written to {target}")
