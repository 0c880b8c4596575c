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
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_kernels import Execution, noise_key
from atlas_kernels.attacks import APGD
from test_attacks import CLASSES, Log, Rowwise, images

EPS = {"linf": 0.03, "l2": 0.6, "l1": 1.0}
OBJECTIVES = ("ce", "dlr", "ce_targeted", "dlr_targeted")
CASES = [(norm, objective, False) for norm in EPS for objective in OBJECTIVES] + [("l1", "ce", True)]


def key(device: torch.device | str = "cpu") -> Tensor:
    return noise_key(device, generator=torch.Generator(device).manual_seed(2))


@pytest.fixture
def case(device: torch.device) -> tuple[Rowwise, Tensor, Tensor]:
    """Labels as the model has them, but for one."""
    model, x = Rowwise().to(device), images(24).to(device)
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % CLASSES
    return model, x, y


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


@pytest.mark.parametrize("norm, objective, large_radii", CASES)
def test_the_published_points(theirs: ModuleType, norm: str, objective: str, large_radii: bool) -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 6)
    model, x = nn.Sequential(*body).double().requires_grad_(False), images(6)
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
    # Where steps in l2 have come to a maximum, rounding decides which of the points around it is the best.
    apart = 1e-7 if norm == "l2" else 1e-9
    for ours, published in zip(points, seen, strict=True):
        assert (ours - published).abs().max() <= apart
    assert (state["best"] - best).abs().max() <= apart and (state["objective"] - value).abs().max() <= 1e-9
    assert len({float(size) for size in torch.stack(sizes).flatten()}) > 3  # halved, more than once
    fooled = model(state["adv"]).argmax(1) != y
    assert torch.equal(fooled[state["fooled"]], state["fooled"][state["fooled"]])


def test_the_first_step_is_compared_with_zero(case) -> None:
    """As in the published code, not with the objective of the start."""
    model, x, y = case
    attack = APGD(0.01, objective="dlr")
    batch = replace(attack.batch(x, y, key=key(x.device)), clean=model(x))
    start = attack.advance(model, batch, attack.begin(model, batch, torch.zeros_like(y)))
    first = attack.advance(model, batch, start)
    assert (first["objective"] > start["objective"]).all()  # all rose
    assert torch.equal(first["rises"], (first["value"] > 0).double()) and 0 < first["rises"].sum() < 24
    second = attack.advance(model, batch, first)
    assert torch.equal(second["rises"], first["rises"] + (second["value"] > first["value"]))


