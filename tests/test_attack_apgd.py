"""APGD against the published code, step by step, and what is asked of every search."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import noise_key
from atlas_kernels.attacks import APGD

EPS = {"linf": 0.02, "l2": 0.6, "l1": 1.0}
OBJECTIVES = ("ce", "dlr", "ce_targeted", "dlr_targeted")
CLASSES = 6


def network(classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(288, classes)
    return nn.Sequential(*body).double().requires_grad_(False)


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def key() -> Tensor:
    return noise_key(generator=torch.Generator().manual_seed(2))


@pytest.fixture
def theirs() -> Iterator[ModuleType]:
    """The published code in double precision, without the constants that it adds to lengths, and with entries counted
    as moved where that is no rounding."""
    published = pytest.importorskip("pyautoattack.autopgd_base")
    source = inspect.getsource(published)
    for old, new in (
        ("2.clone().float()", "2.clone().double()"),
        ("self.ndims)) + 1e-12)", "self.ndims)))"),
        ("keepdim=True) + 1e-10)", "keepdim=True))"),
    ):
        assert old in source
        source = source.replace(old, new)
    module = ModuleType("published")
    module.__package__ = "pyautoattack"
    exec(compile(source, "published", "exec"), module.__dict__)
    module.L0_norm = lambda way: (way.abs() > 1e-9).flatten(1).sum(1)  # type: ignore[attr-defined]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield module
    torch.set_default_dtype(dtype)


def published_points(theirs: ModuleType, ours: APGD, model: nn.Module, x: Tensor, y: Tensor, start: Tensor, target):
    """All points that the published code asks the network about, from ``start``, the best one and its objective."""
    seen: list[Tensor] = []

    def watched(points: Tensor) -> Tensor:
        seen.append(points.detach().clone())
        return model(points)

    kind = theirs.APGDAttack_targeted if ours.targeted else theirs.APGDAttack
    names = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    attack = kind(watched, n_iter=ours.steps, norm=names[ours.norm], eps=ours.eps, device="cpu")
    attack.loss, attack.y_target = ours.objective.replace("_", "-"), target
    attack.check_zero_gradients = None
    attack.init_hyperparam(x)
    if not ours.large_radii:
        first = [start - x] if ours.norm == "l1" else []  # an l1 start that is given is treated as another radius's end
        project = theirs.L1_projection
        theirs.L1_projection = lambda x, d, eps: first.pop() - d if first else project(x, d, eps)
        best, _, objective, _ = attack.attack_single_run(x, y, x_init=None if ours.norm == "l1" else start)
        theirs.L1_projection = project
        return seen, best, objective
    for radius, steps in ((3, 0.3), (2, 0.3), (1, 0.4)):
        attack.eps, attack.n_iter = radius * ours.eps, math.ceil(steps * ours.steps)
        start = start + theirs.L1_projection(x, start - x, attack.eps)
        start, _, objective, _ = attack.attack_single_run(x, y, x_init=start)
    return seen, start, objective


CASES = [(norm, objective, False) for norm in EPS for objective in OBJECTIVES] + [("l1", "ce", True)]


@pytest.mark.parametrize("norm, objective, large_radii", CASES)
@pytest.mark.filterwarnings("ignore:.*gradient.*")
def test_the_published_points(theirs: ModuleType, norm: str, objective: str, large_radii: bool) -> None:
    model, x = network(), images(6)
    y = model(x).argsort(1, descending=True)[torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 2])]
    attack = APGD(EPS[norm], norm=norm, objective=objective, large_radii=large_radii)
    batch = replace(attack.batch(x, y, key=key()), clean=model(x))
    state = attack.begin(model, batch, torch.tensor([0, 1, 2, 0, 1, 2]) if attack.targeted else torch.zeros(6).long())
    points, sizes = [], []
    for _ in range(attack.length):
        points.append(state["point"])
        state = attack.advance(model, batch, state)
        sizes.append(state["size"])
    seen, best, value = published_points(theirs, attack, model, x, y, points[0], state.get("target"))
    assert len(points) == len(seen) == attack.steps + (3 if large_radii else 1)
    for ours, published in zip(points, seen, strict=True):
        assert (ours - published).abs().max() <= 1e-9
    assert (state["best"] - best).abs().max() <= 1e-9 and (state["objective"] - value).abs().max() <= 1e-9
    assert len({float(size) for size in torch.stack(sizes).flatten()}) > 3  # halved, more than once
    fooled = model(state["adv"]).argmax(1) != y
    assert torch.equal(fooled[state["fooled"]], state["fooled"][state["fooled"]])
