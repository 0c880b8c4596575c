"""FAB: beside the published code, and what it promises of every sample."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import FAB, Execution, noise_key
from atlas_kernels.schema import NORMS
from test_attack_contract import Snapshot
from test_attacks import Log, images

every_norm = pytest.mark.parametrize("norm", NORMS)
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}


class Small(nn.Module):
    """A smooth net of a few classes, whose every row is computed alone."""

    def __init__(self, classes: int = 5, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(classes)
        made = (torch.randn(16, 48, generator=g), torch.randn(classes, 16, generator=g))
        self.first, self.last = (nn.Parameter(w.to(dtype) * size) for w, size in zip(made, (0.4, 1.0), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(((x.flatten(1) - 0.5)[:, None] * self.first).sum(-1))
        return (h[:, None] * self.last).sum(-1)


def case(batch: int = 12, classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """All of them right as they are."""
    model, x = Small(classes, dtype), images(batch, dtype)
    return model, x, model(x).argmax(1)


def distances(adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((adv - x).double().flatten(1), ORDER[norm], dim=1)


@pytest.fixture
def doubles(monkeypatch):
    """For the published code, which computes in float32 wherever it runs."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def published(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int, target: int | None
) -> tuple[Tensor, list[Tensor]]:
    """The adversaries of one round, and all that the network saw of the iterates."""
    fab_pt = pytest.importorskip("pyautoattack.fab_pt")
    attack = fab_pt.FABAttack_PT(model, norm=norm.title() if norm == "linf" else norm.upper(), n_iter=steps, eps=0.1)
    attack.target_class = target
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().clone())
    )  # it writes in place
    adv = attack.attack_single_run(x, y, is_targeted=target is not None)
    return adv, seen[1 if target is None else 2 :]


