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

def look():
    asked = []
    for _ in range(24):  # the fewest, once the heap has settled: small blocks of the first rounds lie in between
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty({BLOCK}).fill_(1.0)
        asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(asked), resident())

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

look()
with keep_memory():
    look()
    with keep_memory():
        look()
    look()
print(resident())
try:
    with keep_memory():
        look()
        raise RuntimeError
except RuntimeError:
    print(resident())
"""


@pytest.mark.skipif(not can_keep_memory(), reason="not glibc")
def test_freed_memory_serves_again_inside_and_is_given_back_at_the_end() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = [list(map(int, line.split())) for line in run.stdout.splitlines()]
    (asked, held), *inside = (found[i] for i in (0, 1, 2, 3, 5))
    assert asked > PAGES / 2
    assert all(faults < PAGES / 2 and resident > held + 2 * BLOCK for faults, resident in inside)
    assert all(resident < held + BLOCK for (resident,) in (found[4], found[6]))
