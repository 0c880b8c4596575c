"""Drop-ins do what they replace: from one seed the same adversaries, losses, gradients, side effects, random state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.attacks import leave_no_trace
from atlas_kernels.compat import awp, fast_adversarial, gairat, jacobian, mart, robust_overfitting, torchattacks, trades
from beside_published import CLASSES, EPS, Net, Steps, case, close
from published import compat_training as published

STEP = EPS / 3
EPSILON, ALPHA = EPS / published.CIFAR10_STD, EPS / 3 / published.CIFAR10_STD
DTYPES = [torch.float64, torch.float32]


class Dropping(Net):
    """With dropout."""

    def features(self, x: Tensor) -> Tensor:
        return torch.dropout(super().features(x), 0.3, self.training)


class Flat(Net):
    """Without a gradient where an image is dark."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x.detach().flatten(1).mean(1, keepdim=True) > 0.48)


class Setting(NamedTuple):
    model: Net
    x: Tensor
    y: Tensor


def setting(dtype: torch.dtype = torch.float64, net: type[Net] = Net, normalised: bool = False) -> Setting:
    """A network that is right on most of the images; some modules and weights are set apart from the rest."""
    found = case(size=16)
    model = net().to(dtype)
    model.load_state_dict(found.model.state_dict())
    x = found.batch.x.to(dtype)
    x = (x - published.CIFAR10_MEAN.to(dtype)) / published.CIFAR10_STD.to(dtype) if normalised else x
    with torch.no_grad():
        guess = copy.deepcopy(model).eval()(x).argmax(1)
    model.bn2.eval()
    model.linear.bias.requires_grad_(False)
    return Setting(model, x, torch.where(torch.arange(16) % 4 > 0, guess, found.batch.y))


class After(NamedTuple):
    """What a call made and left behind. images: what the model saw in train mode, batch by batch."""

    result: Any
    model: Net
    images: list[Tensor]
    forwards: int
    random: tuple[Tensor, float]


def after(call: Callable[..., Any], model: nn.Module, *args: Any, **how: Any) -> After:
    """``call(model, ...)`` on a copy of the model, from one seed."""
    model, images, forwards = copy.deepcopy(model), [], []

    def note(module: nn.Module, given: tuple[Tensor]) -> None:
        forwards.append(1)
        if module.training:
            images.append(given[0].detach().clone())

    model.register_forward_pre_hook(note)
    torch.manual_seed(7)
    np.random.seed(7)
    result = call(model, *args, **how)
    return After(result, model, images, len(forwards), (torch.get_rng_state(), np.random.rand()))


def same_trace(mine: After, theirs: After, tolerance: float = 1e-9, *, statistics: bool = True) -> None:
    """Modes, frozen weights, random states and BatchNorm's statistics."""
    assert [m.training for m in mine.model.modules()] == [m.training for m in theirs.model.modules()]
    assert [p.requires_grad for p in mine.model.parameters()] == [p.requires_grad for p in theirs.model.parameters()]
    assert torch.equal(mine.random[0], theirs.random[0]) and mine.random[1] == theirs.random[1]
    if statistics:
        for (name, left), right in zip(mine.model.named_buffers(), theirs.model.buffers(), strict=True):
            close(left, right, name, tolerance)


def same_images(mine: Tensor, theirs: Tensor, norm: str = "l_inf") -> None:
    """To rounding. In float32 a gradient near 0 may have another sign in one pixel of a hundred; in l_2 the KL's first
    gradients, a thousandth of a prediction, have lost three digits."""
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and not mine.requires_grad
    if mine.dtype == torch.float64:
        close(mine, theirs, "images")
    elif norm == "l_2":
        close(mine, theirs, "images", 1e-3)
    else:
        assert ((mine - theirs).abs() < 1e-6).float().mean() > 0.99


def step_on(loss_function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Steps]]:
    """A training step around a loss that attacks; the gradients that are there before must be zeroed by it."""

    def step(model: Net, *args: Any, **how: Any) -> tuple[Tensor, Steps]:
        optimizer = Steps(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e3)
        loss = loss_function(model, *args, optimizer, **how)
        assert all(p.grad is None for p in model.parameters())
        loss.backward()
        optimizer.step()
        return loss.detach(), optimizer

    return step


def same_step(mine: After, theirs: After, tolerance: float) -> None:
    close(mine.result[0], theirs.result[0], "loss", tolerance)
    for left, right in zip(mine.result[1].grads[0], theirs.result[1].grads[0], strict=True):
        close(left, right, "gradient", tolerance)


