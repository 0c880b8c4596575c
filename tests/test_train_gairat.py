"""GAIRAT does what its published code does: adversary and count, weights, loss, gradients, and the epoch it begins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from atlas_kernels.attacks import PGD
from atlas_train.methods import GAIRAT, State
from atlas_train.methods.terms import near_start
from beside_published import EPS, Case, assert_same, case, close, ours, theirs
from published import gairat as published


@pytest.fixture
def made() -> Case:
    """A case in which the attack breaks some samples at once, some on the way and some never."""
    made = case(size=16)
    with torch.no_grad():
        y = copy.deepcopy(made.model).eval()(made.batch.x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return Case(made.model, made.batch._replace(y=y), made.key)


def the_kappa(made: Case, **how: Any) -> torch.Tensor:
    found = PGD(EPS, **how, count_correct=True).run(made.model, made.batch.x, made.batch.y, start=made.start())
    assert found.kappa is not None
    return found.kappa


@pytest.mark.parametrize("steps", [4, 5])  # odd: h is int(K / 2)
@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "discrete"])
def test_gairat(made: Case, kind: str, steps: int) -> None:
    how = {"eps": EPS, "step_size": EPS / 5, "steps": steps, "lam": -0.5}
    assert len(the_kappa(made, step_size=EPS / 5, steps=steps).unique()) >= 4
    expected = theirs(published.gairat, made, made.start(), **how, kind=kind, begun=True)
    mine = ours(GAIRAT(**how, weighting=kind), made)  # type: ignore[arg-type]
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=True)


def test_gairat_on_trades(made: Case) -> None:
    how = {"eps": EPS, "step_size": EPS / 5, "steps": 5, "lam": -0.5, "beta": 3.0}
    start = near_start(made.batch, made.key)
    mine = ours(GAIRAT(**how, base="trades"), made)
    expected = theirs(published.gairat_trades, made, start, **how, kind="tanh", begun=True)
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=True)
    plain = ours(GAIRAT(**how, base="trades"), made, State(epoch=0, epochs=10))
    begun = theirs(published.gairat_trades, made, start, **how, kind="tanh", begun=False)
    assert_same(plain, begun, statistics=True)


@pytest.mark.parametrize(("epoch", "begun"), [(0, False), (58, False), (59, True), (119, True)])
def test_the_weights_begin_at_epoch_60_of_120_and_until_then_it_is_adv(made: Case, epoch: int, begun: bool) -> None:
    how = {"eps": EPS, "step_size": EPS / 5, "steps": 4, "lam": -1.0}
    expected = theirs(published.gairat, made, made.start(), **how, kind="tanh", begun=epoch + 1 >= 60)
    mine = ours(GAIRAT(**how), made, State(epoch=epoch, epochs=120))
    assert_same(mine, expected, statistics=True if begun else 1e-9)
    given = GAIRAT(**how).prepare(made.model, made.batch, made.key, State(epoch=epoch, epochs=120))
    assert (given.weights is not None) == begun


def test_burn_in_is_exact_where_the_share_is_no_binary_fraction() -> None:
    def first(burn_in: float, epochs: int) -> int:
        batch = case(size=2)
        method = GAIRAT(EPS, steps=2, burn_in=burn_in)
        states = (State(epoch=epoch, epochs=epochs) for epoch in range(epochs))
        used = [method.prepare(batch.model, batch.batch, batch.key, s).weights is not None for s in states]
        assert used == sorted(used)
        return used.index(True) + 1

    assert (first(0.0, 5), first(0.28, 25), first(1.0, 4)) == (1, 7, 4)


def test_kappa_counts_before_each_step_and_never_the_adversary_itself(made: Case) -> None:
    right: list[torch.Tensor] = []
    hook = made.model.register_forward_hook(lambda module, args, z: right.append(z.argmax(1) == made.batch.y))
    method = GAIRAT(EPS, steps=5, step_size=EPS / 5)
    given = method.prepare(made.model, made.batch, made.key, State())
    made.model.eval()(given.adv)
    hook.remove()
    assert len(right) == 6 and not torch.equal(right[0], right[-1])  # else the test could not tell
    kappa = torch.stack(right[:-1]).sum(0).double()
    assert given.weights is not None
    close(given.weights, published.normalised_weights(kappa, 5, -1.0, "tanh"), "weights")


def test_the_sigmoid_form_is_the_tanh_form_and_keeps_small_weights_in_float32() -> None:
    kappa, lam = torch.arange(11), -1.0
    argument = lam + (5 - kappa.double()) * 5 / 5
    tanh = (1 + argument.tanh()) / 2
    torch.testing.assert_close(torch.sigmoid(2 * argument), tanh, rtol=1e-9, atol=0)
    torch.testing.assert_close(GAIRAT(EPS).weights(kappa).double(), tanh / tanh.mean(), rtol=2e-6, atol=0)
    single = (1 + argument.float().tanh()) / 2
    assert abs(single[-1] / tanh[-1] - 1) > 5e-4  # why the sigmoid
    halved = torch.sigmoid(argument)
    mine = GAIRAT(EPS, weighting="sigmoid").weights(kappa).double()
    torch.testing.assert_close(mine, halved / halved.mean(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("lam", [-1.0, -1000.0])
@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "discrete"])
def test_a_batch_that_is_never_broken_has_weights_1(kind: str, lam: float) -> None:
    weights = GAIRAT(EPS, weighting=kind, lam=lam).weights(torch.full((7,), 10))  # type: ignore[arg-type]
    torch.testing.assert_close(weights, torch.ones(7))


def test_one_attack_step_is_refused() -> None:
    with pytest.raises(ValueError, match="gairat: steps must be an integer >= 2, got 1"):
        GAIRAT(EPS, steps=1)
