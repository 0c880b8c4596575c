"""A training step as one graph: the weights of eager steps to the bit, for every method, and nothing waits within.

Without a GPU the stand-in of ``recorded`` is the graph: it freezes what Python computed, writes where a graph writes,
and raises at what would wait for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.capture import Capture, cuda_graph
from atlas_train import checkpoint, engine, methods, optimizers, segment, watch
from atlas_train.compiled import graphs as graphs_compiled
from atlas_train.compiled_step import CompiledStep
from atlas_train.config import TrainConfig
from atlas_train.methods import AWP, MMA, Method
from atlas_train.run import Run
from atlas_train.step_graph import StepGraph, require_recordable
from fake_graph import recorded
from tiny_runs import TINY, Lines, splits, weights

#: SGD moves a weight by its gradient. Adam would blow up what rounding makes of gradients that are zero in exact
#: arithmetic, such as that of a bias before BatchNorm: to whole steps.
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4}
ADAM = {"optimizer": "adam", "lr": 5e-3, "weight_decay": 0.0}
#: A momentum of its own in each epoch.
CYCLE = {"schedule": "one_cycle", "schedule_step": "epoch", "momentum": 0.95, "momentum_low": 0.5}
#: Forms of methods beside the default ones.
FORMS: list[dict[str, Any]] = [
    *({"method": name} for name in methods.names() if not methods.get(name).no_graph),
    *({"method": "atlas", "hyper": {"local": local}} for local in ("worst", "jacobian", "margin", "radius", "none")),
    {"method": "atlas", "hyper": {"bn": "split", "count": 2, "global_term": "ce"}},
    {"method": "atlas", "hyper": {"local": "radius", "rivals": 2}},
    *({"method": name, "hyper": {"bn_compat": True}} for name in ("adv", "trades", "yopo", "n_fgsm", "grad_align")),
    {"method": "adr", "hyper": {"form": "trades", "gs": 1.0}},
    {"method": "free", "hyper": {"clip": "sum"}},
    {"method": "gairat", "hyper": {"weighting": "discrete", "base": "trades"}},
    {"method": "llr", "hyper": {"bn": "eval", "ramp": 0.5}},
    {"method": "jacobian", "hyper": {"projections": -1}},
    {"method": "adv", "awp": 0.01, "awp_warmup": 2},
    {"method": "trades", "awp": 0.01},
    {"method": "trades", "label_smoothing": 0.1},
    {"method": "one_step_adv", "mix_share": 0.5, "mix_steps": 3, "awp": 0.01},
    {"method": "atlas", "eps_warmup": 1},
    {"method": "one_step_adv", "mixup": 1.4},
    {"method": "atlas", "cutmix": 1.0, "awp": 0.01},
    {"method": "free", "mixup": 0.3},
    {"method": "llr", "cutmix": 0.5, "hyper": {"ramp": 0.0}},
    {"method": "atlas", "hyper": {"wide_start": 2.0}},
    {"method": "atlas", "hyper": {"local": "start", "local_objective": "js", "local_ramp": 1.0}},
    {"method": "atlas", "hyper": {"local": "start", "steps": 2}, "awp": 0.01, "label_smoothing": 0.3},
    {"method": "atlas", "hyper": {"local": "start"}, "mixup": 1.0},
    {"method": "atlas", "hyper": {"local": "start", "start_noise": "liet"}},
    {"method": "atlas", "hyper": {"local": "start", "start_noise": "pgi"}, "eps_warmup": 1},
    {"method": "gat", "hyper": {"code": "fastat", "growth_start": 0.5, "attack_mode": "train"}, "mixup": 1.0},
    {"method": "gat", "hyper": {"bn_compat": True}, "awp": 0.01, "label_smoothing": 0.4},
    {"method": "adv", "norm": "l2", "eps": 0.8},
    {"method": "atlas", "norm": "l2", "eps": 0.8},
    {"method": "trades", "norm": "l1", "eps": 5.0},
    {"method": "adv"} | CYCLE,
    {"method": "free"} | CYCLE,
]


class Net(nn.Module):
    """BatchNorm and dropout, in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.out = nn.Dropout(0.0), nn.Linear(4 * 36, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.drop(self.bn(self.conv(x)).relu().flatten(1))  # type: ignore[no-any-return]

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(5)
    made = Net()
    made.drop.p = dropout
    return made


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, fused=True)


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimisers of CUDA, on every device."""
    monkeypatch.setattr(optimizers, "fusible", lambda weight: True)


class Graphs:
    """Trains with graphs, and counts recordings, replays and what is said."""

    def __init__(self, patch: pytest.MonkeyPatch, device: torch.device) -> None:
        self.recordings, self.replays, self.said = 0, 0, []
        self.recorder = cuda_graph if device.type == "cuda" else recorded
        patch.setattr(engine, "make_train_step", self.step)
        replay = Capture.__call__

        def counted(capture: Capture[Any], *inputs: Tensor) -> Any:
            self.replays += 1
            return replay(capture, *inputs)

        patch.setattr(Capture, "__call__", counted)

    def step(self, run: Run, display: Any) -> Any:
        def record(*args: Any, **how: Any) -> Any:
            self.recordings += 1
            return self.recorder(*args, **how)

        step = StepGraph(run.method, run.optimizer, self.said.append, record)
        return CompiledStep(run, step, display.say) if run.config.compile and display else step


def config(device: torch.device, **changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"device": device.type, "probe_size": 0, "epochs": 3} | SGD | changed)


def trained(config: TrainConfig, model: nn.Module | None = None, **more: Any) -> Run:
    return engine.train(config, splits=splits(), model=net() if model is None else model, **more)


def kept(run: Run) -> dict[str, Tensor]:
    """All that a step moves."""
    state = {
        f"{number} {name}": value
        for number, values in run.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    average = {} if run.average is None else {f"average {n}": v for n, v in run.average.state_dict()["model"].items()}
    return weights(run.model) | state | run.memory | average


def assert_same(graphs: Run, eager: Run) -> None:
    """To the bit, on a GPU too, where the same kernels run in the same order, in tests by deterministic algorithms."""
    mine, theirs = kept(graphs), kept(eager)
    assert mine.keys() == theirs.keys()
    other = {n: float((mine[n] - v).abs().max()) for n, v in theirs.items() if not torch.equal(mine[n], v)}
    assert not other, f"largest differences: {other}"
    drop = ("seconds", "images_per_s")
    for a, b in zip(graphs.history, eager.history, strict=True):
        values = {name: value for name, value in b.items() if name not in drop and value is not None}
        assert {name: a[name] for name in values} == values


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_every_method_makes_the_weights_of_eager_steps(
    form: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(device, **form)
    eager = trained(settings)
    graphs = Graphs(monkeypatch, device)
    assert_same(trained(settings), eager)
    assert graphs.said == []
    assert graphs.replays >= 4


def test_a_collapse_is_taken_back_as_by_eager_steps(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The attack is another from there on, and the optimiser's tensors are: all is recorded anew, looks are beside."""
    monkeypatch.setattr(segment, "EVERY", 2)
    settings = config(device, method="adv", hyper={"steps": 1}, probe_size=8, val_size=16, on_collapse="rollback")

    def rescued(name: str) -> Run:
        found = iter([0.3, 0.6, 0.1, 0.5, 0.6])
        monkeypatch.setattr(watch, "validate", lambda run: {"val_clean": 0.9, "val_pgd": next(found)})
        return trained(settings, folder=tmp_path / name)

    eager = rescued("eager")
    graphs = Graphs(monkeypatch, device)
    run = rescued("graphs")
    assert_same(run, eager)
    assert run.rescues == eager.rescues and run.rescues[0]["back_to"] == 2 and run.method.in_use()["steps"] == 2
    assert graphs.recordings == 2 and graphs.said == [] and run.history[0]["segment"] is not None


