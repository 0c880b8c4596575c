"""YOPO does what its published code does: adversary, losses, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atlas_train import models, noise
from atlas_train.methods import YOPO, Batch, State
from atlas_train.methods.yopo import FirstLayer
from atlas_train.passes import count_passes
from beside_published import EPS, Case, Outcome, Steps, assert_same, case, close, ours, theirs
from published import yopo as published


def f1(model: Any, x: Tensor) -> Tensor:
    return model.conv1(x)  # type: ignore[no-any-return]


def rest(model: Any, h: Tensor) -> Tensor:
    """What beside_published.Net does after its first convolution."""
    h = torch.relu(model.bn2(model.conv2(torch.relu(model.bn1(h)))))
    return model.linear(h.flatten(1))  # type: ignore[no-any-return]


class ReluInFirst(nn.Module):
    """As the published MNIST network: f1 is a convolution with its ReLU, which works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_one = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.bn1, self.linear = nn.BatchNorm2d(6), nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return relu_rest(self, self.layer_one(x))


def relu_rest(model: Any, h: Tensor) -> Tensor:
    return model.linear(model.bn1(h).flatten(1))  # type: ignore[no-any-return]


def start(made: Case) -> Tensor:
    begun = made.batch.x + EPS * noise.uniform(made.batch.x, made.key, made.batch.ids, 0)
    assert (begun < 0).any() and (begun > 1).any()  # not clipped to the image range
    return begun


class Both(NamedTuple):
    """Our step and the published, x' of each, and how often our network ran."""

    mine: Outcome
    expected: Outcome
    adv: Tensor
    expected_adv: Tensor
    forwards: int


def both(made: Case, method: YOPO, **parts: Any) -> Both:
    found, seen = [], []

    def algorithm(*args: Any, **how: Any) -> Any:
        found.append(published.yopo(*args, **how))
        return found[0]

    how = {"f1": f1, "rest": rest, **parts, "eps": EPS, "sigma": method.sigma or EPS / 4}
    expected = theirs(algorithm, made, start(made), **how, outer=method.outer, inner=method.inner)
    made.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    mine = ours(method, made)
    return Both(mine, expected, seen[-1], found[0][0], len(seen))


@pytest.mark.parametrize("bn_compat", [False, True])
@pytest.mark.parametrize(("outer", "inner", "sigma"), [(5, 3, None), (1, 1, EPS / 3), (2, 10, EPS / 30)])
def test_yopo(outer: int, inner: int, sigma: float | None, bn_compat: bool) -> None:
    made = both(case(), YOPO(EPS, outer=outer, inner=inner, sigma=sigma, bn_compat=bn_compat))
    assert made.forwards == 2 * outer + bn_compat and len(made.mine.grads) == 1  # full passes and f1, in turn
    close(made.adv, made.expected_adv, "x'")
    assert_same(made.mine, made.expected, statistics=bn_compat)
    assert int(made.mine.model.bn1.num_batches_tracked) == outer + bn_compat


def test_pixels_that_start_out_of_range_move_one_step_less() -> None:
    sigma = EPS / 20  # too short to reach the ball's edge, from nearly everywhere
    made = case()
    adv = both(made, YOPO(EPS, outer=1, inner=3, sigma=sigma)).adv
    moved = adv[(made.batch.x == 0) & (start(made) < 0)]
    assert ((moved == 0) | ((moved - 2 * sigma).abs() < 1e-12)).all() and (moved > 0).sum() > 20


@pytest.mark.parametrize("inner", [1, 3])
def test_f1_that_is_not_affine_runs_every_step(inner: int) -> None:
    made = case()
    made.model = ReluInFirst().double()  # type: ignore[assignment]
    parts = {"f1": lambda model, x: model.layer_one(x), "rest": relu_rest}
    method = YOPO(EPS, outer=2, inner=inner, first_layer="layer_one", bn_compat=True)
    run = both(made, method, **parts)
    assert run.forwards == 2 * (1 + inner + 1) + 1
    close(run.adv, run.expected_adv, "x'")
    assert_same(run.mine, run.expected, statistics=True)