@every_norm
@pytest.mark.parametrize("targeted", [True, False])
def test_published_iterates(norm, targeted, doubles):
    """From the same start: every iterate of every target, and the nearest adversary of each round."""
    model, x, y = case()
    steps, rounds = 12, 2 if targeted else 1
    log = Log(mine := case()[0])
    found = FAB(0.0, steps, norm=norm, targeted=targeted, target_classes=2).run(mine, x, y)
    assert not found.fooled.any()
    seen = log.inputs[1:]
    assert len(seen) == 2 * steps * rounds
    nearest = torch.full((len(x),), math.inf)
    for number in range(rounds):
        adv, iterates = published(case()[0], x, y, norm, steps, 2 + number if targeted else None)
        for a, b in zip(seen[2 * steps * number :][: 2 * steps], iterates, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        distance = distances(adv, x, norm)
        nearest = torch.where((distance > 0) & (distance < nearest), distance, nearest)
    torch.testing.assert_close(-found.objective, nearest, rtol=0, atol=1e-9)
    assert nearest.isfinite().sum() > 6


@every_norm
def test_smallest_distance_is_kept(norm):
    model, x, y = case()
    found = FAB(0.0, 30, norm=norm).run(model, x, y, key=noise_key())
    hit = found.objective > -torch.inf
    assert hit.sum() > 8 and not found.fooled.any()
    torch.testing.assert_close(-found.objective[hit], distances(found.adv, x, norm)[hit], rtol=1e-12, atol=0)
    assert (model(found.adv).argmax(1) != y)[hit].all() and torch.equal(found.adv[~hit], x[~hit])
    assert found.adv.min() >= 0 and found.adv.max() <= 1
    one = FAB(0.0, 30, norm=norm, target_classes=1).run(model, x, y)
    assert (found.objective >= one.objective).all() and (found.objective > one.objective).any()


@every_norm
def test_fooled_within_eps(norm):
    model, x, y = case(dtype=torch.float32)
    nearest = -FAB(0.0, 30, norm=norm).run(model, x, y).objective
    eps = float(nearest[nearest.isfinite()].median())
    y[3] = (y[3] + 1) % 5  # wrong as it is
    log = Log(model)
    found = FAB(eps, 30, norm=norm).run(model, x, y)
    assert 3 < found.fooled.sum() < 11 and found.fooled[nearest < eps * (1 - 1e-5)].all()
    fooled = found.fooled
    assert torch.equal(found.adv[3], x[3])
    assert (model(found.adv).argmax(1) != y)[fooled].all()
    search = FAB(eps, 30, norm=norm)
    assert torch.equal(search.batch(x, y).inside(found.adv)[fooled], found.adv[fooled])
    assert (distances(found.adv, x, norm)[~fooled & (found.objective > -torch.inf)] > eps * (1 - 1e-6)).all()
    assert len(log.inputs[1]) == 11 and min(len(seen) for seen in log.inputs) < 11  # who is fooled leaves


@every_norm
def test_neither_batch_nor_neighbours_count(norm):
    model, x, y = case()
    search, key = FAB(0.03 if norm == "linf" else 0.2, 6, norm=norm, restarts=2, target_classes=3), noise_key()
    whole = search.run(model, x, y, key=key)
    order, ids = torch.randperm(12, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    parts = search.run(model, x[order], y[order], key=key, ids=ids[order], batch_size=5)
    for a, b in ((parts.adv, whole.adv), (parts.fooled, whole.fooled), (parts.objective, whole.objective)):
        assert torch.equal(a, b[order])


@every_norm
def test_noise_goes_by_the_samples_numbers(norm):
    model, x, y = case()
    search, key = FAB(0.5, 3, norm=norm, restarts=2), noise_key()
    batch = [replace(search.batch(x, y, key=key, ids=torch.arange(12) + n), clean=model(x)) for n in (0, 0, 1)]
    draw = torch.arange(12) % 4
    same, again, other = (search.begin(model, b, draw)["at"] for b in batch)
    assert torch.equal(same, again)
    differs = (same != other).flatten(1).any(1)
    assert torch.equal(differs, draw % 2 == 1)
    assert torch.equal(same[1:], search.begin(model, batch[0].rows(torch.arange(1, 12)), draw[1:])["at"])


@every_norm
def test_restarts_begin_at_half_of_eps(norm):
    model, x, y = case()
    search = FAB(0.2, 3, norm=norm, restarts=3, clip_min=-9.0, clip_max=9.0)
    batch = search.batch(x, y, key=noise_key())
    begun = search.begin(model, replace(batch, clean=model(x)), torch.arange(12) % 6)
    expected = 0.1 * (torch.arange(12) % 3 > 0).double()
    torch.testing.assert_close(distances(begun["at"], x, norm), expected)
    order = model(x).argsort(1, descending=True)
    assert torch.equal(begun["target"], order[torch.arange(12), 1 + torch.arange(12) % 6 // 3])
    search = FAB(0.9, 3, norm=norm, restarts=2)
    begun = search.begin(model, replace(search.batch(x, y), clean=model(x)), torch.ones(12, dtype=torch.int64))
    assert begun["at"].min() >= 0 and begun["at"].max() <= 1 and (begun["at"] != x).any()


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_two_and_three_classes(classes, targeted):
    model, x, y = case(classes=classes)
    search = FAB(0.0, 20, targeted=targeted)
    assert search.rounds(classes) == (classes - 1 if targeted else 1)
    log = Log(model)
    found = search.run(model, x, y)
    assert (found.objective > -torch.inf).sum() > 8
    assert len(log.inputs) == 1 + 40 * search.rounds(classes)
    assert log.backwards == 20 * (classes - 1)


def test_rounds_and_passes():
    assert (
        FAB(0.1).rounds(10) == 9
        and FAB(0.1).rounds(100) == 9
        and FAB(0.1, target_classes=5, restarts=5).rounds(10) == 25
    )
    published = FAB(0.1)
    assert (published.steps, published.restarts, published.alpha_max, published.eta, published.beta) == (
        100, 1, 0.1, 1.05, 0.9,
    )  # fmt: skip


@pytest.mark.parametrize("targeted", [True, False])
def test_what_is_nan_is_never_robust(targeted):
    """A network that says nothing where a bright pixel is not that of a clean image."""
    model, x, _ = case()
    x[:, 0, 0, 0] = torch.linspace(0, 0.95, 12, dtype=x.dtype)
    y, bare = model(x).argmax(1), model.forward

    def forward(at: Tensor) -> Tensor:
        pixel = at[:, 0, 0, :1]
        lost = (pixel[:, 0] > 0.5) & (pixel != x[:, 0, 0, 0]).all(1)
        return torch.where(lost[:, None], torch.nan, bare(at))

    lost = x[:, 0, 0, 0] > 0.7
    search = FAB(0.005, 10, targeted=targeted, target_classes=2)
    whole = search.run(model, x, y)
    model.forward = forward  # type: ignore[method-assign]
    found = search.run(model, x, y)
    assert found.fooled[lost].all() and not whole.fooled[lost].all()
    assert not found.adv.isnan().any() and (found.adv - x)[found.fooled].abs().max() <= 0.005 + 1e-12
    assert torch.equal(found.adv[:4], whole.adv[:4])


class Flat(nn.Module):
    """Its logits never change."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x.flatten(1)[:, :5] + torch.tensor([3.0, 1.0, 0.0, 2.0, 0.5], dtype=x.dtype)


@pytest.mark.parametrize("targeted", [True, False])
def test_network_without_a_gradient_stays_robust(targeted):
    x = images(12)
    found = FAB(0.1, 5, targeted=targeted).run(Flat(), x, torch.zeros(12, dtype=torch.int64))
    assert not found.fooled.any() and torch.equal(found.adv, x) and (found.objective == -torch.inf).all()


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits(precision, targeted):
    """Finds what float32 finds, but for its rounding."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))
            for weight in self.parameters():
                weight.data = torch.randn(weight.shape, generator=g) * 0.3

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model, x = Linear(), images(12, torch.float32)
    y = model(x).argmax(1)
    search = FAB(0.0, 10, targeted=targeted, target_classes=4)
    whole = -search.run(model, x, y).objective
    with Execution(precision=precision):
        found = search.run(model, x, y)
    near = -found.objective
    assert (near < 1.2 * whole + 0.01).float().mean() > 0.8


def test_leaves_no_trace():
    model, x, y = case()
    model.train()
    before, state = Snapshot(model), torch.get_rng_state()
    FAB(0.05, 4, restarts=2, target_classes=2)(model, x, y, key=noise_key(generator=torch.Generator().manual_seed(0)))
    before.check()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targeted": 1}, "targeted must be True or False, got 1"),
        ({"target_classes": 0}, "target_classes must be an integer of at least 1, got 0"),
        ({"alpha_max": 1.5}, r"alpha_max must be a number in \[0, 1\], got 1.5"),
        ({"eta": 0.9}, "eta must be a number >= 1, got 0.9"),
        ({"beta": -0.1}, r"beta must be a number in \[0, 1\], got -0.1"),
        ({"norm": "l3"}, "norm must be one of"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FAB(0.1, **options)
