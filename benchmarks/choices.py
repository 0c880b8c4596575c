"""What each choice gains, one after the other: layout, memory, precision, graphs, compilation.

    python benchmarks/choices.py [--network NAME] [--results FILE.json] [--compile]

Every row adds one choice to those above it. PGD is timed alone, and in a training step of TRADES, whose attack is PGD
in eval mode; rows take turns, and medians are compared. Rows that need a GPU, or --compile, are left out without it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import subjects
from atlas_kernels import keep_memory
from harness import seconds
from subjects import Setting
from tables import Table, aligned, command_line, markdown, write


@dataclass(frozen=True, eq=False)
class Choice:
    """A row: what it adds to the setting of the row above. keep: inside ``keep_memory`` from here on."""

    name: str
    adds: dict[str, Any]
    keep: bool = True


CHOICES = (
    Choice("as found: float32, NCHW", {"channels_last": False}, keep=False),
    Choice("channels_last", {"channels_last": True}, keep=False),
    Choice("keep_memory", {}),
    Choice("bf16, in the attack", {"attack_precision": "bf16"}),
    Choice("bf16, in training too", {"precision": "bf16"}),
    Choice("cuda_graphs, of the attack", {"cuda_graphs": True}),
    Choice("cuda_graphs, of the whole step", {"step_graphs": True}),
    Choice("compile", {"compile": True}),
)


def rows_of(base: Setting, compiled: bool) -> dict[Choice, Setting]:
    """Each choice that can be had here, with all that it stands for."""
    found = {}
    for choice in CHOICES:
        graphs = choice.adds.keys() & {"cuda_graphs", "step_graphs"}
        if not (base.device == "cpu" if graphs else choice.adds.get("compile") and not compiled):
            base = found[choice] = replace(base, **choice.adds)
    return found


def measure(found: dict[Choice, Setting], steps: int, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Seconds of the attack and of the training step in every round so far, a row per choice; after each round."""
    rows: list[dict[str, Any]] = []
    calls = {}
    for choice, s in found.items():
        calls[choice] = {"attack": subjects.attack(s, steps), "step": subjects.training_step(s, "trades", steps=steps)}
        rows.append({"name": choice.name, **asdict(s), "keep_memory": choice.keep, "attack": [], "step": []})
    for _ in range(rounds):
        for (choice, own), row in zip(calls.items(), rows, strict=True):
            with keep_memory() if choice.keep else nullcontext():
                for work, call in own.items():
                    call()  # compiles, and fills the memory that is kept
                    row[work].append(seconds(call, torch.device(row["device"])))
        yield rows


def table(rows: Sequence[dict[str, Any]], steps: int) -> Table:
    lines = [["", f"PGD-{steps} ms", "gain", "in all", f"TRADES step (K = {steps}) ms", "gain", "in all"]]
    times = [{work: statistics.median(row[work]) for work in ("attack", "step")} for row in rows]
    for row, own, above in zip(rows, times, [times[0], *times], strict=False):
        cells = [
            [f"{1e3 * own[work]:.1f}", f"{above[work] / own[work]:.2f}x", f"{times[0][work] / own[work]:.2f}x"]
            for work in own
        ]
        lines.append([row["name"], *cells[0], *cells[1]])
    return lines


NOTE = (
    "Medians of rounds in one process, rows in turn, each after an untimed call. gain: the time of the row above over "
    "this one's; in all: that of the first row."
)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="What each choice gains, one after the other.")
    parser.add_argument("--network", default="preact_resnet18", choices=("preact_resnet18", "small_cnn"))
    parser.add_argument("--width", type=int, help="of the network; default: the published one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="of the attack; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="write the numbers there, the table as .md")
    o = parser.parse_args(arguments)
    image = 28 if o.network == "small_cnn" else 32
    base = Setting(o.network, o.width, o.batch_size, image, threads=torch.get_num_threads(), device=o.device)
    title = f"Choices, one after the other: {o.network}, batch of {o.batch_size}"
    command = command_line(__file__, arguments)
    for rows in measure(rows_of(base, o.compile), o.steps, o.rounds):
        lines = table(rows, o.steps)
        if o.results:
            write(o.results, title, command, {"steps": o.steps, "rows": rows}, [markdown(lines), NOTE])
    print(f"{title}\n\n{aligned(lines)}\n\n{NOTE}")


if __name__ == "__main__":
    main()
