"""NuAT does what its published code does: losses, adversaries, gradients and BatchNorm over two epochs, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from atlas_train.methods import AWP, Batch, NuAT, State
from beside_published import EPS, Case, Outcome, Steps, case, close
from published import nuat as published
from test_train_gat import assert_all_same, assert_as_in_eval_mode, batches, trained

#: Over 90 % of two epochs the weight grows to its end, so in the second it is 2.5; over all of them, towards 4: 2.
AUTHORS = {"noise": EPS / 2, "nuc_max": 4.5, "growing": 1.8, "divisor": 64}
FASTAT = {"noise": EPS / 2, "nuc_max": 4.0, "growing": 2, "attack": "train", "smooth": 0.4}


def by_authors(made: Case, **how: Any) -> tuple[Outcome, list[Tensor], list[Tensor]]:
    model = copy.deepcopy(made.model)
    steps = Steps(model)
    data = [[(batch.x, batch.y, signs) for batch, _, signs in of_epoch] for of_epoch in batches(made)]
    advs, losses = published.nuat(model, data, steps, eps=EPS, **how)
    return Outcome(losses[-1], steps.grads, model, []), advs, losses


@pytest.mark.parametrize("bn_compat", [False, True])
def test_as_the_authors(bn_compat: bool) -> None:
    """The weight grows between the epochs, and every second batch of an epoch has the norm in its attack."""
    made = case()
    mine = trained(NuAT(EPS, divisor=64, bn_compat=bn_compat), made)
    wanted = by_authors(made, **AUTHORS)
    assert_as_in_eval_mode(mine, wanted, bn_compat)


@pytest.mark.parametrize("bn_compat", [False, True])
def test_as_the_fastat_benchmark(bn_compat: bool) -> None:
    made = case()
    mine = trained(NuAT(EPS, code="fastat", bn_compat=bn_compat, label_smoothing=0.4), made)
    assert_all_same(mine, by_authors(made, **FASTAT), statistics=bn_compat)


def test_a_weight_that_is_there_from_the_start_and_a_norm_in_every_attack() -> None:
    """Of other settings than published; with R at 0 in the first epoch, it has no say in a test of the published."""
    made = case()
    method = NuAT(EPS, growth_share=0.0, weight=8.0, divisor=8, alternate=False, attack_mode="train")
    how = {"noise": EPS / 2, "nuc_max": 0.0, "growing": 2, "divisor": 8, "attack": "train", "nuc_reg": 8.0}
    model, wanted = copy.deepcopy(made.model), []
    steps = Steps(model)
    for of_epoch in batches(made):
        for batch, _, signs in of_epoch:
            wanted.append(published.nuat(model, [[(batch.x, batch.y, signs)]], steps, eps=EPS, first=1, **how))
    advs, losses = ([of[i][0] for of in wanted] for i in (0, 1))
    outcome = Outcome(losses[-1], steps.grads, model, [])
    assert_all_same(trained(method, made), (outcome, advs, losses), statistics=False)


@pytest.mark.parametrize(("code", "divisor"), [("authors", 64), ("authors", 0), ("fastat", 0)])
def test_the_norm_of_a_short_batch(code: Any, divisor: int) -> None:
    """The authors divide by their batch size also where there are fewer images, FastAT by those."""
    made, state = case(size=3), State(epoch=1, epochs=1, total_steps=2)
    method, model = NuAT(EPS, code=code, divisor=divisor), copy.deepcopy(made.model).eval()
    given = method.prepare(model, made.batch, made.key, state)
    loss, _ = method.objective(model, made.batch, given)
    z, moved = model(made.batch.x), model(given.adv)
    weight = (4.5 if code == "authors" else 4.0) / (divisor or 3)
    wanted = F.cross_entropy(z, made.batch.y) + weight * torch.linalg.matrix_norm(z - moved, ord="nuc")
    close(loss.detach(), wanted, "loss")


def test_the_weight_grows_as_published() -> None:
    def at(method: NuAT, epoch: int, epochs: int = 100) -> float:
        return method.changing(State(epoch=epoch, epochs=epochs))[0]

    for epoch, weight in {0: 0.0, 1: 0.05, 60: 3.0, 90: 4.5, 99: 4.5}.items():
        assert at(NuAT(EPS), epoch) == pytest.approx(weight)
    for epoch, weight in {0: 0.0, 1: 0.04, 99: 3.96}.items():
        assert at(NuAT(EPS, code="fastat"), epoch) == pytest.approx(weight)
    assert at(NuAT(EPS), 15, epochs=30) == pytest.approx(4.5 * 15 / 27)
    assert at(NuAT(EPS, growth_share=0.0), 0) == 4.5


def test_settings_in_use_are_those_of_the_code() -> None:
    names = "weight", "growth_share", "divisor", "attack_mode"
    assert [NuAT(EPS).in_use()[name] for name in names] == [4.5, 0.9, 0, "eval"]
    assert [NuAT(EPS, code="fastat").in_use()[name] for name in names] == [4.0, 1.0, 0, "train"]
    given = {"weight": 1.0, "growth_share": 0.5, "divisor": 128, "attack_mode": "eval"}
    assert [NuAT(EPS, code="fastat", **given).in_use()[name] for name in names] == list(given.values())
    with pytest.raises(ValueError, match="divisor"):
        NuAT(EPS, divisor=-1)
    with pytest.raises(ValueError, match="growth_share"):
        NuAT(EPS, growth_share=1.5)


def test_adversaries_that_are_the_images_leave_the_cross_entropy() -> None:
    """A difference of zeros: the norm has gradient 0 there, where that of an SVD would be NaN."""
    made, state = case(), State(epoch=1, epochs=1)
    model = copy.deepcopy(made.model).eval()
    method = NuAT(EPS)
    given = method.prepare(model, made.batch, made.key, state)
    loss, _ = method.objective(model, made.batch, given._replace(adv=made.batch.x))
    wanted = F.cross_entropy(model(made.batch.x), made.batch.y)
    close(loss, wanted, "loss")
    grads = (torch.autograd.grad(made_of, list(model.parameters())) for made_of in (loss, wanted))
    for mine, plain in zip(*grads, strict=True):
        close(mine, plain, "gradient")


def test_with_awp_the_attack_and_the_loss_are_the_same() -> None:
    """prepare and objective apart are the method itself."""
    made, state = case(), State(step=1, epoch=1, total_steps=4, epochs=2)
    method = NuAT(EPS, attack_mode="train")
    loss, _ = method.loss(copy.deepcopy(made.model).train(), made.batch, made.key, state)
    apart = copy.deepcopy(made.model).train()
    given = method.prepare(apart, made.batch, made.key, state)
    close(method.objective(apart, made.batch, given)[0], loss, "loss")
    assert AWP(method, 0.01).in_use() == method.in_use()


def test_one_image_and_many_classes() -> None:
    """More classes than images, and a batch of one: the shorter side is the batch."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 40)).double()
    for size in (1, 7):
        batch = Batch(torch.rand(size, 3, 3, 3, dtype=torch.float64), torch.randint(40, (size,)), torch.arange(size))
        loss, _ = NuAT(EPS).loss(net, batch, torch.tensor([1, 2]), State(epoch=1, step=1, epochs=2, total_steps=2))
        grads = torch.autograd.grad(loss, list(net.parameters()))
        assert loss.isfinite() and all(g.isfinite().all() and g.any() for g in grads)
