"""The workers of pytest-xdist (``-n 2 --dist loadfile``): which files they begin with, and how their threads wait.

They begin with the files that compile and those that take long over few tests, then come those with the most tests. By
itself pytest-xdist goes by the number of tests alone, so it would begin minutes of one test last, and the other workers
would wait for them.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

#: The longest first.
LONG = (
    "test_cuda_on_host",
    "test_cuda_build",
    "test_sanitizers",
    "test_triton_losses",
    "test_triton",
    "test_fuzz",
    "test_build",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.option.loadscopereorder = False  # the order of the workers' items is kept
    if session.config.getoption("numprocesses", None):
        # Before the workers start, which load OpenMP with torch: by default a thread that waits keeps its core busy,
        # which the other workers need.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        in_order(items)


def in_order(items: list[pytest.Item]) -> None:
    tests = Counter(item.path for item in items)
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: (ranks.get(item.path.stem, len(LONG)), -tests[item.path], str(item.path)))
