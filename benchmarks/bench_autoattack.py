"""AutoAttack: ours beside pyautoattack, on networks that `atlas train` has trained.

    pip install --no-deps -r tests/peers.txt
    python benchmarks/bench_autoattack.py RUN [RUN ...] [--images 500] [--alone] [--bf16] [--results FILE.json]
    python benchmarks/bench_autoattack.py RUN [RUN ...] --processes 2

Both attack the same weights on the same images, in one process and one after the other. Robust accuracy is that of what
each returns, judged by the network in float32; "same" is the share of the images about which it says what pyautoattack
says. The passes, in images, are the floor of the time: what a pass costs is the network's. On a CPU ours gets its
images in channels_last, which the package cannot take. Beside other programs the ratio of CPU seconds is the fairer
one. With --alone each attack is also run by itself on all images that are right without one.

With --processes N it is ours alone: one process of one thread, then N of one thread each on the same images, each from
where the network and the images are there to where the first process has all verdicts. CPU s is that of the busiest
process: by it N are as many times as fast as they are on a machine with N free cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atlas_kernels.attacks import APGD, AutoAttack, attacking, run_sharded
from atlas_kernels.attacks.ensemble import Counted
from atlas_kernels.attacks.processes import together
from atlas_train import data
from atlas_train.checkpoint import load_model
from atlas_train.evaluate import SUBSET_SEED, predict
from atlas_train.options import fraction
from tables import Table, aligned, command_line, markdown, write
from worker import set_up

PEER = "pyautoattack"
GAIN = 0.85  # of the processes that share the work: 1.7 for two


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
    import pyautoattack

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


def share(rank: int, count: int, meeting: str, o: argparse.Namespace, answer: Any) -> None:
    """What one of ``count`` processes does, a thread each; the first one answers."""
    set_up(1)
    warnings.simplefilter("ignore")
    (task,) = tasks(o)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    with together() as processes:
        replace(task.attack, version="custom", parts={"warm": APGD(task.attack.eps, 1, norm=task.attack.norm)}).run(
            task.model, task.x[:8], task.y[:8]
        )
        processes.share(processes.gather(rank))  # all begin together
        began, cpu = time.perf_counter(), time.process_time()
        x = task.x.to(memory_format=torch.channels_last)
        result = run_sharded(task.attack, task.model, x, task.y, batch_size=task.batch_size)
        seconds = time.perf_counter() - began
        spent = processes.gather(time.process_time() - cpu)
    if result is not None:
        record, title = result.record, ", ".join(result.record.parts)
        passes = sum(record.forwards.values()), sum(record.backwards.values())
        who = f"{count} process" + "es" * (count > 1)
        row = Row(task.name, title, who, result.accuracy, 1.0, *passes, seconds, max(spent.values()))
        answer.put((row, result.correct.tolist()))


def shared(o: argparse.Namespace) -> list[Row]:
    """One network by one process, and by ``o.processes``."""
    context, found = multiprocessing.get_context("spawn"), []
    for count in (1, o.processes):
        answer = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (count, f"{folder}/meeting", o, answer)
            workers = [context.Process(target=share, args=(rank, *arguments)) for rank in range(count)]
            for worker in workers:
                worker.start()
            found.append(_answer(answer, workers))
            for worker in workers:
                worker.join()
    (one, whole), (several, correct) = found
    agreement = sum(a == b for a, b in zip(whole, correct, strict=True)) / len(whole)
    return [one, replace(several, same=agreement)]


def _answer(answer: Any, workers: Sequence[Any]) -> tuple[Row, list[bool]]:
    """What the first process says. Raises RuntimeError where one ends without."""
    while answer.empty():
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a process ended early: its error is above")
        time.sleep(0.1)
    found: tuple[Row, list[bool]] = answer.get()
    return found


def gain(rows: Sequence[Row], count: int) -> str:
    """Figure and target."""
    one, several = rows
    wall, cpu = one.seconds / several.seconds, one.cpu_seconds / several.cpu_seconds
    verdict = "reached" if wall >= GAIN * count else "MISSED"
    return (
        f"{one.network}: {count} processes are {wall:.2f} times as fast as one (by CPU s {cpu:.2f}), a thread each; "
        f"target {GAIN * count:.2f}: {verdict}"
    )


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
    if o.processes is not None and (o.processes < 2 or o.device != "cpu" or o.alone or o.bf16):
        sys.exit("--processes takes 2 or more, on CPUs (--device cpu), without --alone and --bf16")
    rows: list[Row] = []
    gains: list[str] = []
    contenders = list(CONTENDERS) if o.bf16 else list(CONTENDERS)[:2]
    for number, run in enumerate(o.runs):
        one = argparse.Namespace(**{**vars(o), "runs": [run]})
        if o.processes:
            rows += shared(one)
            gains.append(gain(rows[-2:], o.processes))
        else:
            rows += measure(tasks(one)[0], o.alone, contenders)
        lines = table(rows)
        print("\n".join(["", aligned(lines), *gains[number:]]), flush=True)
        if o.results:
            title = f"AutoAttack {o.version}, {o.norm}, eps {fraction(o.eps)}, {o.images} images"
            values: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
            write(Path(o.results), title, command_line(__file__, arguments), values, [markdown(lines), *gains])
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
    parser.add_argument("--processes", type=int, metavar="N", help="ours alone: so many beside one, a thread each")
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
