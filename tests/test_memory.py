"""Memory that is kept is not asked for again: counted in page faults, which a new page costs."""

from __future__ import annotations

import resource

import pytest
import torch

from atlas_kernels import can_keep_memory, keep_memory

BLOCK = 16 << 20  # floats: 64 MiB, more than glibc ever keeps by itself
PAGES = BLOCK * 4 // (2 << 20)  # at the least: a system may hand out pages of 2 MiB

pytestmark = pytest.mark.skipif(not can_keep_memory(), reason="not glibc")


@pytest.fixture(autouse=True)
def _no_filling():
    """NaN in new memory would touch it, kept or not; and a fault more or less is no matter."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def faults() -> int:
    """Pages that a block, allocated, written and freed, asks the system for: the fewest of six, as a heap that has
    holes may place the first ones in different spots."""
    asked = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(BLOCK).fill_(1.0)
        asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(asked)


def test_freed_memory_serves_again_inside_and_only_there() -> None:
    assert faults() > PAGES / 2
    with keep_memory():
        assert faults() < PAGES / 2
        with keep_memory():
            assert faults() < PAGES / 2
        assert faults() < PAGES / 2, "the outer one still holds"
    assert faults() > PAGES / 2


def test_it_ends_with_an_exception_too() -> None:
    with pytest.raises(RuntimeError), keep_memory():
        raise RuntimeError
    assert faults() > PAGES / 2
