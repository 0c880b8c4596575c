"""Whole training steps of every method: the published way, ours, and the network's passes of ours with nothing else.

    python benchmarks/bench_training_step.py --network preact_resnet18 --data-dir DIR --results FILE.json

prints the table of ``step_table.py`` and writes it after every row, as JSON and markdown; with ``--keep`` into the
table that FILE has, so that one which was cut off goes on. The rows are in ``steps.py``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from atlas_kernels import keep_memory
from atlas_kernels.attacks.held import put_back
from atlas_kernels.capture import Capture, CaptureFailed, Recorder, cuda_graph
from atlas_train import data, methods, models
from atlas_train.compiled import LIMIT, compiled_network
from atlas_train.config import TrainConfig
from atlas_train.data import Batch, DataSplits, Images
from atlas_train.descent import OptimizerDescent
from atlas_train.noise import noise_keys
from atlas_train.nonfinite import Losses
from atlas_train.passes import count_passes
from atlas_train.run import Run, prepare
from atlas_train.step_graph import StepGraph
from harness import Call, environment, median_interval, peak_memory, seconds, strict_fp32
from network_passes import Bare, Learn, Pass
from step_table import KINDS, NOTES, StepRow, listed, read, report, table
from steps import STEPS, Published, Step
from tables import aligned, command_line

#: The data set whose images and defaults a network is measured with, and the batch size.
NETWORKS = {"small_cnn": ("mnist", 128), "preact_resnet18": ("cifar10", 64), "wide_resnet28_10": ("cifar10", 8)}
SHAPES = {"mnist": ((1, 28, 28), 0.3), "cifar10": ((3, 32, 32), 8 / 255)}
#: Below the last place of every weight: the optimiser does all its work and the weights stay.
LR = 1e-20
#: Batches that the network is first trained on, again and again.
BATCHES, WARM_UP_LR, WARM_UP_STEPS = 4, 3e-3, 80
#: Rounds that every row gets, however long they take.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """What all rows of a table share; None: the network's own. compile: in which dtypes, "fp32", "bf16" or "both"."""

    network: str = "small_cnn"
    data_dir: str | None = None
    batch_size: int | None = None
    width: int | None = None
    steps: int = 10
    rounds: int = 5
    row_seconds: float = 40.0
    compile: str | None = None
    graphs: bool = False
    cudnn_benchmark: bool = False
    device: str = "cpu"

    @property
    def dataset(self) -> str:
        return NETWORKS[self.network][0]

    @property
    def batch(self) -> int:
        return NETWORKS[self.network][1] if self.batch_size is None else self.batch_size


class Bench:
    """Images, and a network after some standard training on them, so that no gradient is degenerate."""

    def __init__(self, settings: Settings, recorder: Recorder = cuda_graph) -> None:
        self.settings, self.device, self.recorder = settings, torch.device(settings.device), recorder
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
        torch.manual_seed(0)
        self.splits = images(settings)
        channels = self.splits.train.shape[0]
        known = data.get(settings.dataset)
        sizes = {"num_classes": known.num_classes, "in_channels": channels, "width": settings.width}
        model = models.build(settings.network, normalize=known.mean and (known.mean, known.std), **sizes)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # both sides then see the same network
        self.model = model.to(self.device).train()
        batches = list(self.run("standard", {}).batches)
        warm_up(self.model, batches)
        # Running statistics of a few batches make another network in eval mode, so sure of all that the gradients of
        # published attacks are 0 in float64.
        update_bn((batch.x for batch in batches), self.model)

    def double(self) -> Bench:
        """The same in double precision, where both sides differ by rounding alone and that does not grow."""
        made = copy.copy(self)
        made.model = copy.deepcopy(self.model).double()
        made.settings = replace(self.settings, compile=None, graphs=False)
        return made

    def run(self, method: str, hyper: dict[str, Any]) -> Run:
        """A training run of the trainer's, on a copy of the network, before its first step."""
        config = TrainConfig(
            method, hyper, epochs=1, batch_size=self.settings.batch, augment=False, optimizer="sgd", lr=LR,
            weight_decay=5e-4, schedule="constant", channels_last=True, val_size=0, device=self.settings.device,
        )  # fmt: skip
        made = prepare(config, self.splits, copy.deepcopy(self.model), None)
        dtype = next(made.model.parameters()).dtype
        if dtype != torch.float32:
            made.batches = [batch._replace(x=batch.x.to(dtype)) for batch in made.batches]  # type: ignore[assignment]
        prime(made.model, made.optimizer)
        return made


