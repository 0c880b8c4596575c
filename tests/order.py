"""Which files the workers of pytest-xdist (``-n 2 --dist loadfile``) begin with: those that compile and those that take
long over few tests, then those with the most tests. By itself it goes by the number of tests alone, so it would begin
minutes of one test last, and the other workers would wait for them."""

from __future__ import annotations

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        in_order(items)


def in_order(items: list[pytest.Item]) -> None:
    tests = Counter(item.path for item in items)
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: (ranks.get(item.path.stem, len(LONG)), -tests[item.path], str(item.path)))
