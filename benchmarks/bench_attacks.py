"""PGD as users run it: torchattacks, foolbox, a careful plain script and ours, beside the bare passes of the network.

    python benchmarks/bench_attacks.py [--results FILE.json] [--only NAME ...] [--compact] [--compile]
    python benchmarks/bench_attacks.py --runs RUN [RUN ...] [--images 500]

All attack the same weights on the same images with the same eps, step and number of steps from a uniform start, in one
process: every round runs each contender once, and medians are compared. torchattacks, foolbox and the plain script run
with the allocator as it is found, ours and the bare passes inside ``keep_memory``, which is a setting of the whole
process; each after one untimed pass. Peers: pip install --no-deps -r benchmarks/peers.txt. A peer that is missing
says so in its row.

A row is printed only if its adversaries lie in the ball and in [0, 1], and are as strong as the plain script's to the
tolerances below. With restarts, contenders differ in what they do with a sample that is already fooled, which the
passes show: torchattacks (MultiAttack) and the plain script leave it out of later restarts, foolbox (repeat) and ours
go on with it (foolbox keeps the first adversary that fools, ours the strongest), ours with ``compact`` leaves it out
at once, in the middle of a restart too.

With --runs it is PGD-20 on networks that `atlas train` has trained and on real test images, all in fp32, and below each
table stand two targets: robust accuracy, and the time beside the fastest peer's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_kernels import PGD, Execution, keep_memory
from atlas_train import data, methods, models
from atlas_train.checkpoint import load_model
from atlas_train.evaluate import SUBSET_SEED, predict
from atlas_train.noise import noise_keys
from atlas_train.options import fraction
from atlas_train.options import number as as_number
from atlas_train.passes import count_passes
from harness import peak_memory, seconds
from tables import Table, aligned, command_line, markdown, write

Attack = Callable[[], Tensor]
#: As a share of what the plain script adds to the mean loss: how much more or less another attack may add.
LOSS_TOLERANCE = 0.05
#: Of the share of samples fooled, which is what counts where an attack stops at the first success: two of sixteen.
FOOLED_TOLERANCE = 1 / 8
#: What float32 rounds away in x + (adv - x), with images in [0, 1].
ROUNDING = 1e-6
TRAINING_STEPS = 20
PEERS = ("torchattacks", "foolbox")
PLAIN, INSTALL = "plain PyTorch fp32", "pip install --no-deps -r benchmarks/peers.txt"


@dataclass(frozen=True)
class Workload:
    """What is attacked, and how."""

    network: str
    width: int
    batch: int
    shape: tuple[int, int, int]
    steps: int = 10
    restarts: int = 1
    eps: float = 8 / 255
    rounds: int = 5

    @property
    def attack(self) -> str:
        return f"PGD-{self.steps}" + (f" x {self.restarts}" if self.restarts > 1 else "")


CIFAR, MNIST = (3, 32, 32), (1, 28, 28)
WORKLOADS = {
    "resnet": Workload("preact_resnet18", 64, 64, CIFAR, rounds=3),
    "narrow": Workload("preact_resnet18", 16, 128, CIFAR),
    "restarts": Workload("preact_resnet18", 16, 16, CIFAR, steps=50, restarts=10, eps=16 / 255, rounds=3),
    "cnn": Workload("small_cnn", 32, 128, MNIST, eps=0.3, rounds=9),
}
#: How networks of --runs are attacked. The run says which network it is, its width and the shape of its images.
TRAINED = Workload("", 0, 500, CIFAR, steps=20, rounds=3)
#: How far the robust accuracy may be above that of the strongest peer, and the time beside the fastest.
AS_STRONG, AS_FAST = 0.005, 1.0
SMALL = Workload("digits_net", 16, 64, (1, 8, 8), eps=0.1, rounds=9)


@dataclass(frozen=True)
class Task:
    """A workload with its network, in eval mode, and its images."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    steps: int
    restarts: int

    @property
    def step_size(self) -> float:
        return self.eps / 4

    def lean(self) -> Task:
        """The same in channels_last."""
        model = copy.deepcopy(self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return replace(self, model=model, x=self.x.contiguous(memory_format=torch.channels_last))


def make_task(work: Workload, device: torch.device) -> Task:
    """A network after a few steps of one-step ADV on digits, enlarged, and test images of them: some are fooled soon,
    some late and some not at all."""
    torch.manual_seed(0)
    digits, method = data.load("digits"), methods.build("one_step_adv", 0.1, {})
    cifar10 = data.get("cifar10")
    normalize = (cifar10.mean, cifar10.std) if work.shape[0] == 3 else None
    sizes = {"num_classes": 10, "in_channels": work.shape[0], "width": work.width}
    model = models.build(work.network, normalize=normalize, **sizes).to(device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # so that its statistics arrive in so few steps
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for number, key in enumerate(noise_keys(0, 0, TRAINING_STEPS).to(device)):
        rows = slice(32 * number, 32 * number + 32)
        loss, _ = method.loss(model, _batch(digits.train, rows, work.shape, device), key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    x, y, _ = _batch(digits.test, slice(work.batch), work.shape, device)
    return Task(model.eval(), x, y, work.eps, work.steps, work.restarts)


def _known(name: str, o: argparse.Namespace) -> tuple[Workload, Task]:
    work = {**WORKLOADS, "small": SMALL}[name]
    return work, make_task(work, torch.device(o.device))


def trained_task(run: str, o: argparse.Namespace) -> tuple[Workload, Task]:
    """A network that was trained, and test images, at the radius of its training unless another is asked for."""
    model, config = load_model(run)
    images = data.load(config["dataset"], o.data_dir).test.subset(o.images, SUBSET_SEED)
    x, y, _ = next(iter(data.Batches(images, o.images, shuffle=False, seed=0, device=torch.device(o.device))))
    eps = o.eps or float(config["eps"])
    name, width = f"{Path(run).name}, {config['model']}", config["width"] or 0
    work = replace(TRAINED, network=name, width=width, batch=len(y), shape=tuple(x.shape[1:]), eps=eps)
    return work, Task(model.eval().to(o.device), x, y, eps, work.steps, work.restarts)


def _batch(images: data.Images, rows: slice, shape: tuple[int, int, int], device: torch.device) -> data.Batch:
    x = F.interpolate(images.images[rows].to(device) / 255, shape[1:], mode="bilinear")
    y = images.labels[rows].to(device)
    return data.Batch(x.expand(-1, shape[0], -1, -1).contiguous(), y, torch.arange(len(y), device=device))


# What is measured


class Strength(NamedTuple):
    """Of adversaries, judged by the network in float32: mean cross-entropy, and the share that is misclassified."""

    loss: float
    fooled: float


@dataclass(frozen=True)
class Contender:
    """One way to run the attack. counted: the same attack in a form whose passes can be counted, and checked.

    run_pass: one forward and backward, before each timing. keeps: inside ``keep_memory``. stops: with samples that are
    fooled, so that the losses say little.
    """

    name: str
    run: Attack
    counted: Attack
    run_pass: Callable[[], object]
    keeps: bool
    stops: bool = False

    @property
    def around(self) -> AbstractContextManager[None]:
        return keep_memory() if self.keeps else nullcontext()


@dataclass(frozen=True)
class Row:
    """A contender's numbers, or why there are none.

    passes: forwards of the batch that cost as much. peak: bytes that torch holds at once, beyond what it held before.
    """

    name: str
    problem: str | None = None
    seconds: float | None = None
    passes: float | None = None
    strength: Strength | None = None
    peak: int | None = None
    samples: list[float] = field(default_factory=list)


def plain_pgd(task: Task) -> Tensor:
    """A careful script. The weights are frozen by whoever calls."""
    x, low, high = task.x, (task.x - task.eps).clamp_(min=0), (task.x + task.eps).clamp_(max=1)
    adv = torch.empty_like(x).uniform_(-task.eps, task.eps).add_(x).clamp_(0, 1)
    for _ in range(task.steps):
        loss = F.cross_entropy(task.model(adv.requires_grad_()), task.y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        adv = torch.clamp(adv.detach().add_(grad.sign_(), alpha=task.step_size), low, high)
    return adv


def plain_restarts(task: Task) -> Tensor:
    """Restarts, each for the samples that are still classified correctly."""
    best, going = task.x.clone(), torch.arange(len(task.x), device=task.x.device)
    for _ in range(task.restarts):
        some = replace(task, x=task.x[going], y=task.y[going])
        best[going] = adv = plain_pgd(some)
        going = going[predict(task.model, adv) == some.y]
        if not len(going):
            break
    return best


def bare_passes(task: Task, precision: str) -> Tensor:
    """As many passes as ours makes, and nothing else."""
    with torch.autocast(task.x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(task.steps * task.restarts):
            one_pass(task)
        for _ in range(task.restarts if task.restarts > 1 else 0):
            predict(task.model, task.x)
    return task.x


def one_pass(task: Task) -> None:
    z = task.model(leaf := task.x.detach().requires_grad_())
    torch.autograd.grad(z, leaf, torch.ones_like(z))


def torchattacks_pgd(task: Task) -> Attack:
    import torchattacks  # type: ignore[import-untyped,import-not-found,unused-ignore]

    attack = torchattacks.PGD(task.model, eps=task.eps, alpha=task.step_size, steps=task.steps, random_start=True)
    if task.restarts > 1:
        attack = torchattacks.MultiAttack([attack] * task.restarts)
    return lambda: attack(task.x, task.y)


def foolbox_pgd(task: Task) -> Attack:
    import foolbox  # type: ignore[import-untyped,import-not-found,unused-ignore]

    model = foolbox.PyTorchModel(task.model, bounds=(0, 1), device=task.x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=task.step_size, steps=task.steps, random_start=True)
    if task.restarts > 1:
        attack = attack.repeat(task.restarts)
    return lambda: attack(model, task.x, task.y, epsilons=task.eps)[1]


def our_pgd(task: Task, precision: str, compact: bool) -> Attack:
    execution = Execution(precision)
    attack = PGD(task.eps, task.step_size, task.steps, restarts=task.restarts, compact=compact)

    def run() -> Tensor:
        with execution:
            return attack(task.model, task.x, task.y)

    return run


def contenders(
    task: Task, compact: bool, compiled: bool, precisions: Sequence[str] = ("fp32", "bf16")
) -> tuple[list[Contender], list[Row]]:
    """Who takes part, and a row for every peer that cannot."""
    found, absent = [], []
    for name, make in (("torchattacks", torchattacks_pgd), ("foolbox", foolbox_pgd)):
        try:
            run = make(task)
        except ImportError as error:
            absent.append(Row(name, f"absent ({error}): {INSTALL}"))
        else:
            found.append(Contender(name, run, run, partial(one_pass, task), keeps=False, stops=task.restarts > 1))
    frozen, own = task.lean(), task.lean()
    frozen.model.requires_grad_(False)
    plain = partial(plain_pgd if task.restarts == 1 else plain_restarts, frozen)
    found.append(Contender(PLAIN, plain, plain, partial(one_pass, frozen), keeps=False, stops=task.restarts > 1))
    for precision in precisions:
        bare = partial(bare_passes, frozen, precision)
        warm = partial(bare_passes, replace(frozen, steps=1, restarts=1), precision)
        for kind in ("", " compact") if compact else ("",):
            run, stops = our_pgd(own, precision, bool(kind)), bool(kind) or task.restarts > 1
            found.append(Contender(f"ours {precision}{kind}", run, run, warm, True, stops))
            if compiled:
                fast = our_pgd(replace(own, model=torch.compile(own.model)), precision, bool(kind))
                found.append(Contender(f"ours {precision}{kind} compiled", fast, run, warm, True, stops))
        found.append(Contender(f"bare passes {precision}", bare, bare, warm, keeps=True))
    return found, absent


# What is checked


def strength(task: Task, adv: Tensor) -> Strength:
    with torch.no_grad():
        z = task.model(adv)
    return Strength(F.cross_entropy(z, task.y).item(), (z.argmax(1) != task.y).double().mean().item())


def problem_with(task: Task, adv: Tensor, plain: Strength, stops: bool) -> str | None:
    """Why these are no adversaries as strong as the plain script's; None: they are."""
    if adv.shape != task.x.shape or not adv.isfinite().all():
        return f"not {list(task.x.shape)} finite numbers"
    distance = (adv.double() - task.x.double()).abs().max().item()
    if distance > task.eps + ROUNDING:
        return f"left the ball: {distance:.6f} from x, eps {task.eps:.6f}"
    if adv.min() < 0 or adv.max() > 1:
        return f"left the range [0, 1]: {adv.min().item():.6f} to {adv.max().item():.6f}"
    found = strength(task, adv)
    if stops and abs(found.fooled - plain.fooled) > FOOLED_TOLERANCE:
        return f"fools {found.fooled:.1%}, but the plain script {plain.fooled:.1%} (tolerance {FOOLED_TOLERANCE:.1%})"
    tolerance = LOSS_TOLERANCE * abs(plain.loss - strength(task, task.x).loss)
    if not stops and abs(found.loss - plain.loss) > tolerance:
        return f"loss {found.loss:.4f}, but the plain script's is {plain.loss:.4f} (tolerance {tolerance:.4f})"
    return None


def examine(task: Task, contender: Contender, plain: Strength) -> Row:
    """Attacks, untimed: are they right, how much memory do they need, how many passes do they make?"""
    made: list[Tensor] = []
    contender.run_pass()
    if contender.run is not contender.counted:
        contender.run()  # compiles, which takes memory of its own
    with contender.around:
        peak = peak_memory(lambda: made.append(contender.run()), task.x.device)
    passes = count_passes(task.model, task.x, contender.counted)
    task.model.zero_grad(set_to_none=True)  # foolbox leaves gradients
    if contender.name.startswith("bare"):
        return Row(contender.name, passes=passes, peak=peak)
    problem = problem_with(task, made[-1], plain, contender.stops)
    return Row(contender.name, problem, passes=passes, strength=strength(task, made[-1]), peak=peak)


# The rounds


def measure(task: Task, rounds: int, compact: bool, compiled: bool, **which: Sequence[str]) -> list[Row]:
    """A row per contender: examined first, then, if nothing is wrong with it, timed in every round."""
    found, absent = contenders(task, compact, compiled, **which)
    plain = next(contender for contender in found if contender.name == PLAIN)
    reference = strength(task, plain.run())
    rows = {contender: examine(task, contender, reference) for contender in found}
    for _ in range(rounds):
        for contender, row in rows.items():
            if row.problem is None:
                row.samples.append(timed(task, contender))
    medians = (replace(row, seconds=statistics.median(row.samples)) if row.samples else row for row in rows.values())
    return [*absent, *medians]


def timed(task: Task, contender: Contender) -> float:
    with contender.around:
        contender.run_pass()
        taken = seconds(contender.run, task.x.device)
    task.model.zero_grad(set_to_none=True)
    return taken


# The table


def table(rows: Sequence[Row]) -> Table:
    time = {row.name: row.seconds for row in rows if row.seconds is not None}
    peer = min((t for name, t in time.items() if name in PEERS), default=None)
    header = ["", "ms", "fastest peer / it", "plain / it", "passes", "ms/pass", "of bare", "peak MiB", "loss", "fooled"]
    lines = [header]
    for row in rows:
        if row.seconds is None or row.passes is None:
            lines.append([row.name, *["-"] * (len(header) - 1)])
            continue
        bare = time.get(f"bare passes {'bf16' if 'bf16' in row.name else 'fp32'}")
        ratios = [_ratio(peer, row.seconds), _ratio(time.get(PLAIN), row.seconds)]
        milli = [f"{1e3 * row.seconds:.1f}", f"{1e3 * row.seconds / row.passes:.2f}"]
        share = "-" if bare is None else f"{bare / row.seconds:.0%}"
        peak = "-" if row.peak is None else f"{row.peak / 2**20:.0f}"
        strong = ["-", "-"] if row.strength is None else [f"{row.strength.loss:.3f}", f"{row.strength.fooled:.1%}"]
        lines.append([row.name, milli[0], *ratios, f"{row.passes:.1f}", milli[1], share, peak, *strong])
    return lines


def targets(rows: Sequence[Row]) -> list[str]:
    """Ours beside the peers: as strong, and not slower; the times are the shortest of the rounds."""
    ours = next(row for row in rows if row.name == "ours fp32")
    peers = [row for row in rows if row.name in PEERS and row.strength is not None and row.samples]
    if not peers or ours.strength is None or not ours.samples:
        return ["no target can be checked: ours or both peers are missing"]
    robust = {row.name: 1 - row.strength.fooled for row in (ours, *peers) if row.strength}
    least = min(robust[row.name] for row in peers)
    fastest = min(min(row.samples) for row in peers) / min(ours.samples)
    figures = ", ".join(f"{name} {share:.1%}" for name, share in robust.items())
    strong = "reached" if robust[ours.name] <= least + AS_STRONG else "MISSED"
    fast = "reached" if fastest >= AS_FAST else "MISSED"
    return [
        f"robust accuracy: {figures}; target at most {100 * AS_STRONG:.1f} points above the lowest peer's: {strong}",
        f"time: {fastest:.2f} times as fast as the fastest peer, target {AS_FAST:.2f}: {fast}",
    ]


def _ratio(other: float | None, own: float) -> str:
    return "-" if other is None else f"{other / own:.2f}x"


def title(work: Workload) -> str:
    eps = f"eps {fraction(work.eps)}, step eps/4"
    return f"{work.network} width {work.width}, batch {work.batch}, {work.attack}, {eps}"


NOTE = (
    "Medians of rounds in one process. passes: forwards of the batch that cost as much (a backward to the input is 1,"
    " to the weights 1 more). of bare: the time of as many bare passes as ours makes without compact, at the same "
    "precision, over its time. peak: what torch holds at once beyond what it held before. loss, fooled: of the "
    "adversaries, judged in float32. A row is printed if they lie in the ball and in [0, 1] and add as much to the "
    f"loss as the plain script's to {LOSS_TOLERANCE:.0%}, or, where samples that are fooled may be left alone, fool as"
    f" many of all samples, to {FOOLED_TOLERANCE:.1%}."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table per workload; 1 if a contender was not as strong as it had to be, or left the ball."""
    arguments = sys.argv[1:] if arguments is None else arguments
    o = _parser().parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    command = command_line(__file__, arguments)
    made: list[tuple[str, Callable[[], tuple[Workload, Task]]]] = [(name, partial(_known, name, o)) for name in o.only]
    if o.runs:
        made = [(Path(run).name, partial(trained_task, run, o)) for run in o.runs]
    tolerances = {"loss_tolerance": LOSS_TOLERANCE, "fooled_tolerance": FOOLED_TOLERANCE, "rounding": ROUNDING}
    parts, measured, refused = [], [], 0
    for name, make in made:
        work, task = make()
        which = {"precisions": ("fp32",)} if o.runs else {}
        rows = measure(task, o.rounds or work.rounds, o.compact, o.compile, **which)
        lines, heading = table(rows), title(work)
        notes = [f"{row.name}: {row.problem}" for row in rows if row.problem] + (targets(rows) if o.runs else [])
        refused += sum(row.problem is not None and row.passes is not None for row in rows)
        print("\n".join([f"\n{heading}\n", aligned(lines), *notes]), flush=True)
        parts += [f"## {heading}", markdown(lines), *notes]
        measured.append({"name": name, **asdict(work), "rows": [asdict(row) for row in rows]})
        if o.results:
            values = {**tolerances, "workloads": measured}
            write(Path(o.results), "Attacks, ours and others'", command, values, [*parts, NOTE])
    print(f"\n{NOTE}")
    return int(refused > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="PGD: ours beside torchattacks, foolbox and a plain script.")
    known = (*WORKLOADS, "small")
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=known, help="workloads; default: all")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="folders of networks that atlas train has trained")
    parser.add_argument("--images", type=int, default=500, help="of --runs: test images")
    parser.add_argument("--eps", type=as_number, help="of --runs: such as 8/255; default: that of the training")
    parser.add_argument("--data-dir", help="of --runs")
    parser.add_argument("--rounds", type=int, help="rounds; default: by workload")
    parser.add_argument("--compact", action="store_true", help="also ours with compact=True")
    parser.add_argument("--compile", action="store_true", help="also ours on the network through torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--results", metavar="FILE.json", help="write the numbers there, and the tables beside as .md")
    return parser


# Under pytest-benchmark: the small size, a row per contender


def _small(name: str) -> tuple[Task, Contender]:
    task = make_task(SMALL, _device())
    found, absent = contenders(task, compact=True, compiled=False)
    for row in absent:
        if row.name == name:
            pytest.skip(str(row.problem))
    return task, next(contender for contender in found if contender.name == name)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


NAMES = [*PEERS, PLAIN, *(f"{who} {p}" for who in ("ours", "bare passes") for p in ("fp32", "bf16"))]


@pytest.mark.parametrize("name", NAMES)
def test_pgd(benchmark: Any, name: str) -> None:
    task, contender = _small(name)
    _, plain = _small(PLAIN)
    row = examine(task, contender, strength(task, plain.run()))
    assert row.problem is None, f"{name}: {row.problem}; no time is reported"
    benchmark.extra_info.update(passes=row.passes, strength=row.strength)
    with contender.around:
        benchmark.pedantic(contender.run, rounds=9, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