def warm_up(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Standard training until the network is sure of most images (p > 1/2: those that MMA attacks)."""
    optimizer = torch.optim.Adam(model.parameters(), WARM_UP_LR)
    for batch in itertools.islice(itertools.cycle(batches), WARM_UP_STEPS):
        logits = model(batch.x)
        if sure(logits, batch.y) > 0.8 * len(batch.y):
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, batch.y).backward()
        optimizer.step()
    model.zero_grad()


def sure(logits: Tensor, y: Tensor) -> int:
    """The samples whose label is likelier than all others together."""
    return int((logits.detach().float().softmax(1).gather(1, y[:, None]) > 0.5).sum())


def images(settings: Settings) -> DataSplits:
    """As many as the warm-up trains on: real ones, or blurred patterns, one a class, under noise."""
    name, count = settings.dataset, BATCHES * settings.batch
    if settings.data_dir:
        splits = data.load(name, settings.data_dir)
        return replace(splits, train=splits.train.subset(count, seed=0))
    (channels, size, _), eps = SHAPES[name]
    labels = torch.randint(10, (count,))
    patterns = nn.functional.interpolate(torch.rand(10, channels, 4, 4), size=size, mode="bilinear") > 0.55
    pixels = 0.7 * patterns[labels] + 0.3 * torch.rand(count, channels, size, size)
    made = Images((255 * pixels).to(torch.uint8), labels)
    return DataSplits(name, made, made, 10, eps)


def prime(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser has its momentum from here on."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def hyper_of(step: Step, settings: Settings) -> dict[str, Any]:
    """The row's settings and, where the method's default for the data set is another, the number of attack steps."""
    if not step.has_steps:
        return dict(step.hyper)
    method = methods.get(step.method)
    published = methods.defaults_on(data.get(settings.dataset), step.method)
    default = published.get("steps", method.__dataclass_fields__["steps"].default)
    return dict(step.hyper) | ({} if default == settings.steps else {"steps": settings.steps})


class Contest:
    """The contenders of a row: calls of no argument that make one step, or its passes, and give its loss."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.row, self.device = bench, StepRow(name), bench.device
        self.step = STEPS[name]
        self.made = bench.run(self.step.method, hyper_of(self.step, bench.settings))
        self.batch = next(iter(self.made.batches))
        self.key = noise_keys(0, 0, 1)[0].to(bench.device)
        # What is due in the first batch and now and then is made here, for both sides alike; the step is the second.
        self.made.method.before_step(self.made.model, self.batch, self.key, self.made.state)
        self.made.step = 1
        self.passes = {dtype: self._passes(dtype == "bf16") for dtype in ("fp32", "bf16")}
        self.kinds = {"": self.made.model}
        if bench.settings.compile:
            torch._dynamo.reset()  # else networks of earlier rows count as recompilations, of which there may be few
            torch._dynamo.config.recompile_limit = LIMIT
            self.kinds[" compiled"] = compiled_network(self.made.model, self.made.method)
        if bench.settings.graphs and not self.made.method.no_graph:
            self.kinds |= {f"{kind} graphs": model for kind, model in self.kinds.items()}
        self.calls = {f"published {project}".strip(): self._published(bench, p) for project, p in self._ways}
        for (kind, model), dtype in itertools.product(self.kinds.items(), ("fp32", "bf16")):
            if "compiled" in kind and bench.settings.compile not in ("both", dtype):
                continue
            recorder = bench.recorder if kind.endswith(" graphs") else None
            self.calls[f"ours {dtype}{kind}"] = self._ours(model, dtype == "bf16", recorder, cache=not kind)
            self.calls[f"bare {dtype}{kind}"] = self._bare(model, dtype, recorder, cache=not kind)

    @property
    def _ways(self) -> Iterable[tuple[str, Published]]:
        return self.step.published.items()

    def look(self) -> StepRow:
        """The first step of each contender, untimed: loss, passes, memory, and whether there is anything to time.

        Those whose losses are compared make it in strict fp32, and on CUDA one more as they will be timed.
        """
        for name, call in self.calls.items():
            if name.endswith(tuple(self.row.missing)):
                continue
            try:
                if name.startswith("bare") and name.endswith("graphs"):
                    call()  # records
                elif not name.startswith("bare"):
                    with keep_memory() if name.startswith("ours") else nullcontext():
                        self._first(name, call)
            except CaptureFailed as failure:
                self.row.missing[next(kind for kind in KINDS if name.endswith(kind))] = str(failure)
        for kind in self.row.missing:
            del self.kinds[kind]
        few = self.batch.x if self.step.by_data else self.batch.x[:8]
        bare = Bare(self.made.model, few)
        self.row.passes["bare"] = count_passes(self.made.model, few, lambda: bare.run(self.passes["fp32"]))
        if self.row.differing:
            self.row.doubles = Contest(self.bench.double(), self.row.step).losses()
        self.row.look_for_problems()
        return self.row

    def losses(self) -> dict[str, float]:
        """Of one step of those whose loss is to be the same."""
        named = (name for name in self.calls if name.startswith("published") or name == "ours fp32")
        return {name: float(self.calls[name]()) for name in named}

    def round(self, number: int) -> None:
        """One timed call of each contender; ours and its passes change places every round."""
        for name, call in self.calls.items():
            if name.startswith("published"):
                self._time(name, call)
        trained = dict.fromkeys(p for p in self.passes["fp32"] if isinstance(p, Learn))
        with keep_memory():
            Bare(self.made.model, self.batch.x).run(list(trained))  # untimed: the memory of a training under way
            for kind, dtype in itertools.product(self.kinds, ("fp32", "bf16")):
                if f"ours {dtype}{kind}" not in self.calls:
                    continue
                for side in ("ours", "bare")[:: -1 if number % 2 else 1]:
                    self._time(f"{side} {dtype}{kind}", self.calls[f"{side} {dtype}{kind}"])

    def _time(self, name: str, call: Call) -> None:
        self.row.seconds.setdefault(name, []).append(seconds(call, self.device))

    def _first(self, name: str, call: Call) -> None:
        losses: list[Any] = []
        is_compared = name.startswith("published") or name == "ours fp32"  # the others begin with its statistics
        if name.endswith(KINDS):
            for _ in range(2):
                call()  # compiles; of a graph, the eager step and the one that is recorded
            if not name.endswith("graphs"):  # which hold their memory between steps too
                self.row.memory[name] = peak_memory(call, self.device)
        else:
            model, x = self.made.model, self.batch.x
            peaks: list[int] = []
            with strict_fp32() if is_compared else nullcontext():
                passes = count_passes(
                    model, x, lambda: peaks.append(peak_memory(lambda: losses.append(call()), self.device))
                )
            if is_compared and self.device.type == "cuda":
                peaks[0] = peak_memory(call, self.device)
            self.row.passes["ours" if name == "ours fp32" else name] = passes
            self.row.memory[name] = peaks[0]
        if is_compared:
            self.row.losses[name] = float(losses[0])

    def _published(self, bench: Bench, published: Published) -> Call:
        batch = self.batch._replace(x=self.batch.x.contiguous())
        model = copy.deepcopy(bench.model)
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
        prime(model, optimizer)
        algorithm, start, how, memory = published(self.made.method, batch, self.key)
        kept = {argument: self.made.memory[name].clone() for argument, name in memory.items()}
        return lambda: algorithm(model, batch.x, batch.y, start, optimizer, **how, **kept)[1]

    def _ours(self, model: nn.Module, bf16: bool, recorder: Recorder | None, cache: bool) -> Call:
        """A step as the engine makes it."""
        run, losses = self.made, Losses(self.made)
        graphs = StepGraph(run.method, run.optimizer, _no_graph, recorder) if recorder else None
        train_step = graphs or run.method.step

        def call() -> Tensor:
            run.model.train()
            descent = OptimizerDescent(run.optimizer, run.rate, partial(losses.add, self.batch.ids))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=cache):
                return train_step(model, self.batch, self.key, run.state, descent)[0]

        return call

    def _bare(self, model: nn.Module, dtype: str, recorder: Recorder | None, cache: bool) -> Call:
        run, x = partial(Bare(model, self.batch.x, dtype == "bf16", cache).run, self.passes[dtype]), self.batch.x
        captures: list[Capture[None]] = []

        def replay() -> None:
            if not captures:
                assert recorder is not None
                captures.append(Capture(lambda _: run(), [x], restore=model.buffers(), recorder=recorder))
            captures[0](x)

        return replay if recorder else run

    def _passes(self, bf16: bool) -> list[Pass]:
        model, x, y = self.made.model.train(), self.batch.x, self.batch.y
        with (
            put_back(model, copy_buffers=True),
            torch.no_grad(),
            torch.autocast(x.device.type, torch.bfloat16, enabled=bf16),
        ):
            return list(self.step.passes(self.made.method, sure(model(x), y)))