@pytest.mark.parametrize("norm, objective, large_radii", [*CASES[::3], CASES[-1]])
def test_neither_places_nor_neighbours_count(case, device, norm: str, objective: str, large_radii: bool) -> None:
    model, x, y = case
    attack = APGD(
        EPS[norm] / 2, 12, norm=norm, objective=objective, target_classes=2, restarts=2, large_radii=large_radii
    )
    whole = attack.run(model, x, y, key=key(device))
    assert 3 < whole.fooled.sum() < 21
    assert torch.equal(whole.fooled, model(whole.adv).argmax(1) != y)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).to(device)
    again = attack.run(model, x[order], y[order], key=key(device), ids=order, batch_size=5)
    assert torch.equal(again.fooled, whole.fooled[order]) and torch.equal(again.adv, whole.adv[order])
    way = (whole.adv - x).flatten(1)
    lengths = torch.linalg.vector_norm(way, {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)
    assert (lengths <= EPS[norm] / 2 + 1e-12).all() and lengths[2] == 0  # wrong as it is: not attacked


def test_rounds_are_restarts_of_one_class_after_the_other(case, device) -> None:
    model, x, y = case
    attack = APGD(0.03, objective="dlr_targeted", restarts=2)
    assert attack.rounds(CLASSES) == 2 * (CLASSES - 1) and replace(attack, target_classes=2).rounds(CLASSES) == 4
    assert replace(attack, objective="dlr").rounds(CLASSES) == 2
    clean = model(x)
    batch = replace(attack.batch(x, y, key=key(device)), clean=clean)
    states = [attack.begin(model, batch, torch.full_like(y, draw)) for draw in range(6)]
    order = clean.argsort(1, descending=True)
    right = order[:, 0] == y
    for draw, state in enumerate(states):
        assert torch.equal(state["target"][right], order[right, draw // 2 + 1])
        assert (state["target"] != y).all()
    assert len({float(state["adv"].sum()) for state in states}) == 6


class LaterClass(nn.Module):
    """Class 0, then 1, which no image reaches; class 2 is reached where the image is bright."""

    def forward(self, x: Tensor) -> Tensor:
        of_mean = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=x.dtype, device=x.device)
        return x.flatten(1).mean(1, keepdim=True) * of_mean + torch.tensor(
            [0.6, 0.5, 0.0, -1.0], dtype=x.dtype, device=x.device
        )


def test_a_class_that_is_tried_later_fools_too(device) -> None:
    x = torch.full((3, 1, 6, 6), 0.4, dtype=torch.float64, device=device)
    y = torch.zeros(3, dtype=torch.int64, device=device)
    for objective in ("ce_targeted", "dlr_targeted"):
        for count in (1, 2):
            attack = APGD(0.3, 10, objective=objective, target_classes=count)
            assert (attack.run(LaterClass(), x, y, key=key(device)).fooled == (count == 2)).all()


def test_what_it_costs(case) -> None:
    model, x, y = case
    log = Log(model)
    APGD(1e-4, 7, restarts=2).run(model, x, y)
    assert len(log.inputs) == 1 + 2 * 8 and log.backwards == 2 * 8
    assert APGD(1e-4, 7).length == 8 and APGD(1.0, 7, norm="l1", large_radii=True).length == 10
    assert APGD(1e-4, eot_iter=5).passes == 10


class Turning(nn.Module):
    """Another network at each call, of two."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.ModuleList([nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)]).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.both[self.calls % 2](x.flatten(1))


def test_the_gradient_is_of_several_forwards_and_the_last_one_judges() -> None:
    torch.manual_seed(0)
    model, x = Turning(), torch.rand(5, 3, 2, 2, dtype=torch.float64)
    y = torch.arange(5) % CLASSES
    attack = APGD(0.01, objective="dlr", eot_iter=2)
    batch = replace(attack.batch(x, y, key=key()), clean=model(x))
    begun = attack.begin(model, batch, torch.zeros_like(y))
    model.calls = 0
    state = attack.advance(model, batch, begun)
    assert model.calls == 2
    point = begun["point"].clone().requires_grad_()
    goal = replace(batch.goal, kind="dlr")
    parts = [torch.autograd.grad(net(point.flatten(1)), point, goal.cotangent(net(point.flatten(1)).detach()))[0]
             for net in model.both]  # fmt: skip
    assert (state["best_grad"] - parts[0] - parts[1]).abs().max() < 1e-12
    last = model.both[0](point.flatten(1)).detach()
    assert torch.equal(state["fooled"], last.argmax(1) != y)
    assert (state["objective"] - goal.judge(last)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("norm", EPS)
def test_radii_per_sample(case, device, norm: str) -> None:
    model, x, y = case
    eps = torch.tensor([EPS[norm] / 2, EPS[norm] / 9] * 12, dtype=x.dtype, device=device)
    attack = APGD(EPS[norm] / 2, 10, norm=norm, large_radii=norm == "l1")
    mixed, wide, small = (
        replace(attack, eps=radius).run(model, x, y, key=key(device)).adv
        for radius in (eps, EPS[norm] / 2, EPS[norm] / 9)
    )
    assert torch.equal(mixed[::2], wide[::2]) and torch.equal(mixed[1::2], small[1::2])


def test_only_the_last_radius_counts(case) -> None:
    """What fools within 3 eps is no adversary."""
    model, x, y = case
    attack = APGD(0.2, 10, norm="l1", large_radii=True)
    batch = replace(attack.batch(x, y, key=key(x.device)), clean=model(x))
    state, fooled_outside = attack.begin(model, batch, torch.zeros_like(y)), 0
    for _ in range(attack.length):
        outside = (state["point"] - x).abs().flatten(1).sum(1) > 0.2 + 1e-9
        fooled_outside += int(((model(state["point"]).argmax(1) != y) & outside).sum())
        state = attack.advance(model, batch, state)
        assert not (state["fooled"] & outside).any()
    assert fooled_outside > 5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_networks_in_16_bits(device, precision: str) -> None:
    model = Rowwise(torch.float32).to(device)
    x = images(24, torch.float32).to(device)
    y = model(x).argmax(1)
    attack = APGD(0.03, 20, objective="dlr_targeted", target_classes=2)
    full = attack.run(model, x, y, key=key(device))
    with Execution(precision=precision):
        found = attack.run(model, x, y, key=key(device))
    assert found.adv.dtype == torch.float32 and (found.adv - x).abs().max() <= 0.03 + 1e-7
    assert (found.fooled == full.fooled).float().mean() > 0.9
    assert 3 < full.fooled.sum() < 21


@pytest.mark.parametrize("norm", EPS)
def test_channels_last(device, norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, CLASSES)).double().to(device)
    x = images().to(device)
    y = model(x).argmax(1)
    attack = APGD(EPS[norm] / 3, 8, norm=norm)
    plain = attack.run(model, x, y, key=key(device))
    seen = Log(model)
    found = attack.run(model, x.contiguous(memory_format=torch.channels_last), y, key=key(device))
    assert all(points.is_contiguous(memory_format=torch.channels_last) for points in seen.inputs if len(points) > 1)
    assert (found.adv - plain.adv).abs().max() < 1e-9


class NoWait(TorchDispatchMode):
    """Refuses what waits for the device."""

    seen = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen += 1
        assert operation.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm, objective, large_radii", [*CASES[::3], CASES[-1]])
def test_an_iteration_does_not_wait_for_the_device(
    case, monkeypatch, norm: str, objective: str, large_radii: bool
) -> None:
    model, x, y = case
    monkeypatch.setenv("ATLAS_CHECKS", "0")
    attack = APGD(EPS[norm], norm=norm, objective=objective, large_radii=large_radii)
    batch = replace(attack.batch(x, y, key=key(x.device)), clean=model(x))
    state = attack.advance(model, batch, attack.begin(model, batch, torch.zeros_like(y)))
    with NoWait() as mode:
        attack.advance(model, batch, state)
    assert mode.seen  # what it refuses fails the test there


def test_it_gives_the_published_start(device) -> None:
    """At the distance eps; in l1 Gaussian noise that is projected, so a sparse one."""
    x = torch.full((4, 3, 16, 16), 0.5, device=device)
    y = torch.zeros(4, dtype=torch.int64, device=device)
    for norm, order in (("linf", torch.inf), ("l2", 2), ("l1", 1)):
        attack = APGD(0.4, norm=norm)
        way = (attack.begin(nn.Identity(), attack.batch(x, y, key=key(device)), y)["point"] - x).flatten(1)
        assert torch.allclose(torch.linalg.vector_norm(way, order, dim=1), torch.tensor(0.4, device=device))
        moved = (way != 0).sum(1)
        assert (moved < 40).all() if norm == "l1" else (moved > 700).all()


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"objective": "cw"}, "objective"),
        ({"target_classes": 0}, "target_classes"),
        ({"eot_iter": 0}, "eot_iter"),
        ({"rho": 2.0}, "rho"),
        ({"large_radii": True}, "l1"),
        ({"large_radii": True, "norm": "l1", "steps": 1}, "steps"),
    ],
)
def test_bad_settings(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        APGD(**{"eps": 0.1, **arguments})


@pytest.mark.parametrize("objective, classes", [("dlr", 2), ("dlr_targeted", 3)])
def test_too_few_classes(objective: str, classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).double()
    x = images()
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match=f"needs {classes + 1} classes"):
        APGD(0.1, 3, objective=objective)(model, x, y)
    APGD(0.1, 3, objective="ce_targeted")(model, x, y)
