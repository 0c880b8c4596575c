"""What a call costs the host: `python benchmarks/host_time.py` prints it, beside the floor and the fastest plain form.

A thousand calls in a row without synchronisation, key given, all checks on: on CUDA this is the time until the call
returns, on a CPU the work on the images is in it. Medians of the runs. "clock" is the time that passed; the other
columns are the time that this thread had a processor, which other programs on the machine hardly change.

The floor, below which no operator of PyTorch written in Python is: an operator of torch.library and an
autograd.Function that do nothing, and a new tensor. "raw" is the operator's implementation, without the checks of the
public function.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import atlas_kernels as ak
import bench_perturb as images
from atlas_kernels import backends
from bench_losses import consistency_plain, with_backward
from bench_perturb import COUNT, EPS, RADIUS, STEP
from harness import Call, environment, synchronise

DEVICE = images.DEVICE
SIZES = [(1, 1, 28, 28), (128, 3, 32, 32)]
HEADER = ["call", "size", "us", "clock us", "plain us", "raw us", "target us"]
# On CUDA, where the time is Python's and the launch's alone.
TARGETS = {"pgd_step": 15, "random_start": 15, f"pgd_step_neighbours n={COUNT}": 25} if DEVICE.type == "cuda" else {}
LONG = 0.3  # seconds, after which a run ends early
Row = tuple[str, str, Call, Call | None, Call | None]


def per_call(call: Call, calls: int, runs: int) -> tuple[float, float]:
    """Median seconds of one call, of ``calls`` in a row: of the thread, and by the clock."""
    once = min(_run(call, 10)[1] for _ in range(3))
    calls = min(calls, int(LONG / once) + 1)
    threads, clocks = zip(*(_run(call, calls) for _ in range(runs)), strict=True)
    return statistics.median(threads), statistics.median(clocks)


def _run(call: Call, calls: int) -> tuple[float, float]:
    synchronise(DEVICE)
    thread, clock = time.thread_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return (time.thread_time() - thread) / calls, (time.perf_counter() - clock) / calls


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.new_empty(())

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        return cotangent


def floors() -> Iterator[Row]:
    """What is called, not what is done: nothing."""
    library = torch.library.Library("atlas_host_time", "FRAGMENT")
    library.define("empty(Tensor x, Tensor(a!) out) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("empty", lambda x, out: None, key)
    operator, x = torch.ops.atlas_host_time.empty.default, torch.rand(1, 1, 28, 28, device=DEVICE)
    leaf = torch.zeros((), device=DEVICE, requires_grad=True)
    yield "floor: a new tensor", "1x1x28x28", lambda: torch.empty_like(x), None, None
    yield "floor: an empty operator", "1x1x28x28", lambda library=library: operator(x, x), None, None
    yield "floor: an empty autograd.Function", "1", lambda: _Empty.apply(leaf), None, None
    backward = with_backward(_Empty.apply, (leaf,))
    yield "floor: the same, forward and backward", "1", backward, None, None


def image_rows(size: tuple[int, ...]) -> Iterator[Row]:
    adv, grad, x = images.images(size)
    key, name = ak.noise_key(DEVICE), "x".join(map(str, size))
    bounds, noise = (0.0, None, 1.0, None), (key, None, 0)
    out, many = torch.empty_like(x), torch.empty((2 + COUNT) * size[0], *size[1:], device=DEVICE)
    ball, step, near = (EPS, None), (STEP, None), (RADIUS, None)
    implementation = backends._implementations
    yield (
        "pgd_step", name, lambda: ak.pgd_step(adv, grad, x, EPS, STEP),
        lambda: images.step_delta(adv, grad, x),
        partial(implementation["pgd_step"], (adv, grad, x, *ball, *step, *bounds, False, None, out, None)),
    )  # fmt: skip
    yield (
        "random_start", name, lambda: ak.random_start(x, EPS, key=key), lambda: images.start_plain(x),
        partial(implementation["random_start"], (x, *ball, *bounds, *noise, out)),
    )  # fmt: skip
    yield (
        f"pgd_step_neighbours n={COUNT}", name,
        lambda: ak.pgd_step_neighbours(adv, grad, x, EPS, STEP, RADIUS, COUNT, key=key),
        partial(images.step_neighbours_plain(images.step_delta), adv, grad, x),
        partial(implementation["pgd_step_neighbours"], (adv, grad, x, *ball, *step, *near, COUNT, False, True, *bounds,
                                                        False, None, *noise, many)),
    )  # fmt: skip


def loss_rows(size: tuple[int, int]) -> Iterator[Row]:
    z, y = torch.randn(size, device=DEVICE), torch.randint(size[1], size[:1], device=DEVICE)
    name = "x".join(map(str, size))
    leaf, value, total = z.clone().requires_grad_(), z.new_empty(size[0]), z.new_empty(())
    yield (
        "cross_entropy", name, lambda: ak.cross_entropy(z, y), lambda: F.cross_entropy(z, y),
        partial(backends._implementations["cross_entropy"], (z, y, 0.0, None, 1.0, value, total, None)),
    )  # fmt: skip
    ours, plain = (with_backward(loss, (leaf, y)) for loss in (ak.cross_entropy, F.cross_entropy))
    yield "cross_entropy, forward and backward", name, ours, plain, None
    other = torch.randn(size, device=DEVICE, requires_grad=True)
    forms = partial(ak.consistency_loss, distance="js"), consistency_plain("js", 1.0)
    ours, plain = (with_backward(loss, (leaf, other, y)) for loss in forms)
    yield "consistency_loss js, forward and backward", name, ours, plain, None
    yield "attack_cotangent ce", name, lambda: ak.attack_cotangent(z, y), lambda: _closed(z, y), None


def _closed(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(1)
    return p.scatter_add_(1, y[:, None], torch.full_like(z[:, :1], -1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--only", default="", help="names that begin so")
    options = parser.parse_args()
    rows = [*floors(), *(row for size in SIZES for row in image_rows(size)), *loss_rows((128, 10))]
    for name, value in environment().items():
        print(f"  {name}: {value}")
    print(_line(HEADER), flush=True)
    for name, size, *calls in (row for row in rows if row[0].startswith(options.only)):
        ours, *others = (call and per_call(call, options.calls, options.runs) for call in calls)
        assert ours is not None
        times = [*ours, *(None if other is None else other[0] for other in others)]
        shown = ("" if t is None else f"{1e6 * t:.2f}" for t in times)
        print(_line([name, size, *shown, str(TARGETS.get(name, ""))]), flush=True)


def _line(cells: Sequence[str]) -> str:
    """Of a table that is printed as it comes."""
    name, *rest = cells
    return f"{name:40}" + "".join(f"{cell:>13}" for cell in rest)


if __name__ == "__main__":
    main()