class Prepared(nn.Module):
    """A network behind something that is done to its images."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.net, self.before = case().model.float(), before

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.before(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("before", "affine"),
    [
        (lambda x: x, True),
        (lambda x: (x - 0.5) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1), True),
        (lambda x: (2 * x - 1).contiguous(memory_format=torch.channels_last), True),
        (lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True), False),
        (lambda x: x.clamp(0, 1), False),
        (lambda x: x * x, False),
        (lambda x: 1 / (1 + x), False),
        (lambda x: torch.tanh(x), False),
    ],
)
def test_steps_are_taken_at_once_only_where_f1_is_known_to_be_affine(before: Any, affine: bool) -> None:
    model, made = Prepared(before), case()
    first = FirstLayer(model, None)
    with first:
        model(made.batch.x.float().requires_grad_())
    assert first.affine == affine


def test_the_steps_are_the_same_whether_taken_at_once_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> Outcome:
        made = case()
        made.key = torch.tensor([5, 0])
        return ours(YOPO(EPS, outer=2, inner=4), made)

    at_once = step()
    monkeypatch.setattr("atlas_train.methods.yopo._affine", lambda x: False)
    assert_same(at_once, step(), statistics=True)


def test_f1_alone_leaves_no_trace_on_the_rest_of_the_network() -> None:
    model = case().model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = FirstLayer(model, None)
    x = case().batch.x
    assert torch.equal(first(x), model.conv1(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class LateFirst(nn.Module):
    """Its first layer is not the one that was registered first; BatchNorm may come before it."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.last, self.norm = nn.Linear(4 * 36, 5), nn.BatchNorm2d(3) if norm else nn.Identity()
        self.early = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.early(self.norm(x)).flatten(1))  # type: ignore[no-any-return]


def step_on(model: nn.Module, **hyper: Any) -> None:
    made = case()
    YOPO(EPS, **hyper).train_step(model.double().train(), made.batch, made.key, State(), Steps(model))


def test_the_first_layer_is_the_one_that_runs_first() -> None:
    model = LateFirst(norm=False)
    first = FirstLayer(model, None)
    assert first(torch.rand(2, 3, 6, 6)).shape == (2, 4, 6, 6)
    step_on(model)


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (LateFirst(norm=True), None, "BatchNorm runs before the first layer ends"),
        (nn.Sequential(nn.Flatten(), nn.Bilinear(2, 2, 2)), None, "Sequential has no convolution or linear layer; set"),
        (LateFirst(norm=False), "erly", "first_layer 'erly' is no module; the nearest is 'early'"),
    ],
)
def test_a_network_without_such_a_layer_is_refused(model: nn.Module, name: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_on(model, first_layer=name)


def test_a_first_layer_that_does_not_run_is_refused() -> None:
    model = LateFirst(norm=False)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="first_layer unused did not run"):
        step_on(model, first_layer="unused")


def test_our_networks_have_an_affine_first_layer_also_under_autocast() -> None:
    sizes = {"digits_net": (1, 8), "small_cnn": (1, 28), "preact_resnet18": (3, 32), "wide_resnet28_10": (3, 32)}
    for name, (channels, side) in sizes.items():
        normalize = ((0.5,) * channels, (0.25,) * channels)
        model = models.build(name, num_classes=5, in_channels=channels, width=4, normalize=normalize).train()
        x = torch.rand(2, channels, side, side).contiguous(memory_format=torch.channels_last)
        first = FirstLayer(model, None)
        with first, torch.autocast("cpu", torch.bfloat16):
            model(x.requires_grad_())
        assert first.affine


def test_passes_of_the_log() -> None:
    model = case().model.float()
    x = case().batch.x.float()
    batch = Batch(x, case().batch.y, case().batch.ids)
    passes = [
        count_passes(model, x, lambda m=m: m.train_step(model, batch, case().key, State(), Steps(model)))  # type: ignore[misc]
        for m in (YOPO(EPS, outer=2), YOPO(EPS, outer=2, bn_compat=True), YOPO(EPS, outer=2, inner=9))
    ]
    assert passes[1] - passes[0] == pytest.approx(1) and passes[2] == passes[0]
