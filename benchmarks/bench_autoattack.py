"""AutoAttack: ours beside pyautoattack, on networks that `atlas train` has trained.

    pip install --no-deps -r tests/peers.txt
    python benchmarks/bench_autoattack.py RUN [RUN ...] [--images 500] [--alone] [--bf16] [--results FILE.json]

Both attack the same weights on the same images, in one process and one after the other. Robust accuracy is that of what
each returns, judged by the network in float32; "same" is the share of the images about which it says what pyautoattack
says. The passes, in images, are the floor of the time: what a pass costs is the network's. On a CPU ours gets its
images in channels_last, which the package cannot take. Beside other programs the ratio of CPU seconds is the fairer
one. With --alone each attack is also run by itself on all images that are right without one.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from torch import Tensor, nn

from atlas_kernels.attacks import AutoAttack, attacking
from atlas_kernels.attacks.ensemble import Counted
from atlas_train import data
from atlas_train.checkpoint import load_model
from atlas_train.evaluate import SUBSET_SEED, predict
from atlas_train.options import fraction
from tables import Table, aligned, command_line, markdown, write

PEER = "pyautoattack"


@dataclass
class Row:
    """What one contender made of one network. attacks: all of the version, or the one that ran alone."""

    network: str
    attacks: str
    contender: str
    robust: float
    same: float
    forwards: int
    backwards: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Task:
    """A network, and images that it attacks are run on. parts: the names of those of ``attack``."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    attack: AutoAttack
    batch_size: int


class InRows(nn.Module):
    """The package takes views of gradients, which must be contiguous for that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(Tensor.contiguous)
        logits: Tensor = self.model(x)
        return logits


def theirs(task: Task, names: Sequence[str]) -> tuple[Tensor, int, int]:
    """Adversaries of the package with our settings, which are its own where there are ten classes; and the passes."""
    model, attack = Counted(InRows(task.model)), task.attack
    known = dict(eps=attack.eps, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[attack.norm], seed=attack.seed)
    package = pyautoattack.AutoAttack(model, device=task.x.device, version=attack.version, **known)
    package.attacks_to_run, package.version = list(names), "custom"
    parts, _ = attack.searches(predicted_classes(task))
    for part, name in ((package.apgd_targeted, "apgd-t"), (package.fab, "fab-t")):
        if name in parts:
            part.n_target_classes = parts[name].rounds(predicted_classes(task))
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        adv, _ = package.run_standard_evaluation(task.x, task.y, batch_size=task.batch_size)
    return adv, model.forwards, model.backwards


def ours(precision: str) -> Callable[[Task, Sequence[str]], tuple[Tensor, int, int]]:
    def run(task: Task, names: Sequence[str]) -> tuple[Tensor, int, int]:
        parts, _ = task.attack.searches(predicted_classes(task))
        attack = AutoAttack(
            task.attack.eps, norm=task.attack.norm, version="custom", parts={name: parts[name] for name in names}
        )  # the same keys by name, so that an attack finds alone what it finds in the ensemble
        layout = torch.channels_last if task.x.device.type == "cpu" else torch.contiguous_format
        x = task.x.to(memory_format=layout)
        result = attack.run(task.model, x, task.y, batch_size=task.batch_size, search_precision=precision)
        record = result.record
        return result.adv, sum(record.forwards.values()), sum(record.backwards.values())

    return run


CONTENDERS = {PEER: theirs, "ours": ours("fp32"), "ours, bf16 search": ours("bf16")}


@torch.no_grad()
def predicted_classes(task: Task) -> int:
    return int(task.model(task.x[:1]).shape[1])


def stands(task: Task, adv: Tensor) -> Tensor:
    """Which images the network classifies correctly both as they are and as the attack returned them."""
    parts = zip(adv.split(task.batch_size), task.x.split(task.batch_size), task.y.split(task.batch_size), strict=True)
    return torch.cat([(predict(task.model, a) == y) & (predict(task.model, x) == y) for a, x, y in parts])


def measure(task: Task, alone: bool, contenders: Sequence[str]) -> list[Row]:
    parts, _ = task.attack.searches(predicted_classes(task))
    rows = []
    for names in [list(parts), *([[name] for name in parts] if alone else [])]:
        found: dict[str, Tensor] = {}
        for contender in contenders:
            with attacking(task.model, "eval", None, device=task.x.device):
                began, cpu_began = time.perf_counter(), time.process_time()
                adv, forwards, backwards = CONTENDERS[contender](task, names)
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
                found[contender] = stands(task, adv)
            same = (found[contender] == found[contenders[0]]).double().mean().item()
            robust, title = found[contender].double().mean().item(), ", ".join(names)
            rows.append(Row(task.name, title, contender, robust, same, forwards, backwards, seconds, cpu))
    return rows


def table(rows: Sequence[Row]) -> Table:
    lines = [
        ["network", "attacks", "", "robust", "same", "forwards", "backwards", "s", "times as fast", "CPU s", "ratio"]
    ]
    for row in rows:
        first = next(r for r in rows if (r.network, r.attacks) == (row.network, row.attacks))
        lines.append(
            [
                row.network, row.attacks, row.contender, f"{row.robust:.2%}", f"{row.same:.1%}", f"{row.forwards:,}",
                f"{row.backwards:,}", f"{row.seconds:.1f}", f"{first.seconds / row.seconds:.2f}",
                f"{row.cpu_seconds:.1f}", f"{first.cpu_seconds / row.cpu_seconds:.2f}",
            ]
        )  # fmt: skip
    return lines


def tasks(o: argparse.Namespace) -> list[Task]:
    made = []
    for run in o.runs:
        model, config = load_model(run)
        images = data.load(config["dataset"], o.data_dir).test.subset(o.images, SUBSET_SEED)
        batches = data.Batches(images, o.images, shuffle=False, seed=0, device=torch.device(o.device))
        x, y, _ = next(iter(batches))
        attack = AutoAttack(o.eps, norm=o.norm, version=o.version)
        made.append(Task(f"{Path(run).name}, {config['dataset']}", model.to(o.device), x, y, attack, o.batch_size))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    o = _parser().parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    warnings.simplefilter("ignore")  # of precisions that are slow here: the times show it
    rows: list[Row] = []
    for task in tasks(o):
        rows += measure(task, o.alone, list(CONTENDERS) if o.bf16 else list(CONTENDERS)[:2])
        lines = table(rows)
        print(f"\n{aligned(lines)}", flush=True)
        if o.results:
            title = f"AutoAttack {o.version}, {o.norm}, eps {fraction(o.eps)}, {o.images} images"
            values: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
            write(Path(o.results), title, command_line(__file__, arguments), values, [markdown(lines)])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="AutoAttack, ours beside pyautoattack.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of networks that atlas train has trained")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--eps", type=_number, default=8 / 255, help="such as 8/255")
    parser.add_argument("--norm", default="linf", choices=("linf", "l2", "l1"))
    parser.add_argument("--version", default="standard", choices=("standard", "plus", "rand", "apgd"))
    parser.add_argument("--alone", action="store_true", help="also each attack by itself")
    parser.add_argument("--bf16", action="store_true", help="also ours with the search in bfloat16")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--results", metavar="FILE.json", help="write the numbers there, and the table beside as .md")
    return parser


def _number(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


if __name__ == "__main__":
    sys.exit(main())
