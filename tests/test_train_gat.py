"""GAT does what its published code does: losses, adversaries, gradients and BatchNorm over two epochs, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_train.data import Dataset, get
from atlas_train.methods import GAT, Batch, State, build, defaults_on
from atlas_train.noise import uniform
from beside_published import EPS, Case, Outcome, Steps, assert_same, case, close
from published import gat as published

EPOCHS, BATCHES = 2, 2


def batches(made: Case) -> list[list[tuple[Batch, Tensor, Tensor]]]:
    """Of each epoch its batches, keys, and the signs of their noise."""
    found = []
    for epoch in range(EPOCHS):
        found.append([])
        for i in range(BATCHES):
            batch, key = case(seed=1 + epoch * BATCHES + i).batch, made.key + epoch * BATCHES + i
            signs = torch.where(uniform(batch.x, key, batch.ids, 0) < 0, -1.0, 1.0).double()
            found[-1].append((batch, key, signs))
    return found


def trained(method: Any, made: Case) -> tuple[Outcome, list[Tensor], list[Tensor]]:
    """The last outcome, with the gradients of every step; adversaries and losses of all batches."""
    model, advs, losses = copy.deepcopy(made.model).train(), [], []
    steps, state = Steps(model), State(total_steps=EPOCHS * BATCHES, epochs=EPOCHS)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    for epoch, of_epoch in enumerate(batches(made)):
        for batch, key, _ in of_epoch:
            seen.clear()
            state.epoch = epoch
            loss, _ = method.step(model, batch, key, state, steps)
            losses.append(loss)
            advs.append(seen[2])  # x, x0, x', and x again under bn_compat
            state.step += 1
    return Outcome(losses[-1], steps.grads, model, []), advs, losses


def by_authors(made: Case, **how: Any) -> tuple[Outcome, list[Tensor], list[Tensor]]:
    model = copy.deepcopy(made.model)
    steps = Steps(model)
    data = [[(batch.x, batch.y, signs) for batch, _, signs in of_epoch] for of_epoch in batches(made)]
    advs, losses = published.gat(model, data, steps, eps=EPS, **how)
    return Outcome(losses[-1], steps.grads, model, []), advs, losses


def assert_all_same(mine: Any, theirs: Any, *, statistics: bool) -> None:
    for what, ours, wanted in (("x'", mine[1], theirs[1]), ("loss", mine[2], theirs[2])):
        assert len(ours) == len(wanted) == EPOCHS * BATCHES
        for number, (a, b) in enumerate(zip(ours, wanted, strict=True)):
            close(a, b, f"{what} of batch {number}")
    assert_same(mine[0], theirs[0], statistics=statistics)


def assert_as_in_eval_mode(mine: Any, theirs: Any, bn_compat: bool) -> None:
    """The attack in eval mode sees running statistics: without bn_compat the first batch alone is the same."""
    if bn_compat:
        assert_all_same(mine, theirs, statistics=True)
    else:
        close(mine[1][0], theirs[1][0], "x'")
        close(mine[2][0], theirs[2][0], "loss")
    assert int(mine[0].model.bn1.num_batches_tracked) == (3 if bn_compat else 2) * EPOCHS * BATCHES


PUBLISHED = {"noise": EPS / 2, "l2_reg": 10.0, "mul": 4.0, "after": (0,)}


@pytest.mark.parametrize("bn_compat", [False, True])
@pytest.mark.parametrize("code", ["authors", "fastat"])
def test_gat(code: str, bn_compat: bool) -> None:
    """The weight grows between the epochs, and every second batch of an epoch has the guide."""
    made, smooth = case(), 0.4 if code == "fastat" else 0.0
    method = GAT(EPS, code=code, bn_compat=bn_compat, growth_start=0.5, label_smoothing=smooth)  # type: ignore[arg-type]
    wanted = by_authors(made, **PUBLISHED, smooth=smooth, slip=code == "fastat")
    mine = trained(method, made)
    assert_as_in_eval_mode(mine, wanted, bn_compat)


@pytest.mark.parametrize("bn_compat", [False, True])
def test_in_train_mode(bn_compat: bool) -> None:
    """There running statistics play no part, and bn_compat has them see the attack's forward too."""
    made = case()
    method = GAT(EPS, attack_mode="train", growth_start=0.5, bn_compat=bn_compat)
    assert_all_same(trained(method, made), by_authors(made, **PUBLISHED, attack="train"), statistics=bn_compat)


def test_mnist_has_the_guide_in_every_batch_and_the_noise_of_eps() -> None:
    method = build("gat", EPS, {**defaults_on(get("mnist"), "gat"), "bn_compat": True})
    how = {"noise": EPS, "l2_reg": 15.0, "mul": 9.0, "after": (0,), "alternate": False}  # two quarters in an epoch
    made = case()
    assert_all_same(trained(method, made), by_authors(made, **how), statistics=True)


@pytest.mark.parametrize(
    ("name", "epochs", "wanted"),
    [
        ("cifar10", 100, {85: 10, 86: 40, 99: 40}),
        ("cifar10", 30, {25: 10, 26: 40}),
        ("mnist", 40, {9: 15, 10: 45, 20: 135, 29: 135, 30: 405, 39: 405}),
        ("imagenet100", 120, {89: 20, 90: 140}),
    ],
)
def test_the_weight_grows_at_the_published_shares_of_training(name: str, epochs: int, wanted: dict[int, float]) -> None:
    dataset = get(name) if name != "imagenet100" else Dataset(name=name, load=None, num_classes=100, eps=EPS)  # type: ignore[arg-type]
    method = build("gat", EPS, defaults_on(dataset, "gat"))
    for epoch, weight in wanted.items():
        assert method.changing(State(epoch=epoch, epochs=epochs)) == (weight,), epoch
    assert GAT(EPS, growth_start=1.0).changing(State(epoch=9, epochs=10)) == (10,)


def test_the_count_of_batches_starts_anew_in_every_epoch() -> None:
    state = State(total_steps=6, epochs=2)
    found = []
    for step in range(6):
        state.step, state.epoch = step, step // 3
        found.append(GAT(EPS).variant(state))
    assert found == [False, True, False, False, True, False]


def test_attack_and_loss_apart_are_the_same_step() -> None:
    """As AWP takes them, to the bit; running statistics too."""
    made, state = case(), State(step=1, total_steps=4, epochs=2)
    for mode in ("eval", "train"):
        method, found = GAT(EPS, attack_mode=mode), []
        for whole in (True, False):
            model = copy.deepcopy(made.model).train()
            if whole:
                loss, _ = method.loss(model, made.batch, made.key, state)
            else:
                given = method.prepare(model, made.batch, made.key, state)
                loss, _ = method.objective(model, made.batch, given)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