def _no_graph(reason: str) -> None:
    raise CaptureFailed(reason)


def measure(bench: Bench, name: str, say: Callable[[str], None] = lambda line: None) -> StepRow:
    """The row of that name. After ``LEAST_ROUNDS`` it ends once it has taken ``row_seconds``."""
    say(f"{name}: loss, passes, memory")
    contest = Contest(bench, name)
    row, started = contest.look(), time.perf_counter()
    for number in range(0 if row.problem else bench.settings.rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - started > bench.settings.row_seconds:
            break
        say(f"{name}: round {number + 1} of at most {bench.settings.rounds}")
        contest.round(number)
    return row


def one_pass(bench: Bench, rounds: int = 7) -> dict[str, str]:
    """What the unit of the table takes: medians and, in brackets, their intervals."""
    run, rows = bench.run("standard", {}), {}
    x = next(iter(run.batches)).x
    for dtype in ("fp32", "bf16"):
        bare = Bare(run.model, x, dtype == "bf16")
        with keep_memory():
            bare.one_pass()
            times = [bare.one_pass() for _ in range(rounds)]
        for what, values in zip(("forward", "backward to the input"), zip(*times, strict=True), strict=True):
            low, high, _ = median_interval([1e3 * t for t in values])
            rows[f"{what}, {dtype}"] = f"{1e3 * statistics.median(values):.1f} ms ({low:.1f} to {high:.1f})"
    return rows


def facts_of(bench: Bench) -> dict[str, Any]:
    """What stands above the table."""
    settings, source = bench.settings, "real" if bench.settings.data_dir else "synthetic: blurred patterns under noise"
    shown = {name: value for name, value in asdict(settings).items() if name != "data_dir"}
    shown |= {"batch_size": settings.batch, "images": f"{source}, shape {list(bench.splits.train.shape)}"}
    return {"settings": shown, "one pass": one_pass(bench)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), default=Settings.network)
    parser.add_argument("--data-dir", help="folder with the data set's files; default: synthetic images")
    parser.add_argument("--methods", default=",".join(STEPS), help="rows, by name; default: all of %(default)s")
    parser.add_argument("--batch-size", type=int, help="default: that of the network")
    parser.add_argument("--width", type=int, help="of the network; default: the published one")
    parser.add_argument(
        "--steps", type=int, default=Settings.steps, help="of the attacks that take several; default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="at most; default: %(default)s")
    parser.add_argument(
        "--row-seconds",
        type=float,
        default=Settings.row_seconds,
        help=f"after {LEAST_ROUNDS} rounds a row ends once it has taken so long; default: %(default)s",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="bf16",
        choices=("both", "fp32", "bf16"),
        help="also ours and its passes with torch.compile of the network, in this dtype; --compile alone: bf16",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="also ours and its passes as CUDA graphs of a whole step; CUDA only"
    )
    parser.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN tries its algorithms; for all alike")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="write FILE (JSON) and its twin in markdown after every row"
    )
    parser.add_argument("--keep", action="store_true", help="keep the rows of FILE that are not measured now")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(parser.parse_args(arguments))
    names, results, keep = options.pop("methods").split(","), options.pop("results"), options.pop("keep")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--methods: no row {unknown[0]!r} (known: {', '.join(STEPS)})")
    if options["graphs"] and not options["device"].startswith("cuda"):
        parser.error(f"--graphs needs a CUDA device, got --device {options['device']}")
    if keep and not (results and results.exists()):
        parser.error("--keep needs the file of an earlier run as --results")
    say = partial(print, file=sys.stderr, flush=True)
    bench, command = Bench(Settings(**options)), command_line(__file__, arguments)
    facts = facts_of(bench)
    measured = {row.step: row for row in (read(results, facts) if keep else [])}
    for name in names:
        made = replace(measure(bench, name, say), command=command, commit=str(environment()["commit"]))
        measured[name] = made
        rows = [measured[step] for step in STEPS if step in measured]
        if results:
            report(results, command, facts, rows)
    print("\n".join([*NOTES, *listed({"environment": environment(), **facts}), "", aligned(table(rows))]))


@pytest.fixture(scope="module")
def small() -> Bench:
    """Narrow and short: what a step costs beyond the network shows most here."""
    return Bench(
        Settings(width=4, batch_size=32, steps=3, rounds=3, device="cuda" if torch.cuda.is_available() else "cpu")
    )


@pytest.mark.parametrize("name", STEPS)
def test_training_step(name: str, small: Bench, report_step: Callable[..., None]) -> None:
    contest = Contest(small, name)
    row = contest.look()
    for number in range(small.settings.rounds):
        contest.round(number)
    report_step(row, contest.calls["ours fp32"])


if __name__ == "__main__":
    main()
