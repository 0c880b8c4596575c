"""Where a training step's time goes: by kind of work, the published step beside ours, in fp32 and in bf16.

    python benchmarks/profile_step.py --method trades --network preact_resnet18 [--batch-size N] [--results FILE.json]

The steps are those of ``bench_training_step.py``, its rows and its images. Every kind is the time of its operators
alone, as torch's profiler gives it (on a GPU: of the device); what the step takes beside them, the interpreter's and
the profiler's own time among it, is the last row.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from atlas_kernels import keep_memory
from atlas_kernels.backends import native
from atlas_kernels.schema import NAMESPACE
from bench_training_step import NETWORKS, Bench, Contest, Settings
from harness import Call, seconds
from steps import STEPS
from tables import Table, aligned, command_line, markdown, write

#: Kinds of work by what an operator's name holds, the first that fits; what fits none is pointwise or a reduction.
KINDS = {
    "our operators": ("atlas",),
    "convolutions, backward": ("convolution_backward", "conv_backward", "dgrad", "wgrad", "bwd"),
    "convolutions, forward": ("convolution", "conv2d", "conv_depthwise", "fprop"),
    "BatchNorm": ("batch_norm", "bn_fw", "bn_bw"),
    "optimiser": ("_foreach_", "_fused_", "Optimizer.", "multi_tensor_apply"),
    "matrix products": ("mm", "gemm", "linear", "dot"),
    "copies: layout and dtype": ("copy_", "_to_copy", "clone", "contiguous", "aten::to", "Memcpy", "nchwToNhwc"),
    "fills and new memory": ("empty", "fill_", "zero", "Memset", "resize"),
}
POINTWISE, REST = "pointwise and sums", "the rest: Python, autograd, waiting"


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), POINTWISE)


def announce_operators() -> None:
    """Our operators go straight to their kernels, past the dispatcher where the profiler listens: here they are named.

    Has to come before the first of them is called.
    """
    made = native.implementation

    def announced(stem: str, name: str) -> Callable[[tuple[Any, ...]], None]:
        return record_function(f"{NAMESPACE}::{name}")(made(stem, name))

    native.implementation = announced


def profiled(call: Call, device: torch.device) -> Counter[str]:
    """Milliseconds of ``call()`` by kind, after an untimed call; all of them together are the call's own time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    call()
    with profile(activities=activities, acc_events=True) as found:
        whole = 1e3 * seconds(call, device)
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[kind_of(event.key)] += own / 1e3
    spent[REST] = whole - spent.total()
    return spent


def table(columns: dict[str, Counter[str]]) -> Table:
    lines = [["ms", *(cell for name in columns for cell in (name, "share"))]]
    for kind in (*KINDS, POINTWISE, REST):
        cells = [(f"{spent[kind]:.1f}", f"{spent[kind] / spent.total():.1%}") for spent in columns.values()]
        lines.append([kind, *(cell for pair in cells for cell in pair)])
    return [*lines, ["the step", *(cell for s in columns.values() for cell in (f"{s.total():.1f}", ""))]]


NOTE = (
    "Milliseconds of one step by kind of work, each the time of its operators alone, and their share. The rest is what "
    "the step takes beside them, the profiler's own time among it."
)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="Where a training step's time goes, the published one beside ours.")
    parser.add_argument("--method", default="trades", choices=tuple(STEPS))
    parser.add_argument("--network", default="preact_resnet18", choices=tuple(NETWORKS))
    parser.add_argument("--batch-size", type=int, help="default: that of the network")
    parser.add_argument("--width", type=int, help="of the network; default: the published one")
    parser.add_argument("--steps", type=int, default=10, help="of the attacks that take several")
    parser.add_argument("--data-dir", help="folder with the data set's files; default: synthetic images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="write the numbers there, the table as .md")
    options = vars(parser.parse_args(arguments))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop
    method, results = options.pop("method"), options.pop("results")
    announce_operators()
    contest = Contest(Bench(Settings(**options)), method)
    columns = {}
    for name, call in contest.calls.items():
        if not name.startswith("bare"):
            with keep_memory() if name.startswith("ours") else nullcontext():
                columns[name] = profiled(call, contest.device)
    lines = table(columns)
    title = f"Where a step's time goes: {method}, {options['network']}, batch {len(contest.batch.y)}"
    print(f"{title}\n\n{aligned(lines)}\n\n{NOTE}")
    if results:
        write(results, title, command_line(__file__, arguments), {"milliseconds": columns}, [markdown(lines), NOTE])


if __name__ == "__main__":
    main()
