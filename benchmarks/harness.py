"""How a row is measured: every contender in one process, in turn, medians; bytes from a written model beside the time.

On the CPU a measurement repeats a call for about five milliseconds, caches warm as in training. On CUDA each call
is timed by events with a cold L2 (a buffer larger than L2 is written in between).
"""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache

import torch

import atlas_kernels as ak
from atlas_kernels.core import ISAS, core
from atlas_train.peak_memory import peak_memory as peak_memory
from atlas_train.results import commit, cpu_name

ROUNDS = 21
_GPU_FACTS = "driver_version,clocks.sm,clocks.mem,power.limit"
Call = Callable[[], object]


@dataclass
class Row:
    """One operator at one size."""

    op: str
    size: str
    bytes: int  # by the model of the benchmark that made the row
    times: dict[str, float]  # seconds, medians; "ours" and the contenders
    copy_bandwidth: float  # bytes/s of copying the same amount, same run
    checked: bool  # ours gave the expected result in this run
    target: float | None = None  # the share of that bandwidth which is aimed at

    def best(self, *prefixes: str) -> float | None:
        """The fastest contender whose name starts with one of these."""
        times = [t for name, t in self.times.items() if name.startswith(prefixes)]
        return min(times) if times else None

    @property
    def share(self) -> float:
        """Of the copy bandwidth."""
        return self.bytes / self.times["ours"] / self.copy_bandwidth

    def target_line(self) -> str:
        """Figure and target, where there is one."""
        if self.target is None:
            return ""
        verdict = "reached" if self.share >= self.target else "MISSED"
        return f"{self.op} {self.size}: {self.share:.0%} of copy, target {self.target:.0%}: {verdict}"

    def table_line(self) -> list[str]:
        ours = self.times["ours"]
        bandwidth = self.bytes / ours
        ratios = ["-" if best is None else f"{best / ours:.2f}x" for best in (self.best("plain"), self.best("compile"))]
        others = ", ".join(f"{name} {t * 1e6:.1f}" for name, t in self.times.items() if name != "ours")
        floor = self.bytes / self.copy_bandwidth
        numbers = [f"{ours * 1e6:.1f}", f"{bandwidth / 1e9:.1f}", f"{floor * 1e6:.1f}", f"{self.share:.0%}"]
        return [self.op, self.size, *numbers, *ratios, others]


HEADER = ["op", "size", "ours us", "GB/s", "floor us", "of copy", "vs plain", "vs compile", "contenders (us)"]


def interleaved(calls: dict[str, Call], device: torch.device, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each call, measured in turn."""
    once = _once_cuda if device.type == "cuda" else _once_cpu
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        synchronise(device)
        repeats[name] = max(1, int(5e-3 / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(once(call, repeats[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Call, device: torch.device) -> float:
    """One call that takes long, as it is: no repeats, caches as they are."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


@contextmanager
def strict_fp32() -> Iterator[None]:
    """float32 is float32 inside, on CUDA too, where convolutions by PyTorch's default round their inputs to TF32."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(low, high, coverage): the order statistics nearest to the median that enclose the true one with probability
    ``level``; the smallest and the largest value where there are too few for that."""
    ordered, n = sorted(values), len(values)
    covered = [1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    k = max((k for k, share in enumerate(covered) if share >= level), default=0)
    return ordered[k], ordered[n - 1 - k], max(covered[k], 0.0)


def _once_cpu(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _once_cuda(call: Call, repeats: int) -> float:
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(8):  # more than once, so that the device is busy until all is enqueued: events time kernels alone
        flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def copy_calls(numel: int, device: torch.device) -> Call:
    """A plain copy of ``numel`` floats: 8 bytes of traffic each."""
    source, target = torch.rand(numel, device=device), torch.empty(numel, device=device)
    return lambda: target.copy_(source)


def measure(
    op: str, size: tuple[int, ...], model_bytes: int, calls: dict[str, Call], checked: bool, device: torch.device,
    target: float | None = None,
) -> Row:  # fmt: skip
    """Measure ``calls`` ("ours" among them) against a copy that moves as many bytes."""
    numel = model_bytes // 8
    times = interleaved({**calls, "copy": copy_calls(numel, device)}, device)
    bandwidth = 8 * numel / times.pop("copy")
    return Row(op, "x".join(map(str, size)), model_bytes, times, bandwidth, checked, target)


def environment() -> dict[str, object]:
    """What the numbers were measured on."""
    module = core()
    facts: dict[str, object] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": ISAS[module.current_isa()],
        "openmp": module.openmp,
        "build": module.build_notes,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "atlas_kernels": ak.__version__,
        "commit": commit(7) or "unknown",
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(0),
            "cuda": torch.version.cuda,
            "driver, clocks": _run("nvidia-smi", f"--query-gpu={_GPU_FACTS}", "--format=csv,noheader"),
        }
    return facts


@cache
def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def as_json(rows: list[Row]) -> dict[str, object]:
    """Environment and rows, ready to be written."""
    return {"environment": environment(), "rows": [asdict(row) for row in rows]}
