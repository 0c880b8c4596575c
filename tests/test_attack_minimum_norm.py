"""The least norm that fools: what is known in closed form, and what holds of every result."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import CWPGD, PGD, MinimumNorm
from test_attacks import CLASSES, Log, Rowwise

#: The largest radii tried here, which fool nearly all.
LARGEST = {"linf": 0.4, "l2": 1.5, "l1": 8.0}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


def size(delta: Tensor, norm: str) -> Tensor:
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    return torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)


class Two(nn.Module):
    """Two classes, with a straight line between them."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: Tensor) -> Tensor:
        z = (x.flatten(1) * self.weight).sum(1) + self.bias
        return torch.stack([z, -z], 1)


@pytest.fixture
def case(device: torch.device) -> tuple[Rowwise, Tensor, Tensor]:
    """Labels as the model has them, but for one."""
    with device:
        model = Rowwise()
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % CLASSES
    return model, x, y


@pytest.mark.parametrize("norm", LARGEST)
def test_the_distance_to_a_straight_border(device: torch.device, norm: str) -> None:
    """It is the margin over the dual norm of the weights, while the range is far."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(27, generator=g, dtype=torch.float64)
    weight[4] = 4.0  # the one that an l1 way goes along
    x = 0.5 + 0.02 * torch.randn(16, 3, 3, 3, generator=g, dtype=torch.float64)
    x[:4] += 0.05 * weight.sign().view(3, 3, 3)
    model = Two(weight, -0.5 * float(weight.sum())).to(device)
    x = x.to(device)
    z = model(x)
    least = (z[:, 0].abs() / torch.linalg.vector_norm(weight, DUAL[norm])).detach()
    eps = float(least.max()) * 1.2
    result = MinimumNorm(PGD(eps, steps=20, norm=norm, random_start=False), 9).run(model, x, z.argmax(1))
    assert result.fooled.all() and (result.norm >= least - 1e-12).all()
    assert (result.norm <= least + 1.01 * eps / 2**9).all()


@pytest.mark.parametrize("norm", LARGEST)
@pytest.mark.parametrize("settings", [{}, {"restarts": 2}, {"random_start": False, "step_size": 0.1}])
def test_what_comes_back_is_misclassified_and_as_far_as_is_said(case, norm: str, settings: dict) -> None:
    model, x, y = case
    eps = torch.linspace(0.0, 1.0, len(x), dtype=x.dtype, device=x.device) * LARGEST[norm]
    result = MinimumNorm(PGD(eps, steps=5, norm=norm, **settings), 4).run(model, x, y)
    assert torch.equal(result.fooled, model(result.adv).argmax(1) != y)
    assert torch.equal(result.fooled, result.norm.isfinite()) and result.fooled.sum() >= 4
    assert torch.equal(result.norm[result.fooled], size(result.adv - x, norm)[result.fooled])
    assert torch.equal(result.adv[~result.fooled], x[~result.fooled]) and not result.fooled[0]
    assert (result.norm[result.fooled] <= eps[result.fooled] * (1 + 1e-12)).all()
    assert result.norm[2] == 0 and torch.equal(result.adv[2], x[2])
    assert result.adv.min() >= 0 and result.adv.max() <= 1


def test_more_bisections_bring_it_closer_and_never_farther(case) -> None:
    model, x, y = case
    key, attack = noise_key(x.device), PGD(LARGEST["linf"], steps=5)
    norms = [MinimumNorm(attack, number).run(model, x, y, key=key).norm for number in range(6)]
    assert all((late <= early).all() for early, late in zip(norms, norms[1:], strict=False))
    going = norms[0].isfinite() & (norms[0] > 0)
    assert going.any() and (norms[-1][going] < 0.9 * norms[0][going]).all()
    assert (MinimumNorm(attack, 0).run(model, x, y, key=key).norm == norms[0]).all()


@pytest.mark.parametrize("norm", LARGEST)
def test_key_and_ids_repeat_it_in_any_batch(case, norm: str) -> None:
    model, x, y = case
    ids, order = torch.randperm(100, device=x.device)[: len(x)], torch.randperm(len(x), device=x.device)
    search = MinimumNorm(PGD(LARGEST[norm], steps=4, norm=norm), 4)
    found = search.run(model, x, y, ids=ids)
    again = search.run(model, x[order], y[order], ids=ids[order], key=found.key)
    assert torch.equal(again.adv, found.adv[order]) and torch.equal(again.norm, found.norm[order])
    rows = order[:3]
    some = search.run(model, x[rows], y[rows], ids=ids[rows], key=found.key)
    assert torch.equal(some.adv, found.adv[rows])


def test_a_search_with_nothing_to_find_asks_little(case) -> None:
    model, x, y = case
    log = Log(model)
    result = MinimumNorm(PGD(1e-6, steps=3), 8).run(model, x, y)
    assert result.fooled.sum() == 1 and len(log.inputs) == 1 + 3 + 1  # what was not found at eps is not bisected
    log.inputs.clear()
    result = MinimumNorm(PGD(0.3, steps=3)).run(model, x, (model(x).argmax(1) + 1) % CLASSES)
    assert (result.norm == 0).all() and len(log.inputs) == 2  # one of them is ours


def test_targets_and_networks_that_say_nothing(case) -> None:
    model, x, y = case
    target = (y + 1) % CLASSES
    result = MinimumNorm(PGD(0.9, steps=10, targeted=True), 4).run(model, x, target)
    assert result.fooled.any() and torch.equal(result.fooled, model(result.adv).argmax(1) == target)
    nothing = MinimumNorm(PGD(0.3, steps=2), 2).run(nn.Sequential(model, NaN()), x, y)
    assert (nothing.norm == 0).all() and nothing.fooled.all()


class NaN(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.nan


def test_the_model_and_the_random_state_are_as_they_were(case) -> None:
    model, x, y = case
    model.train()
    before = torch.get_rng_state()
    MinimumNorm(PGD(0.3, steps=2), 2).run(
        model, x, y, key=noise_key(generator=torch.Generator().manual_seed(0)).to(x.device)
    )
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MinimumNorm(0.3), "attack must be an attack such as"),  # type: ignore[arg-type]
        (lambda: MinimumNorm(PGD(0.3), -1), "bisections must be"),
        (lambda: MinimumNorm(PGD(0.3, objective="kl")), 'objective="kl", which knows no labels'),
        (lambda: MinimumNorm(PGD(0.3, attack_mode="train")), 'use "eval"'),
        (lambda: MinimumNorm(PGD(0.3, count_correct=True)), "count_correct counts along one attack"),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


def test_cw_pgd_climbs_the_margin(case) -> None:
    """As published until the margin is 50: ``-relu(z_y - others + 50)``."""
    model, x, y = case
    key = noise_key(x.device)
    adv = CWPGD(0.1, 0.03, 4)(model, x, y, key=key)
    iterate = PGD(0.1, 0.03, 0)(model, x, y, key=key)
    for _ in range(4):
        leaf = iterate.clone().requires_grad_()
        z = model(leaf)
        own = z.gather(1, y[:, None])[:, 0]
        others = z.scatter(1, y[:, None], -torch.inf).amax(1)
        loss = -torch.relu(own - others + 50).sum()
        step = iterate + 0.03 * torch.autograd.grad(loss, leaf)[0].sign()
        iterate = (x + (step - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(adv, iterate, rtol=0, atol=1e-12)
    with pytest.raises(TypeError):
        CWPGD(0.1, objective="ce")  # type: ignore[call-arg]