SIGNATURES = [
    (trades.trades_loss, published.trades_loss, ["lean"]),
    (mart.mart_loss, published.mart_loss, []),
    (gairat.GA_PGD, published.GA_PGD, []),
    (gairat.GAIR, published.GAIR, []),
    (gairat.cwloss, published.cw_loss, []),
    (gairat.eval_robust, published.eval_robust, []),
    (robust_overfitting.mixup_data, published.mixup_data, []),
    (robust_overfitting.mixup_criterion, published.mixup_criterion, []),
    (awp.diff_in_weights, published.diff_in_weights, []),
    (awp.add_into_weights, published.add_into_weights, []),
    (fast_adversarial.attack_pgd, published.fast_cifar_pgd, []),
    (fast_adversarial.attack_fgsm, published.attack_fgsm, []),
    (fast_adversarial.clamp, published.clamp, []),
    (robust_overfitting.attack_pgd, published.rice_pgd, []),
    (awp.AdvWeightPerturb, published.AWP, []),
    (awp.TradesAWP, published.AWP, []),
    (awp.perturb_input, published.perturb_input, []),
    (jacobian.JacobianReg, published.JacobianReg, []),
]


@pytest.mark.parametrize(("mine", "theirs", "extra"), SIGNATURES, ids=lambda f: getattr(f, "__qualname__", None))
def test_signatures(mine: Any, theirs: Any, extra: list[str]) -> None:
    def listed(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert listed(mine) == listed(theirs)
    parameters = inspect.signature(mine).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD] == extra


def test_signatures_of_methods() -> None:
    for function, names in [
        (awp.AdvWeightPerturb.calc_awp, "inputs_adv, targets"),
        (awp.TradesAWP.calc_awp, "inputs_adv, inputs_clean, targets, beta"),
        (awp.TradesAWP.perturb, "diff"),
        (awp.TradesAWP.restore, "diff"),
        (jacobian.JacobianReg.forward, "x, y"),
        (fast_adversarial.evaluate_pgd, "test_loader, model, attack_iters, restarts"),
        (fast_adversarial.evaluate_standard, "test_loader, model"),
        (gairat.eval_clean, "model, test_loader"),
    ]:
        found = [name for name in inspect.signature(function).parameters if name != "self"]
        assert found == names.split(", ")