@pytest.mark.parametrize(
    "how",
    [
        ADAM,
        ADAM | {"weight_decay": 1e-2},
        {},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"method": "free"},
        {"averaging": "ema", "ema_decay": 0.9},
        {"averaging": "swa", "swa_start": 0.0},
        {"averaging": "swa", "swa_start": 0.0, "average_bn": "method"},
        SGD | {"clip_norm": 0.5, "decay_norms": False},
        SGD | {"schedule": "one_cycle", "averaging": "ema", "ema_warmup": True},
        {"optimizer": "adam", "clip_norm": 0.5, "schedule": "linear", "lr_warmup": 1.0},
        {"channels_last": True},
    ],
    ids=lambda how: "-".join(map(str, how.values())) or "sgd",
)
def test_optimisers_schedule_and_averages(
    how: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate of the default schedule is another at every step."""
    settings = config(device, **{"method": "trades", "hyper": {}} | how)
    eager = trained(settings)
    graphs = Graphs(monkeypatch, device)
    run = trained(settings)
    assert_same(run, eager)
    assert graphs.recordings == 1 and graphs.replays >= 10
    assert run.optimizer.param_groups[0]["lr"] == eager.optimizer.param_groups[0]["lr"]


def test_dropout_draws_as_in_eager_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(device, method="mart", hyper={"steps": 2})  # which attacks in eval mode
    eager = trained(settings, net(0.3))
    Graphs(monkeypatch, device)
    assert_same(trained(settings, net(0.3)), eager)


def test_bf16(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(device, method="adv", hyper={"steps": 2}, train_precision="bf16")
    eager = trained(settings)
    graphs = Graphs(monkeypatch, device)
    assert_same(trained(settings), eager)  # one forward with gradients: each weight has one use
    assert graphs.said == []
    run = trained(dataclasses.replace(settings, method="trades"))
    assert graphs.said == [] and run.history[-1]["loss"] < run.history[0]["loss"]


@pytest.fixture
def compiler(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile, on a CPU without a code generator: there operators are what the stand-in for a graph records."""
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "form",
    [
        {"method": "atlas"},
        {"method": "atlas", "train_precision": "bf16", "channels_last": True},
        {"method": "atlas", "hyper": {"local": "radius"}},
        {"method": "atlas", "hyper": {"local": "start"}},
        {"method": "trades", "hyper": {"steps": 2, "bn_compat": True}, "attack_precision": "bf16"},
        {"method": "free", "hyper": {"replays": 2}},
        {"method": "adv", "hyper": {"steps": 2, "attack_mode": "train"}, "awp": 0.01},
    ],
    ids=lambda form: "-".join(map(str, form.values())),
)
def test_graphs_of_a_compiled_network(
    form: dict[str, Any], compiler: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack and training, in their modes and with their gradients, in every step of every epoch: compiled once."""
    settings = config(device, compile=True, val_every=1, **form)
    eager, lines, made = trained(settings), Lines(), []
    before = graphs_compiled()
    graphs = Graphs(monkeypatch, device)
    torch._dynamo.reset()
    run = trained(settings, display=lines, on_epoch=lambda row: made.append(graphs_compiled() - before))
    assert_same(run, eager)
    assert graphs.recordings == 1 and graphs.replays >= 10 and graphs.said == []
    assert 0 < made[0] <= 4 and made == made[:1] * 3
    said = [line for line in lines.said if "compile" in line]
    assert len(said) == 1 and said[0].startswith(f"compile: {made[0]} graph") and " in step 1, which took " in said[0]


def test_a_last_batch_of_another_size_is_compiled_once(
    compiler: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(run: Run, step: Any) -> list[int]:
        """Epochs of two batches of 16 and one of 7."""
        made = []
        for _ in range(3):
            run.model.train()
            for number, batch in enumerate(list(run.batches)[:3]):
                batch = methods.Batch(*(t[: 7 if number == 2 else 16] for t in batch))
                descent = engine.OptimizerDescent(run.optimizer, run.rate)
                with run.training():
                    step(run.network, batch, torch.tensor([run.step, 0], device=device), run.state, descent)
                run.step += 1
            made.append(graphs_compiled())
        return made

    settings = config(device, method="atlas", compile=True)
    eager, graphed = (engine.prepare(settings, splits(), net(), None) for _ in range(2))
    steps(eager, eager.method.train_step)
    torch._dynamo.reset()
    before, graphs = graphs_compiled(), Graphs(monkeypatch, device)
    made = steps(graphed, graphs.step(graphed, None))
    assert_same(graphed, eager)
    assert made == [before + 4] * 3 and graphs.recordings == 2 and graphs.replays == 7 and graphs.said == []


def test_what_graphs_trained_can_be_resumed_eagerly_and_the_other_way(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(device, method="free", schedule="constant")
    eager = trained(settings)
    with monkeypatch.context() as patch:
        Graphs(patch, device)
        trained(dataclasses.replace(settings, epochs=2), folder=tmp_path / "graphs")
    assert_same(trained(dataclasses.replace(settings, resume=str(tmp_path / "graphs"))), eager)
    trained(dataclasses.replace(settings, epochs=1), folder=tmp_path / "eager")
    Graphs(monkeypatch, device)
    assert_same(trained(dataclasses.replace(settings, resume=str(tmp_path / "eager"))), eager)


@pytest.mark.parametrize(
    ("form", "recordings", "replays"),
    [
        ({"method": "adv"}, 1, 11),  # 12 steps, of which the first is eager
        ({"method": "gairat", "hyper": {"burn_in": 0.5}}, 2, 10),  # weights from the second epoch on
        ({"method": "cure", "hyper": {}}, 3, 9),  # a length in each of the first four epochs
        ({"method": "llr", "hyper": {"ramp": 0.5}}, 1, 5),  # six steps of the ramp, and the first after it
        ({"method": "adv", "awp": 0.01, "awp_warmup": 2}, 2, 10),
        ({"method": "free"}, 1, 10),  # the first step makes delta
        ({"method": "adv", "eps_warmup": 2}, 3, 9),  # a radius in each epoch
        ({"method": "atlas", "hyper": {"local": "start", "local_ramp": 1.0}}, 1, 11),  # its weight is an input
        ({"method": "atlas", "hyper": {"local_ramp": 0.5}}, 2, 10),  # one in the first two epochs
        ({"method": "adv"} | CYCLE, 3, 9),  # a momentum in each, which the optimiser takes from the host
        ({"method": "atlas", "mix_share": 0.5}, 2, 10),  # a graph of either kind of step, for the whole run
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_a_new_phase_is_recorded_anew(
    form: dict[str, Any], recordings: int, replays: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = Graphs(monkeypatch, device)
    trained(config(device, **form))
    assert (graphs.recordings, graphs.replays) == (recordings, replays)


@pytest.mark.parametrize("method", ["atlas", "free"])
def test_each_shape_has_its_graph(method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(run: Run, step: Any) -> None:
        """Batches of 16 and of 7, by turns, the smaller first."""
        run.model.train()
        losses = engine.Losses(run)
        for number, batch in enumerate(list(run.batches) * 3):
            batch = methods.Batch(*(t[: 16 if number % 2 else 7] for t in batch))
            descent = engine.OptimizerDescent(run.optimizer, run.rate, partial(losses.add, batch.ids))
            step(run.model, batch, torch.tensor([number, 0], device=device), run.state, descent)
            run.step += 1
        losses.read()

    eager, graphed = (engine.prepare(config(device, method=method), splits(), net(), None) for _ in range(2))
    steps(eager, eager.method.train_step)
    graphs = Graphs(monkeypatch, device)
    steps(graphed, graphs.step(graphed, None))
    assert_same(graphed, eager)
    assert graphs.recordings == 2 and graphs.replays >= 7


def test_a_recording_trains_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[dict[str, Tensor]] = []
    after: list[dict[str, Tensor]] = []
    run = engine.prepare(config(device, method="free"), splits(), net(0.3), None)
    graphs = Graphs(monkeypatch, device)

    def noted(*args: Any, **how: Any) -> Any:
        before.append({name: value.clone() for name, value in kept(run).items()} | random())
        return recorder(*args, **how)

    def random() -> dict[str, Tensor]:
        return {"cpu": torch.get_rng_state()} | ({"gpu": torch.cuda.get_rng_state()} if device.type == "cuda" else {})

    def replayed(capture: Any, *inputs: Tensor) -> Any:
        after.append({name: value.clone() for name, value in kept(run).items()} | random())
        return replay(capture, *inputs)

    recorder, graphs.recorder, replay = graphs.recorder, noted, Capture.__call__
    monkeypatch.setattr(Capture, "__call__", replayed)
    engine.train_epoch(run, engine.progress.Silent(), graphs.step(run, None))
    assert len(before) == 1 and before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert all(weight.grad is None for weight in run.model.parameters())


class Looking(Net):
    """Waits for the device in the middle of a step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.detach().sum().item() > 0 else 2.0)


