"""Memory that is kept is not asked for again: counted in page faults, which a new page costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from atlas_kernels import can_keep_memory

BLOCK = 16 << 20  # floats: 64 MiB, more than glibc ever keeps by itself
PAGES = BLOCK * 4 // (2 << 20)  # at the least: a system may hand out pages of 2 MiB
#: In a process of its own: what other tests have left in the heap is not what is tested.
SCRIPT = f"""
import resource
import torch
from atlas_kernels import keep_memory

def faults():
    asked = []
    for _ in range(6):  # the fewest, once the heap has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty({BLOCK}).fill_(1.0)
        asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(asked)

found = [faults()]
with keep_memory():
    found.append(faults())
    with keep_memory():
        found.append(faults())
    found.append(faults())
found.append(faults())
try:
    with keep_memory():
        raise RuntimeError
except RuntimeError:
    found.append(faults())
print(*found)
"""


@pytest.mark.skipif(not can_keep_memory(), reason="not glibc")
def test_freed_memory_serves_again_inside_and_only_there() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, inside, nested, still_inside, after, after_an_error = map(int, run.stdout.split())
    assert min(before, after, after_an_error) > PAGES / 2
    assert max(inside, nested, still_inside) < PAGES / 2
