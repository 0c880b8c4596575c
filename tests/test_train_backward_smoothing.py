"""Backward Smoothing does what its published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atlas_train.methods import BackwardSmoothing, Batch, State
from atlas_train.noise import uniform
from beside_published import CLASSES, EPS, Case, assert_same, case, close, ours, theirs
from published import backward_smoothing as published


def noise(made: Case) -> Tensor:
    return uniform(made.batch.x.new_empty(len(made.batch.y), CLASSES), made.key, made.batch.ids, 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_backward_smoothing(steps: int) -> None:
    made = case()
    how = {"eps": EPS, "step_size": EPS / 2, "steps": steps, "beta": 10.0, "gamma": 0.7}
    expected = theirs(published.backward_smoothing, made, noise(made), **how)
    mine = ours(BackwardSmoothing(**how), made)
    close(mine.images[1], expected.images[1], "x'")
    assert_same(mine, expected, statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 2


def test_defaults_are_those_of_the_readme() -> None:
    made = case()
    how = {"eps": EPS, "step_size": EPS, "steps": 1, "beta": 10.0, "gamma": 1.0}
    assert_same(
        ours(BackwardSmoothing(EPS), made),
        theirs(published.backward_smoothing, made, noise(made), **how),
        statistics=True,
    )


def test_the_default_perturbation_has_three_values() -> None:
    made = case(size=64)
    batch = made.batch._replace(x=0.3 + 0.4 * made.batch.x)
    shares = (BackwardSmoothing(EPS).prepare(made.model, batch, made.key, State()) - batch.x) / EPS
    assert (shares - shares.round()).abs().max() < 1e-12
    for value in (-1, 0, 1):
        assert (shares.round() == value).double().mean() > 0.05


def test_noise_is_uniform_of_each_sample_and_class() -> None:
    made = case(size=64)
    psi = noise(made)
    assert -1 <= psi.min() < -0.95 and 0.95 < psi.max() < 1 and len(psi.unique()) > 0.99 * psi.numel()
    made.model.eval()
    method, order = BackwardSmoothing(EPS), torch.randperm(64)
    adv = method.prepare(made.model, made.batch, made.key, State())
    assert torch.equal(adv, method.prepare(made.model, made.batch, made.key, State()))
    shuffled = method.prepare(made.model, Batch(*(part[order] for part in made.batch)), made.key, State())
    torch.testing.assert_close(shuffled, adv[order])
    assert not torch.equal(adv, method.prepare(made.model, made.batch, made.key + torch.tensor([1, 0]), State()))


def test_the_attack_leaves_the_network_alone_also_under_autocast() -> None:
    made = case()
    model, x = made.model.float().train(), made.batch.x.float()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        adv = BackwardSmoothing(EPS).prepare(model, made.batch._replace(x=x), made.key, State())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert adv.dtype == torch.float32 and not adv.requires_grad and (adv - x).abs().max() > 0.9 * EPS