@pytest.mark.parametrize("method", ["adv", "free"])
def test_what_cannot_be_recorded_is_said_once_and_trained_eagerly(
    method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looking() -> nn.Module:
        torch.manual_seed(5)
        return Looking()

    settings = config(device, method=method)
    eager = trained(settings, looking())
    graphs = Graphs(monkeypatch, device)
    assert_same(trained(settings, looking()), eager)
    assert graphs.recordings == 1 and graphs.replays == 0
    assert len(graphs.said) == 1 and "goes on without" in graphs.said[0] and ".item()" in graphs.said[0]


class Growing(Net):
    """A layer joins in from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.forwards = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits = super().forward(x)
        return logits if self.forwards == 1 else self.late(logits)


@pytest.mark.parametrize(("how", "replays"), [(ADAM, 0), (SGD, 11)], ids=["adam", "sgd"])
def test_an_optimiser_makes_no_memory_in_a_graph(
    how: dict[str, Any], replays: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam begins with a weight when that has its first gradient; SGD has begun with all of them."""

    def growing() -> nn.Module:
        torch.manual_seed(5)
        return Growing()

    settings = config(device, method="standard", **how)
    eager = trained(settings, growing())
    graphs = Graphs(monkeypatch, device)
    assert_same(trained(settings, growing()), eager)
    assert graphs.replays == replays and len(graphs.said) == (replays == 0)
    assert all("moves a weight for the first time" in text for text in graphs.said)


def test_a_loss_that_is_not_finite_is_found_behind_the_graph(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    Graphs(monkeypatch, device)
    add = engine.Losses.add

    def spoiled(losses: engine.Losses, ids: Tensor, loss: Tensor, metrics: Any) -> None:
        add(losses, ids, loss * (float("nan") if losses._run.step == 6 else 1.0), metrics)

    monkeypatch.setattr(engine.Losses, "add", spoiled)
    with pytest.raises(engine.NonFiniteLoss, match=r"at step 6 \(loss nan, adv") as caught:
        trained(config(device, method="adv"), folder=tmp_path)
    assert len(caught.value.ids) == 16 and checkpoint.load(tmp_path)["epoch"] == 1


@pytest.mark.parametrize(
    ("method", "policy", "message"),
    [
        (MMA(0.1), "stop", "cannot be had with mma, which waits to know.*set cuda_graphs='attack'"),
        (AWP(MMA(0.1)), "stop", "cannot be had with mma"),
        (methods.ADV(0.1), "skip", "on_nonfinite='skip' looks at every loss.*set on_nonfinite='stop'"),
    ],
)
def test_what_can_never_be_recorded_is_refused(method: Method, policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_recordable(method, fused(net()), policy)


@pytest.mark.parametrize(
    "made",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.Adam(p, 0.1),
        lambda p: torch.optim.Adam(p, 0.1, fused=True),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p: torch.optim.RMSprop(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
        lambda p: torch.optim.SGD([{"params": [w]} for w in p], 0.1),
    ],
    ids=["sgd", "adam", "adam that is not capturable", "adamw", "rmsprop", "nesterov", "amsgrad", "groups"],
)
def test_other_optimisers_are_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="reads its learning rate on the device.*is not fused.*cuda_graphs='attack'"):
        StepGraph(methods.ADV(0.1), made(list(net().parameters())), print)
    with pytest.raises(ValueError, match="cannot be had with mma"):
        StepGraph(MMA(0.1), fused(net()), print)