PUBLIC = {  # what the files define; what is refused has a minus
    trades: "squared_l2_norm l2_norm trades_loss",
    mart: "mart_loss",
    gairat: "cwloss GA_PGD eval_clean eval_robust GAIR -GA_earlystop",
    fast_adversarial: "cifar10_mean cifar10_std mu std upper_limit lower_limit clamp attack_pgd attack_fgsm "
    "evaluate_pgd evaluate_standard -get_loaders",
    robust_overfitting: "cifar10_mean cifar10_std mu std upper_limit lower_limit normalize clamp mixup_data "
    "mixup_criterion attack_pgd -Batches -get_args -main -normalise -pad -transpose -Crop -FlipLR -Cutout -Transform "
    "-cifar10",
    awp: "EPS diff_in_weights add_into_weights AdvWeightPerturb TradesAWP perturb_input",
    jacobian: "JacobianReg",
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_public_name_is_there_or_says_where_it_is(module: Any) -> None:
    offered = {name for name in PUBLIC[module].split() if name[0] != "-"}
    assert offered <= set(dir(module))
    assert set(getattr(module, "__all__", offered)) == offered
    for name in (name[1:] for name in PUBLIC[module].split() if name[0] == "-"):
        assert not hasattr(module, name)
        with pytest.raises(AttributeError, match=f"no '{name}'; it has .*Import it from the original"):
            getattr(module, name)
        with pytest.raises(ImportError, match=f"no '{name}'; it has .*Import it from the original"):
            exec(f"from {module.__name__} import {name}")
    with pytest.raises(AttributeError, match="has no"):
        _ = module.no_such_thing


def test_trades_norms() -> None:
    x = torch.randn(3, 2, 4, 4)
    assert torch.allclose(trades.squared_l2_norm(x), x.view(1, -1).square().sum(1))  # as published, of the whole batch
    assert torch.allclose(trades.l2_norm(x), x.norm()[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("net", [Net, Dropping, Flat])
@pytest.mark.parametrize("distance", ["l_inf", "l_2"])
def test_trades(distance: str, net: type[Net], dtype: torch.dtype) -> None:
    model, x, y = setting(dtype, net)
    how = {"epsilon": EPS if distance == "l_inf" else 0.5, "step_size": STEP, "perturb_steps": 4, "beta": 6.0}
    mine, theirs = (
        after(step_on(f), model, x, y, **how, distance=distance) for f in (trades.trades_loss, published.trades_loss)
    )
    tolerance = 1e-9 if dtype == torch.float64 else 1e-2
    same_images(mine.images[1], theirs.images[1], distance)
    same_step(mine, theirs, tolerance)
    same_trace(mine, theirs, tolerance)
    assert len(mine.images) == 3 and torch.equal(mine.images[2], x)
    assert theirs.forwards == 3 + 2 * 4 and mine.forwards == 3 + 1 + 4


def test_trades_flat_samples_exist() -> None:
    model, x, _ = setting(net=Flat)
    flat = (model.eval()(x) == 0).all(1)
    assert flat.any() and not flat.all()


def test_trades_lean() -> None:
    model, x, y = setting()
    how = {"epsilon": EPS, "step_size": STEP, "perturb_steps": 4, "beta": 6.0}
    mine = after(step_on(trades.trades_loss), model, x, y, **how, lean=True)
    theirs = after(step_on(published.trades_loss), model, x, y, **how)
    same_step(mine, theirs, 1e-9)
    same_trace(mine, theirs, statistics=False)
    assert len(mine.images) == 2 and int(mine.model.bn1.num_batches_tracked) == 2


def test_trades_gradient_stays_finite_at_a_probability_of_zero() -> None:
    model, x, y = setting(torch.float32)
    with torch.no_grad():
        model.linear.weight.mul_(1e4)
    loss, steps = step_on(trades.trades_loss)(model, x, y, epsilon=EPS, step_size=STEP, perturb_steps=2)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in steps.grads[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mart(dtype: torch.dtype) -> None:
    model, x, y = setting(dtype, Dropping)
    how = {"epsilon": EPS, "step_size": STEP, "perturb_steps": 4, "beta": 5.0}
    mine, theirs = (after(step_on(f), model, x, y, **how) for f in (mart.mart_loss, published.mart_loss))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-2
    same_images(mine.images[1], theirs.images[1])
    same_step(mine, theirs, tolerance)
    same_trace(mine, theirs, tolerance)
    assert mine.forwards == theirs.forwards


@pytest.mark.parametrize("loss", [trades.trades_loss, mart.mart_loss])
def test_without_steps_the_start_is_clipped(loss: Callable[..., Tensor]) -> None:
    model, x, y = setting()
    mine = after(step_on(loss), model, x, y, perturb_steps=0)
    assert mine.images[1].min() >= 0 and mine.images[1].max() <= 1 and not torch.equal(mine.images[1], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rand_init", [True, False])
@pytest.mark.parametrize(
    ("loss_fn", "category"), [("cent", "Madry"), ("cw", "Madry"), ("cent", "trades"), ("kl", "trades")]
)
def test_ga_pgd(loss_fn: str, category: str, rand_init: bool, dtype: torch.dtype) -> None:
    model, x, y = setting(dtype)
    rand_init |= loss_fn == "kl"  # which has no gradient at the images themselves
    if loss_fn == "cw":
        with torch.no_grad():
            model.linear.weight.mul_(40)  # some margins are above 50
    how = (EPS, STEP, 5, loss_fn, category, rand_init)
    mine, theirs = (after(f, model, x, y, *how) for f in (gairat.GA_PGD, published.GA_PGD))
    same_images(mine.result[0], theirs.result[0])
    assert torch.equal(mine.result[1], theirs.result[1])
    assert mine.result[1].unique().numel() > 1 or loss_fn == "kl"
    same_trace(mine, theirs, 0.0)
    assert all(p.grad is None for p in mine.model.parameters())


@pytest.mark.parametrize("steps", [10, 7])
@pytest.mark.parametrize("func", ["Tanh", "Sigmoid", "Discrete"])
def test_gair(func: str, steps: int) -> None:
    kappa = torch.arange(steps + 1).repeat(3)
    for lam in (-1.0, 0.0, float("inf")):
        mine = gairat.GAIR(steps, kappa.double(), lam, func)
        close(mine, published.GAIR(steps, kappa.double(), lam, func), "weights")
        close(gairat.GAIR(steps, kappa.float(), lam, func).double(), mine, "weights in float32", 1e-6)
    assert gairat.GAIR(10, torch.full((4,), 10.0), -500.0, "Tanh").tolist() == [1.0] * 4


@pytest.mark.parametrize("confidence", [50, 0.2])
def test_gairat_cwloss(confidence: float) -> None:
    logits, target = torch.randn(16, CLASSES, dtype=torch.float64), torch.arange(16) % CLASSES
    both = []
    for function in (gairat.cwloss, published.cw_loss):
        output = logits.clone().requires_grad_()
        loss = function(output, target, confidence)
        both.append((loss.detach(), *torch.autograd.grad(loss, output)))
    close(both[0][0], both[1][0], "loss")
    close(both[0][1], both[1][1], "gradient")
    assert confidence == 50 or (both[0][1] == 0).all(1).any()


@pytest.mark.parametrize(("loss_fn", "category", "random"), [("cent", "Madry", True), ("cw", "trades", False)])
def test_gairat_evaluation(loss_fn: str, category: str, random: bool) -> None:
    model, x, y = setting()
    loader = [(x[:10], y[:10]), (x[10:], y[10:])]
    how = (loader, 3, EPS, STEP, loss_fn, category, random)
    mine, theirs = (after(f, model, *how) for f in (gairat.eval_robust, published.eval_robust))
    assert mine.result == pytest.approx(theirs.result, rel=1e-9)
    same_trace(mine, theirs)
    mine = after(gairat.eval_clean, model, loader)
    theirs = after(lambda m: published.evaluate(loader, m, lambda a, b: 0), model)
    assert mine.result == pytest.approx(theirs.result, rel=1e-9) and 0 < mine.result[1] < 1
    same_trace(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("data", ["cifar", "mnist"])
def test_fast_adversarial(data: str, restarts: int, train: bool, dtype: torch.dtype) -> None:
    model, x, y = setting(dtype, Dropping, normalised=data == "cifar")
    model.train(train)
    model.bn2.eval()
    radii = (EPSILON, ALPHA) if data == "cifar" else (EPS, STEP)
    theirs = after(getattr(published, f"fast_{data}_pgd"), model, x, y, *radii, 5, restarts)
    mine = after(fast_adversarial.attack_pgd, model, x, y, *radii, 5, restarts)
    same_images(mine.result, theirs.result)
    same_trace(mine, theirs, 1e-9 if dtype == torch.float64 else 1e-5)
    assert (mine.result.abs() <= torch.as_tensor(radii[0])).all()
    assert mine.forwards == theirs.forwards - (restarts == 1 and not train)
    assert all(p.grad is None for p in mine.model.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_fast_adversarial_stops_when_every_sample_is_misclassified(train: bool) -> None:
    model, x, y = setting()
    model.train(train)
    model.bn2.eval()
    y = (copy.deepcopy(model)(x).argmax(1) + 1) % CLASSES
    mine, theirs = (
        after(f, model, x, y, 1e-6, 1e-7, 5, 2) for f in (fast_adversarial.attack_pgd, published.fast_mnist_pgd)
    )
    assert mine.forwards == theirs.forwards == 4
    same_images(mine.result, theirs.result)
    same_trace(mine, theirs)


def test_fast_adversarial_leaves_misclassified_samples_out_in_eval_mode() -> None:
    model, x, y = setting()
    model.eval()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    fast_adversarial.attack_pgd(model, x, y, EPS, STEP, 5, 1)
    assert sizes[0] == 16 and sizes[-1] < 16 and sizes == sorted(sizes, reverse=True)


def test_fast_adversarial_gives_ties_to_the_later_restart() -> None:
    model, x, y = setting(net=Flat)
    x = 0.3 * x  # dark, so that all losses are equal
    mine, theirs = (
        after(f, model, x, y, 0.01, 0.001, 2, 3) for f in (fast_adversarial.attack_pgd, published.fast_mnist_pgd)
    )
    same_images(mine.result, theirs.result)


def test_fast_adversarial_limits_are_globals_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = setting(normalised=True)
    for name, value in (("lower_limit", -0.5), ("upper_limit", 0.5)):
        monkeypatch.setattr(fast_adversarial, name, torch.full((3, 1, 1), value))
    x = x.clamp(-0.5, 0.5)
    adv = x + fast_adversarial.attack_pgd(model, x, y, EPSILON, ALPHA, 2, 1)
    assert adv.min() > -0.5 - 1e-12 and adv.max() < 0.5 + 1e-12


def test_fast_adversarial_radii_are_those_of_channels_in_any_shape() -> None:
    model, x, y = setting(normalised=True)
    square = torch.nn.functional.pad(x, (0, -3))[:, :, :3]  # as wide as it has channels
    model.linear = nn.Linear(8 * 4, CLASSES).double()
    expected = after(fast_adversarial.attack_pgd, model, square, y, EPSILON, ALPHA, 3, 1).result
    for shape in ((3,), (1, 3, 1, 1)):
        radii = EPSILON.view(shape), ALPHA.view(shape)
        assert torch.equal(after(fast_adversarial.attack_pgd, model, square, y, *radii, 3, 1).result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_adversarial_fgsm(dtype: torch.dtype) -> None:
    model, x, y = setting(dtype)
    mine, theirs = (after(f, model, x, y, EPS) for f in (fast_adversarial.attack_fgsm, published.attack_fgsm))
    same_images(mine.result, theirs.result)
    same_trace(mine, theirs, 1e-6)


def test_fast_adversarial_evaluation() -> None:
    model, x, y = setting(normalised=True)
    loader = [(x[:10], y[:10]), (x[10:], y[10:])]
    radii = (8 / 255.0 / published.CIFAR10_STD, 2 / 255.0 / published.CIFAR10_STD)

    def attack(model: nn.Module) -> tuple[float, float]:
        return published.evaluate(loader, model, lambda a, b: published.fast_cifar_pgd(model, a, b, *radii, 4, 2))

    mine = after(lambda m: fast_adversarial.evaluate_pgd(loader, m, 4, 2), model)
    theirs = after(attack, model)
    assert mine.result == pytest.approx(theirs.result, rel=1e-9)
    same_trace(mine, theirs)
    mine = after(lambda m: fast_adversarial.evaluate_standard(loader, m), model)
    theirs = after(lambda m: published.evaluate(loader, m, lambda a, b: 0), model)
    assert mine.result == pytest.approx(theirs.result, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_robust_overfitting(norm: str, early_stop: bool, mixup: bool, train: bool, dtype: torch.dtype) -> None:
    # Which of the two forwards of mixup says what is misclassified makes a difference with dropout alone.
    model, x, y = setting(dtype, Net if mixup and early_stop else Dropping)
    model.train(train)
    model.bn2.eval()
    radii = (EPS, STEP) if norm == "l_inf" else (0.5, 0.2)
    how = {"mixup": True, "y_a": y, "y_b": y.flip(0), "lam": 0.7} if mixup else {}
    for restarts in (1, 2):
        args = (x, y, *radii, 4, restarts, norm, early_stop)
        mine, theirs = (after(f, model, *args, **how) for f in (robust_overfitting.attack_pgd, published.rice_pgd))
        same_images(mine.result, theirs.result)
        same_trace(mine, theirs, 1e-9 if dtype == torch.float64 else 1e-5)
        assert all(p.grad is None for p in mine.model.parameters())


def test_robust_overfitting_l2_with_a_gradient_of_nothing() -> None:
    model, x, y = setting()
    model.eval()
    with torch.no_grad():
        model.linear.weight.mul_(1e-9)  # the published division is by the norm + 1e-10
    mine, theirs = (
        after(f, model, x, y, 0.5, 0.2, 2, 1, "l_2") for f in (robust_overfitting.attack_pgd, published.rice_pgd)
    )
    same_images(mine.result, theirs.result)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_mixup(alpha: float) -> None:
    model, x, y = setting()

    def mixed(module: Any) -> Callable[[nn.Module], Any]:
        def step(model: nn.Module) -> Any:
            images, y_a, y_b, lam = module.mixup_data(x, y, alpha)
            loss = module.mixup_criterion(torch.nn.functional.cross_entropy, model(images), y_a, y_b, lam)
            return images, y_b, lam, loss.detach()

        return step

    mine, theirs = (after(mixed(module), model) for module in (robust_overfitting, published))
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(mine.result, theirs.result, strict=True)
    )
    assert (mine.result[2] == 1) == (alpha == 0)
    same_trace(mine, theirs)


@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_robust_overfitting_of_images_in_float16(norm: str, weights: torch.dtype) -> None:
    x, y = torch.rand(4, 3, 8, 8, dtype=torch.float16), torch.arange(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).to(weights)
    delta = robust_overfitting.attack_pgd(model, x, y, EPS, STEP, 2, 2, norm)
    assert delta.dtype == torch.float16 and delta.isfinite().all() and delta.any()


def test_robust_overfitting_limits_are_globals_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in 0..255, say, with radii in their unit."""
    model, x, y = setting()
    plain = after(robust_overfitting.attack_pgd, model.eval(), x, y, EPS, STEP, 3, 1, "l_inf").result
    mean, deviation = 255 * robust_overfitting.mu, 255 * robust_overfitting.std
    for name, value in {"upper_limit": 255, "mu": mean, "std": deviation}.items():
        monkeypatch.setattr(robust_overfitting, name, value)
    large = after(robust_overfitting.attack_pgd, model, 255 * x, y, 255 * EPS, 255 * STEP, 3, 1, "l_inf").result
    close(large / 255, plain, "delta", 1e-6)


def test_awp_weights_by_name() -> None:
    model, _, _ = setting()
    proxy = copy.deepcopy(model)
    with torch.no_grad():
        for weight in proxy.parameters():
            weight.add_(torch.randn_like(weight))
    mine, theirs = awp.diff_in_weights(model, proxy), published.diff_in_weights(model, proxy)
    assert list(mine) == list(theirs) and awp.EPS == 1e-20
    for name, value in mine.items():
        close(value, theirs[name], name)
    added = copy.deepcopy(model), copy.deepcopy(model)
    awp.add_into_weights(added[0], mine, 0.3)
    published.add_into_weights(added[1], theirs, 0.3)
    for left, right in zip(added[0].parameters(), added[1].parameters(), strict=True):
        close(left.detach(), right.detach(), "weights")


@pytest.mark.parametrize("kind", ["at", "trades"])
def test_awp(kind: str) -> None:
    model, x, y = setting()
    model.linear.bias.requires_grad_(True)
    adv = (x + 0.05).clamp(0, 1)
    extra = {} if kind == "at" else {"inputs_clean": x, "beta": 6.0}

    def ours(model: nn.Module) -> dict[str, Tensor]:
        proxy = copy.deepcopy(model)
        made = (awp.AdvWeightPerturb if kind == "at" else awp.TradesAWP)(
            model, proxy, torch.optim.SGD(proxy.parameters(), lr=0.01), 0.01
        )
        diff = made.calc_awp(inputs_adv=adv, targets=y, **extra)
        made.perturb(diff)
        with torch.no_grad():
            model.linear.weight.add_(1.0)
        made.restore(diff)
        return diff

    def theirs(model: nn.Module) -> dict[str, Tensor]:
        proxy = copy.deepcopy(model)
        made = published.AWP(model, proxy, torch.optim.SGD(proxy.parameters(), lr=0.01), 0.01)
        return made.calc_awp(adv, y, **extra)

    mine, expected = after(ours, model), after(theirs, model)
    assert list(mine.result) == list(expected.result) == ["conv1.weight", "conv2.weight", "linear.weight"]
    for name, direction in mine.result.items():
        close(direction, expected.result[name], name)
    same_trace(mine, expected, 0.0)
    assert all(p.grad is None for p in mine.model.parameters())
    close(mine.model.conv1.weight.detach(), model.conv1.weight.detach(), "restored")
    close(mine.model.linear.weight.detach(), model.linear.weight.detach() + 1.0, "restored, with an update")


def test_awp_perturbs_by_gamma() -> None:
    model, x, y = setting()
    found = awp.AdvWeightPerturb(model, None, None, 0.25)
    before, diff = model.conv1.weight.detach().clone(), found.calc_awp(x, y)
    found.perturb(diff)
    close(model.conv1.weight.detach(), before + 0.25 * diff["conv1.weight"], "perturbed")
    close(diff["conv1.weight"].norm(), before.norm(), "norm")


def test_awp_of_weights_in_float16() -> None:
    """A weight without a gradient made NaN of 0 over 0, and lengths were beyond 65,504."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).half()
    with torch.no_grad():
        model[1].weight.fill_(4000.0)
        model[3].bias.fill_(-torch.inf)
    x, y = 1e-4 * torch.rand(8, 1, 8, 8).half(), torch.arange(8) % 4
    found = awp.AdvWeightPerturb(model, None, None, 0.25).calc_awp(x, y)
    assert {name: bool(step.any()) for name, step in found.items()} == dict.fromkeys(found, False)
    with torch.no_grad():
        model[3].bias.zero_()
    found = awp.AdvWeightPerturb(model, None, None, 0.25).calc_awp(x, y)
    for name, step in found.items():
        assert step.dtype == torch.float16 and step.any()
        close(step.float().norm(), dict(model.named_parameters())[name].detach().float().norm(), name, 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", ["l_inf", "l_2"])
def test_awp_perturb_input(distance: str, dtype: torch.dtype) -> None:
    model, x, _ = setting(dtype)
    how = {"epsilon": EPS if distance == "l_inf" else 0.5, "step_size": STEP, "perturb_steps": 4, "distance": distance}
    mine, theirs = (after(f, model, x, **how) for f in (awp.perturb_input, published.perturb_input))
    same_images(mine.result, theirs.result, distance)
    same_trace(mine, theirs, 0.0)
    assert not mine.model.training and not mine.model.bn1.training


def test_trades_l2_goes_along_gradients_whose_squares_underflow() -> None:
    """It went at random, as if there were none."""

    class Sure(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)) + torch.tensor([60.0, 0, 0, 0])

    torch.manual_seed(0)
    model, x = Sure(64, 4), torch.rand(8, 1, 8, 8)
    adv, wide = (
        trades.kl_adversary(net, x.to(dtype), 0.001 * torch.ones_like(x, dtype=dtype), 0.1, 0.5, 2, "l_2")
        for net, dtype in ((model, torch.float32), (copy.deepcopy(model).double(), torch.float64))
    )
    close(adv.double(), wide, "images", 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "outputs"), [(1, CLASSES), (3, CLASSES), (-1, CLASSES), (1, 1)])
def test_jacobian(n: int, outputs: int, dtype: torch.dtype) -> None:
    def penalty(model: Net, regulariser: type[nn.Module]) -> Tensor:
        x = inputs.clone().requires_grad_()
        value = regulariser(n)(x, model(x)[:, :outputs])
        value.backward()
        return value.detach()

    model, inputs, _ = setting(dtype)
    mine, theirs = (after(penalty, model, kind) for kind in (jacobian.JacobianReg, published.JacobianReg))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    close(mine.result, theirs.result, "R", tolerance)
    assert mine.result.dtype == dtype and mine.result.ndim == 0
    for p, q in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            close(p.grad, q.grad, "gradient of R", tolerance)
    same_trace(mine, theirs, tolerance)


def test_jacobian_of_an_empty_batch_is_nan_as_published() -> None:
    x = torch.rand(0, 6, requires_grad=True)
    for kind in (jacobian.JacobianReg, published.JacobianReg):
        assert kind(2)(x, x[:, :3] * 2).isnan()


def test_jacobian_of_all_projections_is_the_frobenius_norm() -> None:
    model, inputs, _ = setting()
    x = inputs.clone().requires_grad_()
    model.eval()
    J = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x)
    close(jacobian.JacobianReg(n=-1)(x, model(x)).detach(), 0.5 * J.square().sum() / len(x), "R")


def test_jacobian_of_fused_attention_is_refused_with_what_to_do() -> None:
    x, weight = torch.rand(2, 1, 4, 8, requires_grad=True), torch.rand(8, 8, requires_grad=True)

    def y() -> Tensor:
        return nn.functional.scaled_dot_product_attention(x @ weight, x, x).flatten(1)[:, :3]

    with pytest.raises(RuntimeError, match="fused attention kernel, which has no second derivative: compute it inside"):
        jacobian.JacobianReg()(x, y())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian.JacobianReg()(x, y()).backward()
    assert weight.grad is not None


def test_attack_without_a_key_draws_from_the_global_state() -> None:
    model, x, _ = setting(net=Dropping)

    def attack(model: nn.Module) -> Tensor:
        with leave_no_trace(model, "keep", None):
            return model(x).detach()

    mine, plain = after(attack, model), after(lambda m: m(x).detach(), model)
    assert torch.equal(mine.result, plain.result) and torch.equal(mine.random[0], plain.random[0])


S = setting(torch.float32)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: trades.trades_loss(*S, Steps(S.model), distance="linf"), ValueError, "distance"),
    (lambda: trades.trades_loss(*S, Steps(S.model), epsilon=8.0), ValueError, "eps"),
    (lambda: trades.trades_loss(S.model, 2 * S.x, S.y, Steps(S.model), distance="l_2"), ValueError, "x has values"),
    (lambda: mart.mart_loss(*S, Steps(S.model), distance="l_2"), ValueError, "distance"),
    (lambda: mart.mart_loss(S.model, S.x - 1, S.y, Steps(S.model)), ValueError, "x has values"),
    (lambda: gairat.GA_PGD(*S, 0.1, 0.1, 2, "ce", "Madry", True), ValueError, "loss_fn"),
    (lambda: gairat.GA_PGD(*S, 0.1, 0.1, 2, "cent", "madry", True), ValueError, "category"),
    (lambda: gairat.GA_PGD(*S, 0.1, 0.1, 2, "kl", "Madry", True), ValueError, "category"),
    (lambda: gairat.GA_PGD(*S, 0.1, 0.1, 2, "kl", "trades", False), ValueError, "rand_init"),
    (lambda: gairat.GA_PGD(*S, 8, 2, 2, "cent", "Madry", True), ValueError, "epsilon"),
    (lambda: gairat.GAIR(10, torch.ones(4), 0.0, "tanh"), ValueError, "func"),
    (lambda: gairat.GAIR(1, torch.ones(4), 0.0, "Tanh"), ValueError, "num_steps"),
    (lambda: gairat.eval_clean(S.model, []), ValueError, "gives no images"),
    (lambda: fast_adversarial.attack_pgd(*S, EPSILON[:2], ALPHA[:2], 2, 1), ValueError, "epsilon"),
    (lambda: fast_adversarial.attack_pgd(*S, EPSILON, ALPHA[:2], 2, 1), ValueError, "alpha has 2"),
    (lambda: fast_adversarial.attack_pgd(*S, 8, 2, 2, 1), ValueError, "epsilon"),
    (lambda: robust_overfitting.attack_pgd(*S, EPS, STEP, 2, 1, "linf"), ValueError, "norm"),
    (lambda: robust_overfitting.attack_pgd(*S, 8, 2, 2, 1, "l_inf"), ValueError, "epsilon"),
    (lambda: robust_overfitting.attack_pgd(*S, EPS, STEP, 2, 1, "l_inf", mixup=True, y_a=S.y), ValueError, "y_b"),
    (lambda: awp.perturb_input(S.model, S.x, distance="l2"), ValueError, "distance"),
    (
        lambda: awp.AdvWeightPerturb(S.model, None, torch.optim.SGD(S.model.parameters(), 0.1, momentum=0.9), 0.01),
        ValueError,
        "momentum",
    ),
    (lambda: awp.TradesAWP(S.model, None, torch.optim.Adam(S.model.parameters()), 0.01), ValueError, "proxy_optim"),
    (lambda: jacobian.JacobianReg(0), ValueError, "n must be"),
    (lambda: jacobian.JacobianReg(1.5), TypeError, "n must be an integer, got 1.5"),
    (lambda: trades.trades_loss(*S, Steps(S.model), lean="no"), TypeError, "lean must be True or False"),
    (lambda: trades.trades_loss(*S, Steps(S.model), perturb_steps=1.5, distance="l_2"), TypeError, "perturb_steps"),
    (lambda: gairat.GA_PGD(*S, 0.1, 0.1, 2, "cent", "Madry", "no"), TypeError, "rand_init must be True or False"),
    (lambda: gairat.GAIR("10", torch.ones(4), 0.0, "Discrete"), TypeError, "num_steps must be an integer"),
    (lambda: fast_adversarial.attack_pgd(*S, EPS, STEP, 2, 1.5), TypeError, "restarts must be an integer"),
    (lambda: robust_overfitting.attack_pgd(*S, EPS, STEP, -2, 1, "l_2"), ValueError, "attack_iters must be"),
    (lambda: robust_overfitting.attack_pgd(*S, EPS, STEP, 2, 1, "l_2", "no"), TypeError, "early_stop must be True"),
    (lambda: robust_overfitting.attack_pgd(*S, EPS, STEP, 2, 1, "l_2", mixup=1), TypeError, "mixup must be True"),
    (lambda: jacobian.JacobianReg()(S.x, S.model(S.x)), ValueError, "x does not require grad"),
    (lambda: jacobian.JacobianReg()(S.x.clone().requires_grad_(), S.model(S.x)), ValueError, "depend on x"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_images_made_in_inference_mode() -> None:
    with torch.inference_mode():
        x = S.x.clone()
    found, expected = (fast_adversarial.attack_fgsm(S.model.eval(), images, S.y, EPS) for images in (x, S.x))
    assert torch.equal(found, expected)


def after_seed(call: Callable[..., Tensor], *args: Any, **how: Any) -> Tensor:
    torch.manual_seed(0)
    return call(*args, **how)


def test_frozen_scripts_have_no_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(S.x[0].numel(), CLASSES)).eval()
    model: Any = torch.jit.freeze(torch.jit.script(net))
    found, expected = (torchattacks.PGD(m, steps=2, random_start=False)(S.x, S.y) for m in (model, net))
    assert torch.equal(found, expected)
    how = {"norm": "l_inf", "mixup": True, "y_a": S.y, "y_b": S.y, "lam": 0.5}
    attack = partial(after_seed, robust_overfitting.attack_pgd)
    found, expected = (attack(m, *S[1:], EPS, STEP, 2, 1, **how) for m in (model, net))
    assert torch.equal(found, expected)


def test_a_network_that_writes_into_its_input_leaves_the_images() -> None:
    class Writing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5).flatten(1))

    x = S.x.clone()
    with pytest.raises(RuntimeError, match="in-place"):
        torchattacks.TPGD(Writing(x[0].numel(), CLASSES))(x)
    assert torch.equal(x, S.x)
