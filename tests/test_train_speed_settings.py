"""Settings of how a run is computed: whatever they are, it is the same training, each part of it run as asked."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from atlas_kernels import memory, noise_key
from atlas_kernels.attacks.execution import current_execution
from atlas_train import checkpoint, compiled_step, engine, methods, models, optimizers, progress
from atlas_train import run as runs
from atlas_train.compare import compare
from atlas_train.config import TrainConfig, resolved
from atlas_train.methods import Batch, State
from atlas_train.passes import count_passes, passes_per_step
from atlas_train.recompute import Recomputed, blocks
from atlas_train.step_graph import StepGraph
from beside_published import Steps
from tiny_runs import EPS, TINY, Lines, same, splits, weights

#: Methods whose attacks the hook below does not see: they have none, or one of the first layer or of sure samples, or
#: on a forward of training that they keep.
UNSEEN = {name for name in methods.names() if not methods.get(name).adversarial} | {"free", "yopo", "mma"}
UNSEEN |= {"fgsm_pgi", "fgsm_uap", "stored_adv"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOTH_WAYS = [("bf16", "fp32"), ("fp32", "bf16")]


def digits_net() -> nn.Module:
    torch.manual_seed(1)
    return models.build("digits_net", num_classes=4, in_channels=1, width=4)


def config(method: str = "atlas", **settings: Any) -> TrainConfig:
    hyper = {"steps": 2} if "steps" in methods.hyper_parameters(methods.get(method)) else {}
    return TrainConfig(method, hyper, **TINY | {"epochs": 1, "probe_size": 0} | settings)


# --- precision


@pytest.mark.parametrize(("attack", "training"), BOTH_WAYS)
@pytest.mark.parametrize("name", methods.names())
def test_attack_and_training_each_run_in_their_precision(name: str, attack: str, training: str) -> None:
    model = digits_net()
    seen: dict[bool, set[torch.dtype]] = {False: set(), True: set()}
    conv = model.conv2
    conv.register_forward_hook(lambda module, args, out: seen[module.weight.requires_grad].add(out.dtype))
    run = engine.train(
        config(name, attack_precision=attack, train_precision=training), splits=splits(train=16), model=model
    )
    assert seen[True] == {PRECISIONS[training]}
    assert seen[False] == (set() if name in UNSEEN else {PRECISIONS[attack]})
    assert all(p.dtype == torch.float32 for p in model.parameters()) and run.step == 1


@pytest.mark.parametrize(("attack", "training"), BOTH_WAYS)
def test_mma_and_yopo_attack_in_the_attacks_precision(attack: str, training: str) -> None:
    whole, rest = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    cases = [("mma", {"steps": 2}, digits_net()), ("yopo", {"first_layer": "0"}, nn.Sequential(whole, rest))]
    for name, hyper, model in cases:  # a first layer that is not affine, so it runs in the inner steps
        seen: set[torch.dtype] = set()
        conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        conv.register_forward_hook(partial(noted_frozen, seen))
        settings = TINY | {"attack_precision": attack, "train_precision": training, "probe_size": 0, "epochs": 6}
        engine.train(TrainConfig(name, hyper, **settings), splits=splits(), model=model)
        assert seen == {PRECISIONS[attack]}, name


def noted_frozen(seen: set[torch.dtype], conv: nn.Module, args: Any, out: Tensor) -> None:
    """A hook that notes in what a frozen layer computes."""
    if not conv.weight.requires_grad:
        seen.add(out.dtype)


@pytest.mark.parametrize("training", PRECISIONS)
@pytest.mark.parametrize("attack", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "hyper"),
    [("adv", {"steps": 3}), ("one_step_adv", {}), ("trades", {"steps": 3}), ("atlas", {"project": True})],
)
def test_adversaries_are_in_the_ball_exactly(
    monkeypatch: pytest.MonkeyPatch, name: str, hyper: dict[str, Any], attack: str, training: str
) -> None:
    model, clean, trained = digits_net(), [], []
    train_step = methods.Method.train_step
    monkeypatch.setattr(
        methods.Method,
        "train_step",
        lambda self, m, batch, *rest: clean.append(batch.x) or train_step(self, m, batch, *rest),
    )

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if next(module.parameters()).requires_grad and module.training:
            trained.append((clean[-1], args[0].detach().clone()))

    model.register_forward_pre_hook(look)
    settings = TINY | {"epochs": 1, "attack_precision": attack, "train_precision": training, "probe_size": 0}
    engine.train(TrainConfig(name, hyper, **settings), splits=splits(), model=model)
    assert len(trained) >= 4
    for x, images in trained:
        assert images.dtype == torch.float32
        for part in images.split(len(x)):
            assert torch.equal(part, part.clamp(x - EPS, x + EPS)) and part.min() >= 0 and part.max() <= 1


@pytest.mark.parametrize(("attack", "training"), BOTH_WAYS)
def test_probe_and_validation_run_as_attacks_do(attack: str, training: str) -> None:
    for settings in ({"probe_size": 8}, {"val_size": 8}):
        model, looks = digits_net(), set()
        note = partial(noted, model, looks)
        model.conv2.register_forward_hook(note)
        chosen = config("one_step_adv", attack_precision=attack, train_precision=training, **settings)
        engine.train(chosen, splits=splits(), model=model)
        assert looks == {PRECISIONS[attack]}


def noted(model: nn.Module, looks: set[torch.dtype], conv: nn.Module, args: Any, out: Tensor) -> None:
    """A hook that notes in what eval-mode forwards compute; one_step_adv makes none."""
    if not model.training:
        looks.add(out.dtype)


def test_attacks_take_the_precision_of_training_unless_told_otherwise() -> None:
    def chosen(**settings: str) -> str:
        return runs.prepare(config(**settings), splits(), None, None).execution.precision

    assert chosen() == "fp32" and chosen(train_precision="bf16") == "bf16"
    assert chosen(train_precision="bf16", attack_precision="fp32") == "fp32"


def test_a_run_has_one_execution_and_it_ends_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train_step = methods.Method.train_step
    monkeypatch.setattr(
        methods.Method, "train_step", lambda *args: seen.append(current_execution()) or train_step(*args)
    )
    run = engine.train(config(), splits=splits(), on_epoch=lambda row: seen.append(current_execution()))
    assert [execution is run.execution for execution in seen] == [True] * 4 + [False]


@pytest.fixture
def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of a run that takes itself to be on CUDA, and is prepared on the CPU."""
    monkeypatch.setattr(runs, "usable_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(optimizers, "fusible", lambda weight: True)
    return {"device": "cuda"}


def test_what_the_execution_is_told(as_if_cuda: dict[str, str]) -> None:
    for settings in ({}, {"cuda_graphs": "attack"}, {"cuda_graphs": "step"}):
        made = runs.prepare(config(**settings, **as_if_cuda), splits(), None, None).execution
        assert made.cuda_graphs == (settings.get("cuda_graphs") == "attack")


def test_graphs_of_whole_steps_are_asked_for_and_refused_before_anything_is_written(
    as_if_cuda: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.prepare(config(cuda_graphs="step", **as_if_cuda), splits(), None, None)
    assert isinstance(engine.make_train_step(run, progress.Silent()), StepGraph)
    run = runs.prepare(config(cuda_graphs="attack", **as_if_cuda), splits(), None, None)
    assert engine.make_train_step(run, progress.Silent()) == run.method.step
    for method, settings in (("mma", {}), ("adv", {"on_nonfinite": "skip"})):
        chosen = config(method, cuda_graphs="step", **settings, **as_if_cuda)
        with pytest.raises(ValueError, match="cuda_graphs='attack'"):
            engine.train(chosen, splits=splits(), folder=tmp_path / "run")
    monkeypatch.setattr(optimizers, "fusible", lambda weight: weight.dim() > 1)
    with pytest.raises(ValueError, match="this Adam is not fused.*dense in memory.*cuda_graphs='attack'"):
        engine.train(config(cuda_graphs="step", **as_if_cuda), splits=splits(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- torch.compile


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(params=["eager"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """torch.compile without a code generator: what is traced, and how often, is what is looked at here."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    yield
    torch._dynamo.reset()


INSIDE = ("yopo", "jacobian", "grad_align", "cure", "llr")  # which look inside, or differentiate twice


@pytest.mark.parametrize("name", [name for name in methods.names() if name not in INSIDE])
def test_a_compiled_run_is_the_same_run(compiler: None, name: str) -> None:
    plain = engine.train(config(name, epochs=2), splits=splits(train=32))
    assert graphs() == 0
    after: list[int] = []
    lines = Lines()
    run = engine.train(
        config(name, epochs=2, compile=True, val_every=1),
        splits=splits(train=32),
        on_epoch=lambda row: after.append(graphs()),
        display=lines,
    )
    assert same(weights(run.model), weights(plain.model))
    assert [row["loss"] for row in run.history] == [row["loss"] for row in plain.history]
    assert 0 < after[0] <= after[1] <= 3
    said = [line for line in lines.said if "compile" in line]
    assert " of the network in step 1, which took " in said[0]
    assert (after[0] == after[1] and len(said) == 1) or name == "mma"  # whose attack meets other sizes, see below


@pytest.mark.parametrize("name", INSIDE)
def test_methods_that_compiled_code_cannot_serve_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=f"compile=True cannot be had with {name}, which .*: set compile=False"):
        engine.train(config(name, compile=True), splits=splits(), folder=folder)
    with pytest.raises(ValueError, match=f"cannot be had with {name}"):
        compare(config(compile=True, beside=(name,), out_dir=str(folder)), splits=splits())
    assert not folder.exists()


class InTwo(nn.Module):
    """BatchNorm and dropout, and then a part that is compiled on its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.last = nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        torch._dynamo.graph_break()
        return self.last(h)


@pytest.mark.parametrize(("number", "made"), [(1, 0), (4, 3)])
def test_a_network_that_cannot_be_compiled_stops_the_run_or_is_trained_as_it_is(
    compiler: None, number: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth graph is the end of the training forward: statistics have moved, and dropout has drawn."""
    seen = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            raise RuntimeError("no compiler for this")
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=backend))  # type: ignore[attr-defined]
    chosen = config("adv", compile=True, epochs=2)
    plain = engine.train(dataclasses.replace(chosen, compile=False), splits=splits(train=32), model=InTwo())
    with pytest.raises(RuntimeError, match="cannot be compiled .*no compiler for this.*on_compile_error='eager'"):
        engine.train(chosen, splits=splits(train=32), model=InTwo())
    torch._dynamo.reset()
    seen, lines = 0, Lines()
    asked = dataclasses.replace(chosen, on_compile_error="eager")
    run = engine.train(asked, splits=splits(train=32), model=InTwo(), display=lines)
    assert same(weights(run.model), weights(plain.model)) and run.network is run.model
    said = [line for line in lines.said if "compile" in line]
    assert "no compiler for this" in said[0] and "goes on without, as on_compile_error='eager' says" in said[0]
    assert len(said) == 1 + (made > 0) and (not made or f"{made} graphs" in said[1])


def test_a_network_that_is_compiled_again_and_again_stops_the_run(
    compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would run it uncompiled from some number of graphs on, and warn of it once."""
    monkeypatch.setattr(compiled_step, "LIMIT", 1)
    with pytest.raises(RuntimeError, match="cannot be compiled .*FailOnRecompileLimitHit"):
        engine.train(config("adv", compile=True), splits=splits())


def test_graphs_stay_few_where_batches_differ_in_size(compiler: None) -> None:
    after: list[int] = []
    chosen = TrainConfig("mma", {"steps": 2}, **TINY | {"epochs": 8, "compile": True, "probe_size": 0})
    engine.train(chosen, splits=splits(), on_epoch=lambda row: after.append(graphs()))
    assert 3 <= after[-1] <= 6 and after[-1] == after[-3]


@pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)
@pytest.mark.parametrize(("name", "averaging"), [("one_step_adv", "ema"), ("trades", "none")])
def test_compiled_for_the_backward_too(compiler: None, name: str, averaging: str) -> None:
    settings = {"attack_precision": "bf16", "averaging": averaging, "awp": 0.01}
    plain = engine.train(config(name, **settings), splits=splits(train=32))
    run = engine.train(config(name, **settings, compile=True), splits=splits(train=32))
    assert graphs() > 0
    for (key, a), b in zip(weights(run.final_model).items(), weights(plain.final_model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=key)
    assert passes_per_step(run) == pytest.approx(passes_per_step(plain))


@pytest.mark.parametrize("compiler", ["inductor"], indirect=True)
def test_by_the_code_that_torch_generates(compiler: None) -> None:
    """Convolution, BatchNorm and ReLU with the gradients of attack and training, on this machine's compiler."""

    def net() -> nn.Module:
        torch.manual_seed(6)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))

    chosen = config("one_step_adv", optimizer="sgd", channels_last=True)
    plain = engine.train(chosen, splits=splits(train=32), model=net())
    run = engine.train(dataclasses.replace(chosen, compile=True), splits=splits(train=32), model=net())
    assert graphs() == 2
    for (key, a), b in zip(weights(run.model).items(), weights(plain.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_compiled_or_not(compiler: None, tmp_path: Path, first: bool) -> None:
    chosen = config("adv", epochs=2, schedule="constant", averaging="ema", compile=first)
    engine.train(dataclasses.replace(chosen, epochs=1), splits=splits(train=32), folder=tmp_path)
    assert checkpoint.load(tmp_path)["model"].keys() == digits_net().state_dict().keys()
    resumed = dataclasses.replace(chosen, compile=not first, resume=str(tmp_path))
    run = engine.train(resumed, splits=splits(train=32))
    whole = engine.train(dataclasses.replace(chosen, compile=False), splits=splits(train=32))
    assert same(weights(run.final_model), weights(whole.final_model))
    loaded, _ = checkpoint.load_model(tmp_path)
    assert same(weights(loaded), weights(run.final_model))


# --- checkpointed activations


class Blocks(nn.Module):
    """Blocks with BatchNorm and dropout in an nn.ModuleList, within an nn.Sequential that is itself no block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        rows = [
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3)) for _ in "123"
        ]
        self.body = nn.Sequential(nn.ModuleList(rows), nn.Linear(6, 4))

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body[0]:
            x = x + block(x)
        return x.mean((2, 3))

    def head(self, features: Tensor) -> Tensor:
        return self.body[1](features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def blocks_net() -> nn.Module:
    torch.manual_seed(2)
    return Blocks()


def step(model: nn.Module, method: methods.Method, *, recomputed: bool) -> tuple[list[Tensor], int]:
    """What a training step came to, in double precision, random state included; and how often a convolution ran."""
    torch.manual_seed(3)
    model = copy.deepcopy(model).double().train()
    batch = Batch(torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 4, torch.arange(6))
    key, steps, count = noise_key(), Steps(model), 0

    def look(*_: Any) -> None:
        nonlocal count
        count += 1

    conv = [module for module in model.modules() if isinstance(module, nn.Conv2d)][1]
    conv.register_forward_pre_hook(look)
    with Recomputed(model) if recomputed else nullcontext():
        loss, _ = method.step(model, batch, key, State(epoch=1, epochs=2, size=50), steps)
    assert all("forward" not in vars(module) for module in model.modules())
    return [
        loss,
        *(g for grads in steps.grads for g in grads),
        *model.state_dict().values(),
        torch.get_rng_state(),
    ], count


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("network", ["digits_net", "preact_resnet18", "own"])
def test_gradients_and_statistics_are_those_without(name: str, network: str) -> None:
    torch.manual_seed(0)
    model = Blocks() if network == "own" else models.build(network, num_classes=4, in_channels=1, width=2)
    hyper = {"llr": {"bn": "eval"}, "atlas": {"local": "jacobian", "count": 2}}.get(name, {})
    method = methods.build(name, EPS, hyper)
    (plain, once), (again, more) = (step(model, method, recomputed=recomputed) for recomputed in (False, True))
    assert more > once
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_attacks_take_no_pass_more() -> None:
    model = models.build("preact_resnet18", num_classes=4, in_channels=1, width=2).train()
    batch = Batch(torch.rand(6, 1, 8, 8), torch.arange(6) % 4, torch.arange(6))
    method = methods.build("adv", EPS, {"steps": 5})

    def call() -> None:
        method.train_step(model, batch, noise_key(), State(), Steps(model, lr=0))

    passes = count_passes(model, batch.x, call)
    with Recomputed(model):
        again = count_passes(model, batch.x, call)  # a block is left where its last convolution has its input
        assert passes + 0.3 < again < passes + 1


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in own)


@pytest.mark.parametrize(("name", "share"), [("digits_net", 0.8), ("small_cnn", 0.5), ("preact_resnet18", 0.45)])
def test_less_is_kept(name: str, share: float) -> None:
    model = models.build(name, num_classes=4, in_channels=1, width=8).train()
    x = torch.rand(8, 1, *[model.image_size or 16] * 2)
    plain = kept(model, x)
    with Recomputed(model):
        assert kept(model, x) < share * plain


def test_blocks() -> None:
    def names(model: nn.Module) -> list[str]:
        known = {module: name for name, module in model.named_modules()}
        return [known[module] for module, name in blocks(model) if name == "forward"]

    resnet = models.build("preact_resnet18", num_classes=4, in_channels=3, width=2, normalize=((0.5,) * 3, (0.25,) * 3))
    eight = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert names(resnet) == eight
    assert names(nn.Sequential(nn.Flatten(), resnet)) == [f"1.{name}" for name in eight]
    assert names(Blocks()) == ["body.0.0", "body.0.1", "body.0.2"]
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert names(nn.Sequential(shared, shared, nn.Linear(2, 2))) == ["0"]


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ("standard", nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "Sequential has no blocks.*stages"),
        ("llr", None, "llr looks into the network"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(
    tmp_path: Path, method: str, model: nn.Module | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"checkpoint_activations: {message}.*checkpoint_activations=False"):
        engine.train(config(method, checkpoint_activations=True), splits=splits(), model=model, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "awp"), [("trades", 0.0), ("adv", 0.01)])
def test_a_run_with_checkpointed_activations_is_the_same_run(name: str, awp: float) -> None:
    plain, run = (
        engine.train(
            config(name, checkpoint_activations=again, train_precision="bf16", awp=awp), splits=splits(), model=model
        )
        for again, model in ((False, blocks_net()), (True, blocks_net()))
    )
    assert same(weights(run.model), weights(plain.model))
    assert passes_per_step(plain) + 0.5 < passes_per_step(run), "and they are counted"


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_tries_its_algorithms_while_a_run_lasts(wanted: bool) -> None:
    seen: list[bool] = []

    def look(row: dict[str, Any]) -> None:
        seen.append(torch.backends.cudnn.benchmark)

    engine.train(config("standard", cudnn_benchmark=wanted), splits=splits(), on_epoch=look)
    assert seen == [wanted] and not torch.backends.cudnn.benchmark


# --- the host's memory, and what does not go together


def test_freed_memory_is_kept_while_a_run_lasts() -> None:
    depths: list[int] = []
    engine.train(config(), splits=splits(), on_epoch=lambda row: depths.append(memory._depth))
    assert depths == [1] and memory._depth == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuda_graphs": "attack", "device": "cpu"}, "cuda_graphs='attack' needs a CUDA device, got device='cpu'"),
        (
            {"cuda_graphs": "step", "checkpoint_activations": True},
            "cuda_graphs='step' and checkpoint_activations do not",
        ),
        ({"compile": True, "checkpoint_activations": True}, "compile and checkpoint_activations do not go together"),
        ({"cuda_graphs": "always"}, "cuda_graphs must be one of 'none', 'attack', 'step', got 'always'"),
        ({"attack_precision": "fp16"}, "attack_precision must be one of 'fp32', 'bf16', 'auto', got 'fp16'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default device has CUDA")
def test_cuda_graphs_are_refused_where_the_default_device_has_none(tmp_path: Path) -> None:
    chosen = config(cuda_graphs="step", device=None)
    with pytest.raises(ValueError, match="cuda_graphs='step' needs a CUDA device, got device='cpu'"):
        resolved(chosen, splits())
    with pytest.raises(ValueError, match="needs a CUDA device"):
        engine.train(chosen, splits=splits(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
