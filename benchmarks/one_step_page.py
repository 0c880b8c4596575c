"""Fills the tables of docs/one_step.md: what one-step methods cost, what is published of them, what was measured here.

    python benchmarks/one_step_page.py             fills the page; passes and kept memory are counted, in seconds
    python benchmarks/one_step_page.py --memory    also measures the memory of a step, into benchmarks/results

Published figures are those of ``one_step_published.json``, which names their source. Ours are read from
benchmarks/results: fastat-ROW.json is the results.json of ``atlas train --protocol fastat --seeds``, collapse-ROW.json
and collapse-ROW.csv are the results.json and the log.csv of a small run that may collapse. A row whose method is not
there is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas_train import methods, models
from atlas_train.descent import OptimizerDescent
from atlas_train.methods import Batch, Method, State
from atlas_train.noise import noise_keys
from atlas_train.passes import count_passes
from atlas_train.peak_memory import peak_memory
from atlas_train.writing import write_json, write_text
from harness import environment
from tables import Table, markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "one_step.md", ROOT / "benchmarks" / "results"
PUBLISHED = json.loads((ROOT / "benchmarks" / "one_step_published.json").read_text(encoding="utf-8"))["methods"]
MEMORY = "one-step-memory-cpu.json"
BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: Training images of CIFAR-10 beside 1,000 of validation.
IMAGES = 49_000
#: Of the network whose step's memory is measured: narrow, so that a CPU measures it in a minute.
WIDTH, BATCH = 16, 32


@dataclass(frozen=True)
class Row:
    """A line of the tables. passes: as its code in the FastAT Benchmark makes them, read there at commit b99c0de6: a
    forward, a backward to the input and a backward to the weights are one each; None: not read. flags: of ``atlas
    train``."""

    title: str
    method: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    passes: str | None = None
    flags: str = ""

    @property
    def is_there(self) -> bool:
        """Whether we have the method, with these hyper-parameters."""
        try:
            methods.build(self.method, 8 / 255, self.hyper)
        except ValueError:
            return False
        return True

    @property
    def command(self) -> str:
        return f"--method {self.method}" + (f" {self.flags}" if self.flags else "")


#: By their names in the benchmark, in the order of its AutoAttack accuracy on CIFAR-10; then ours, which it has not.
ROWS = {
    "pgd_at_wa": Row("PGD-10", "adv", {}, "23"),
    "nu_at": Row("NuAT", "nuat", {}, "10 or 12"),
    "liet": Row("LIET", "liet", {}, "8"),
    "fgsm_pgi": Row("FGSM-PGI", "fgsm_pgi", {}, "8"),
    "fgsm_cuap": Row("FGSM-CUAP", "fgsm_uap", {"per_class": True}, "8", "--per-class"),
    "fgsm_uap": Row("FGSM-UAP", "fgsm_uap", {}, "8"),
    "gat": Row("GAT", "gat", {}, "10 or 12"),
    "grad_align": Row("GradAlign", "grad_align", {}, "11"),
    "n_fgsm": Row("N-FGSM", "n_fgsm", {}, "6"),
    "pgd_at": Row("PGD-10, not averaged", "adv", {}, "23", "--averaging none"),
    "fgsm_rs": Row("FGSM-RS", "one_step_adv", {}, "6"),
    "atlas_default": Row("ATLAS, as by default on CIFAR-10", "atlas", methods.ATLAS.defaults["cifar10"]),
    "atlas": Row("ATLAS, local term at neighbours", "atlas", {"local": "neighbours"}, None, "--local neighbours"),
    "atlas_start": Row(
        "ATLAS, local term at the start", "atlas", {"local": "start"}, None, "--local start --start-noise uniform"
    ),
}


def rows() -> dict[str, Row]:
    return {name: row for name, row in ROWS.items() if row.is_there}


class Steps:
    """Training steps of a method, one after another, on a batch of noise."""

    def __init__(self, row: Row, model: nn.Module, images: int, size: int) -> None:
        torch.manual_seed(0)
        self.method: Method = methods.build(row.method, 8 / 255, row.hyper)
        self.model, self.images = model.train(), images
        self.batch = Batch(torch.rand(images, 3, size, size), torch.arange(images) % 10, torch.arange(images))
        self.optimizer = torch.optim.SGD(model.parameters(), 0.0)
        self.memory: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Callable[[], object]]:
        """The step of each batch in turn, in the third of four epochs, so that weights that grow have begun to."""
        for number in range(4):
            key = noise_keys(0, number, 1)[0]
            state = State(8 + number, 16, 2, 4, self.images, self.memory)
            self.method.before_step(self.model, self.batch, key, state)
            descent = OptimizerDescent(self.optimizer, lambda update: 0.0)
            yield partial(self.method.train_step, self.model, self.batch, key, state, descent)


def passes(row: Row) -> list[int]:
    """What our steps make, in whole passes: those that take turns in ascending order."""
    torch.manual_seed(0)
    layers = (  # of which the first costs next to nothing, so that its missing gradient does not show
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    steps = Steps(row, nn.Sequential(*layers), 10, 8)
    return sorted({round(count_passes(steps.model, steps.batch.x, step)) for step in steps})


def kept(row: Row) -> int:
    """Bytes that the method keeps from batch to batch, for the training images of CIFAR-10."""
    images = 49  # of which IMAGES is a multiple
    steps = Steps(row, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), images, 32)
    for step in steps:
        step()
    rows_of = {name: len(value) if value.dim() else 1 for name, value in steps.memory.items()}
    return sum(
        value.nbytes * (IMAGES // images if rows_of[name] == images else 1) for name, value in steps.memory.items()
    )


def peak(row: Row) -> int:
    """The most that torch holds at once in a step beside weights and what is kept."""
    torch.manual_seed(0)
    model = models.build("resnet18", num_classes=10, in_channels=3, width=WIDTH, normalize=False)
    return max(peak_memory(step, torch.device("cpu")) for step in Steps(row, model, BATCH, 32))


def measure_memory(path: Path) -> None:
    """Writes the peaks of all rows, and of standard training; those that were measured on such a machine stay."""
    machine = environment()
    what = {
        "network": "resnet18",
        "width": WIDTH,
        "batch_size": BATCH,
        "cpu": machine["cpu"],
        "torch": machine["torch"],
    }
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    made = found["bytes"] if all(found.get(name) == value for name, value in what.items()) else {}
    wanted = {"standard": Row("standard", "standard"), **rows()}
    made = {name: made[name] if name in made else peak(row) for name, row in wanted.items()}
    write_json(path, {"command": "python benchmarks/one_step_page.py --memory", **what, "bytes": made})


def passes_table() -> Table:
    lines = [["method", "here", "passes as published", "passes here"]]
    for row in rows().values():
        lines.append([row.title, f"`{row.command}`", row.passes or "-", " or ".join(map(str, passes(row)))])
    return lines


def accuracy_table(results: Path) -> Table:
    """Published accuracies beside those that were measured here, in percent."""
    lines = [["method", "clean", "PGD-50", "AA", "lowest AA", "AA here", "CIFAR-100: AA", "Tiny-ImageNet: AA", "min"]]
    for name, row in rows().items():
        cells = ["-"] * 8
        if known := PUBLISHED.get(name):
            ten = known["cifar10"]
            cells = [f"{ten[key]:.2f}" for key in ("clean", "pgd_50", "aa", "aa_lowest")]
            cells += ["-", *(f"{known[data]['aa']:.2f}" for data in ("cifar100", "tiny")), f"{ten['minutes']:.1f}"]
        cells[4] = ours(results / f"fastat-{name}.json", row.method)
        lines.append([row.title, *cells])
    return lines


def ours(path: Path, method: str) -> str:
    """The AutoAttack accuracy of the best epoch in the results of several seeds: mean and standard deviation."""
    if not path.exists():
        return "-"
    found = json.loads(path.read_text(encoding="utf-8"))["methods"][method]
    aa = found.get("best", found)["autoattack"]
    return f"{100 * aa['mean']:.2f}" + (f" ± {100 * aa['deviation']:.2f}" if aa["deviation"] is not None else "")


def collapse_table(results: Path) -> Table:
    """What the small runs came to, in percent: a test at the end, and training images in the last epoch."""
    lines = [["method", "clean", "PGD-20", "APGD", "own adversaries", "PGD-5", "outcome"]]
    for name, row in rows().items():
        if not (results / f"collapse-{name}.json").exists():
            continue
        found = json.loads((results / f"collapse-{name}.json").read_text(encoding="utf-8"))["methods"][row.method]
        with (results / f"collapse-{name}.csv").open(encoding="utf-8", newline="") as file:
            *_, last = csv.DictReader(file)
        shares = [found["clean"], found["pgd"], found["autoattack"]["accuracy"], last["adv"], last["probe"]]
        epochs = ", ".join(str(epoch) for epoch, _ in found["collapses"])
        survives = not epochs and float(last["probe"]) >= float(last["adv"]) / 2
        outcome = "survives" if survives else f"collapses in epoch {epochs}" if epochs else "collapses"
        lines.append([row.title, *(f"{100 * float(share):.1f}" for share in shares), outcome])
    return lines


def memory_table(results: Path) -> Table:
    peaks = json.loads((results / MEMORY).read_text(encoding="utf-8"))["bytes"]
    lines = [["method", "GiB as published", "of a step, standard training = 1", "kept from batch to batch"]]
    for name, row in rows().items():
        known = PUBLISHED.get(name)
        step = f"{peaks[name] / peaks['standard']:.2f}" if name in peaks else "-"
        lines.append([row.title, f"{known['cifar10']['gib']:.2f}" if known else "-", step, size(kept(row))])
    return lines


def size(count: int) -> str:
    """Bytes in words: 1.2 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B" if count else "-"


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with every table as it is now."""
    made = {
        "passes": passes_table,
        "accuracy": partial(accuracy_table, results),
        "collapse": partial(collapse_table, results),
        "memory": partial(memory_table, results),
    }

    def content(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return f"{begin}\n{markdown(made[name]())}\n\n{end}"

    return BLOCK.sub(content, text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help=f"measure the memory of a step, into {MEMORY}")
    if parser.parse_args(arguments).memory:
        measure_memory(RESULTS / MEMORY)
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    print(f"{PAGE} is filled: {', '.join(rows())}")


if __name__ == "__main__":
    main()
