"""The scaling study: what an attack and a training step cost per image, against batch, images, classes, steps, threads.

    python benchmarks/scaling.py [--results FILE.json] [--plots FOLDER] [--rounds N] [--quick]
    python benchmarks/scaling.py --results FILE.json --plots FOLDER --plots-only

One point is varied around 64 images of 32x32 in 10 classes, once per axis, in float32 and in bf16. Beside each
measured time stand two floors of the same run: the bare passes of the network that no attack or update can do without,
at the same sizes and precision; and the floating-point operations at the rate of a large matrix product. Ours and the
bare passes run in channels_last inside ``keep_memory``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Points are taken in turn: with oneDNN's usual capacity each would find its kernels evicted by the others.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import torch

import subjects
from atlas_kernels import keep_memory
from atlas_train import methods
from atlas_train.passes import Products
from harness import Call
from network_passes import Attack
from scaling_report import ATTACK, NOTE, PRECISIONS, draw, tables
from steps import STEPS
from subjects import Setting, Timed, in_turn
from tables import aligned, command_line, markdown, write

METHODS = ("one_step_adv", "atlas")
USUAL, FEW = 10, 4  # attack steps where they are not what is varied; at most so many bare ones are timed


@dataclass(frozen=True)
class Point:
    """One measurement: ``work`` at a setting, as a point of ``axis``. steps: of the attack, in training too."""

    axis: str
    work: str
    setting: Setting
    steps: int

    @property
    def at(self) -> int:
        """Where on the axis."""
        return self.steps if self.axis == "steps" else getattr(self.setting, self.axis)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Piece:
    """A call that is timed: a point's work, or what it is measured against; equal pieces are timed once."""

    kind: str
    setting: Setting
    steps: int = 1

    def call(self) -> Call:
        s = self.setting
        match self.kind.partition(" of ")[::2]:
            case "PGD", _:
                return subjects.attack(s, self.steps)
            case "operators", _:
                return subjects.attack_operators(s, self.steps)
            case "passes", "PGD":
                return subjects.bare_passes(s, [Attack(self.steps, "eval")])
            case "passes", method:
                return subjects.bare_passes(s, STEPS[method].passes(methods.build(method, subjects.EPS, {}), 0))
            case "matrix product", _:
                return subjects.matrix_product(s)[0]
            case method, _:
                return subjects.training_step(s, method)


def work_of(p: Point) -> Piece:
    return Piece(p.work, p.setting, p.steps)


def passes_of(p: Point) -> Piece:
    """The bare passes that the work cannot do without; of an attack's, a few."""
    return Piece(f"passes of {p.work}", p.setting, min(p.steps, FEW))


def operators_of(p: Point) -> Piece:
    return Piece("operators", p.setting, p.steps)


def product_of(p: Point) -> Piece:
    s = p.setting
    return Piece("matrix product", Setting(precision=s.precision, threads=s.threads, device=s.device))


def points(device: str, quick: bool) -> Iterator[Point]:
    """The study: what is varied, and where. On a GPU the network has its published width, and threads play no part."""
    most = 1 if quick else torch.get_num_threads()
    base = Setting(threads=most, device=device, width=64 if device == "cuda" else 16)
    small = replace(base, network="small_cnn", width=4 if quick else 32, image=28)
    few, tiny = replace(base, batch=16), replace(base, batch=8)
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    sides: Sequence[int] = (28, 32, 48, 64, 96, 128)
    steps: Sequence[int] = (1, 2, 5, 10, 20, 50)
    if quick:
        base = few = tiny = replace(base, batch=2, image=16)
        batches, sides, steps = (2, 4), (16,), (1, 2)
    threads = sorted({*(2**k for k in range(most.bit_length())), most}) if device == "cpu" else ()
    axes: dict[str, tuple[Setting, Sequence[int]]] = {
        "batch": (base, batches),
        "image": (tiny, sides),
        "classes": (base, (10, 100, 1000)),
        "threads": (base, threads),
    }
    for precision in PRECISIONS:
        for axis, (around, values) in axes.items():
            for value in values:
                setting = replace(around, precision=precision, **{axis: value})  # type: ignore[arg-type]
                yield from every_work(axis, setting)
        for batch in batches:
            yield from every_work("batch", replace(small, precision=precision, batch=batch))
        for setting in (few, replace(small, batch=16)):
            yield from (Point("steps", ATTACK, replace(setting, precision=precision), count) for count in steps)


def every_work(axis: str, setting: Setting) -> Iterator[Point]:
    yield Point(axis, ATTACK, setting, USUAL)
    yield from (Point(axis, method, setting, 1) for method in METHODS)


def study(found: Sequence[Point], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Times everything in turn; after each round a row per point, seconds and floating-point operations of the whole
    batch."""
    device = found[0].setting.device
    pieces = {of(p): None for p in found for of in (work_of, passes_of, product_of)}
    pieces |= {operators_of(p): None for p in found if p.work == ATTACK}
    with keep_memory():
        flops = {piece: operations(piece.call()) for piece in dict.fromkeys(work_of(p) for p in found)}
        for timed in in_turn({piece: (piece.call(), piece.setting.threads) for piece in pieces}, rounds, device):
            yield [row(p, timed, flops[work_of(p)]) for p in found]


def row(p: Point, timed: dict[Piece, Timed], flops: int) -> dict[str, Any]:
    product = subjects.matrix_product(product_of(p).setting)[1] / timed[product_of(p)].median
    return {
        "axis": p.axis,
        "work": p.work,
        "steps": p.steps,
        **asdict(p.setting),
        "at": p.at,
        "seconds": asdict(timed[work_of(p)]),
        "passes_seconds": timed[passes_of(p)].median * p.steps / passes_of(p).steps,
        "flops": flops,
        "product_flops_per_second": product,
        "flops_seconds": flops / product,
        "operators_seconds": timed[operators_of(p)].median if p.work == ATTACK else None,
    }


def operations(call: Call) -> int:
    with Products() as counted:
        call()
    return 2 * counted.total  # a multiplication and an addition


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="Cost per image of attacks and training steps, beside its floors.")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="numbers; the tables go beside it as .md")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the figures there")
    parser.add_argument("--plots-only", action="store_true", help="draw from --results, measure nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few tiny points, to see that it works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    o = parser.parse_args(arguments)
    if o.plots_only and not (o.results and o.plots):
        parser.error("--plots-only draws from --results into --plots: give both")
    name = o.results.stem if o.results else f"scaling-{o.device}"
    if o.plots_only:
        rows = json.loads(o.results.read_text(encoding="utf-8"))["rows"]
    else:
        command = command_line(__file__, arguments)
        for rows in study(list(points(o.device, o.quick)), o.rounds):
            found = tables(rows)
            if o.results:
                parts = [part for heading, table in found.items() for part in (f"## {heading}", markdown(table))]
                write(o.results, "Cost per image against sizes", command, {"rows": rows}, [*parts, NOTE])
        for heading, table in found.items():
            print(f"\n{heading}\n\n{aligned(table)}")
        print(f"\n{NOTE}")
    for path in draw(rows, o.plots, name) if o.plots else ():
        print(f"drawn: {path}")


if __name__ == "__main__":
    main()
