"""AWP does what its published code does with a second network: loss, gradients, weights and BatchNorm, to 1e-9."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from atlas_train import engine, methods
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.methods import ADV, AWP, TRADES, Method, Standard, State
from atlas_train.methods.awp import perturbed
from atlas_train.methods.terms import near_start
from atlas_train.passes import count_passes
from beside_published import EPS, Outcome, Steps, assert_same, case, close, ours, theirs
from published import awp as published
from tiny_runs import TINY, same, splits, weights

HOW = {"eps": EPS, "step_size": EPS / 3, "steps": 4}
GAMMA = 0.05


def assert_same_weights(mine: Outcome, expected: Outcome) -> None:
    for (name, left), right in zip(mine.model.named_parameters(), expected.model.parameters(), strict=True):
        close(left.detach(), right.detach(), name)


@pytest.mark.parametrize("bn_compat", [False, True])
def test_at_awp(bn_compat: bool) -> None:
    made = case()
    expected = theirs(published.at_awp, made, made.start(), **HOW, gamma=GAMMA)
    mine = ours(AWP(ADV(**HOW, bn_compat=bn_compat), GAMMA), made)
    assert_same(mine, expected, statistics=bn_compat)
    assert_same_weights(mine, expected)
    if not bn_compat:  # the lean way: the one forward of the loss, at the perturbed weights
        assert int(mine.model.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("bn_compat", [False, True])
def test_trades_awp(bn_compat: bool) -> None:
    made = case()
    expected = theirs(published.trades_awp, made, near_start(made.batch, made.key), **HOW, beta=6.0, gamma=GAMMA)
    mine = ours(AWP(TRADES(**HOW, beta=6.0, bn_compat=bn_compat), GAMMA), made)
    assert_same(mine, expected, statistics=bn_compat)
    assert_same_weights(mine, expected)
    assert int(mine.model.bn1.num_batches_tracked) == (3 if bn_compat else 2)


def test_the_perturbation_matters_and_the_warm_up_is_without_it() -> None:
    made = case()
    plain = ours(ADV(**HOW), made, State(epoch=1, epochs=4))
    warm = ours(AWP(ADV(**HOW), GAMMA, warmup=2), made, State(epoch=1, epochs=4))
    late = ours(AWP(ADV(**HOW), GAMMA, warmup=2), made, State(epoch=2, epochs=4))
    assert torch.equal(warm.loss, plain.loss) and same(weights(warm.model), weights(plain.model))
    assert late.loss > 1.05 * plain.loss


@pytest.mark.parametrize(("method", "passes"), [(ADV(0.1, steps=10), 23 + 3), (TRADES(0.1, steps=10), 27 + 6)])
def test_passes(method: Method, passes: float) -> None:
    made = case()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(256, 5)
    )
    batch, model = made.batch._replace(x=made.batch.x.float()), model.train()
    counted = count_passes(
        model, batch.x, lambda: AWP(method).train_step(model, batch, made.key, State(), Steps(model))
    )
    assert counted == pytest.approx(passes, abs=0.15)


@pytest.mark.parametrize("where", ["objective", "backward", "step"])
def test_an_exception_puts_the_weights_back(where: str) -> None:
    made = case()
    before, seen = weights(made.model), []

    class Failing(Steps):
        def backward(self, loss, metrics=None):
            seen.append(same(weights(self.model), before))
            if where == "backward":
                raise KeyboardInterrupt
            super().backward(loss)

        def step(self):
            raise KeyboardInterrupt

    def fail_the_second_time(module: nn.Module, args: tuple) -> None:
        calls.append(module.training)
        if where == "objective" and len(calls) == 2:
            raise KeyboardInterrupt

    calls: list[bool] = []
    made.model.linear.register_forward_pre_hook(fail_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        AWP(Standard(EPS), GAMMA).train_step(made.model.train(), made.batch, made.key, State(), Failing(made.model))
    assert seen == ([] if where == "objective" else [False])
    parameters = dict(made.model.named_parameters())
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


def test_sixteen_bit_copies_of_the_weights_are_made_anew() -> None:
    model = nn.Linear(3, 3)
    x = torch.rand(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with perturbed(model, {"weight": torch.ones(3, 3)}, 1.0):
            assert (model(x) - before).abs().min() > 0.1
        assert torch.equal(model(x), before)


def test_bf16_trains_at_the_perturbed_weights() -> None:
    made = case()
    model, batch = made.model.float().train(), made.batch._replace(x=made.batch.x.float())
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            step = copy.deepcopy(model)
            loss, _ = AWP(Standard(EPS), 0.2).train_step(step, batch, made.key, State(), Steps(step))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@dataclass(frozen=True)
class Interleaving(Method):
    name: ClassVar[str] = "interleaving"

    def objective(self, model, batch, given):
        raise NotImplementedError

    def train_step(self, model, batch, key, state, descent):
        raise NotImplementedError


def test_a_method_with_a_step_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="interleaving interleaves the two .*set awp=0"):
        AWP(Interleaving(EPS))
    monkeypatch.setitem(methods._METHODS, "interleaving", Interleaving)
    with pytest.raises(ValueError, match="interleaving interleaves the two"):
        TrainConfig(method="interleaving", awp=0.01)


def test_the_configuration_wraps_the_method_and_not_those_beside(tmp_path: Path) -> None:
    config = TrainConfig(method="adv", eps=0.1, awp=0.01, awp_warmup=3, hyper={"steps": 2})
    assert config.build_method() == AWP(ADV(0.1, steps=2), 0.01, 3) and AWP(Standard(0.1)).adversarial is False
    tiny = TINY | {"method": "adv", "hyper": {"steps": 1}, "beside": ("standard",), "epochs": 1, "awp": 0.01}
    results = compare(TrainConfig(**tiny, out_dir=str(tmp_path)), splits=splits(), show="silent", say=lambda text: None)
    assert list(results) == ["standard", "adv+awp"]
    assert results["standard"].passes == pytest.approx(3, abs=0.3)
    assert results["adv+awp"].passes == pytest.approx(2 + 3 + 3, abs=0.6)
    with pytest.raises(ValueError, match="other hyper-parameters"):
        changed = TINY | {"method": "adv", "hyper": {"steps": 1}, "awp": 0.02, "resume": str(tmp_path / "adv")}
        engine.train(TrainConfig(**changed), splits=splits())


def test_shared_weights_are_perturbed_once() -> None:
    layer = nn.Linear(3, 3)
    both = nn.Sequential(layer, layer)
    before = layer.weight.detach().clone()
    with perturbed(both, {"0.weight": torch.ones(3, 3)}, 0.5):
        torch.testing.assert_close(layer.weight, before + 0.5)
