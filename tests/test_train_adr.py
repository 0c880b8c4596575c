"""ADR does what its published code does: adversary, every term, loss, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_train.methods import ADR, State
from atlas_train.methods.adr import global_smoothness
from atlas_train.methods.terms import near_start
from beside_published import CLASSES, EPS, Steps, assert_same, case, close, ours, theirs
from published import adr as published

HOW = {"eps": EPS, "step_size": EPS / 3, "steps": 4}
#: Unequal, so that none can stand for another.
WEIGHTS = {"lc": 0.7, "gc": 1.3, "conf": 0.4, "vat": 1.9, "gs": 0.3}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"alpha_nat": 0.3, "alpha_adv": 0.8, **WEIGHTS},
        {"alpha_nat": 0, "lc": 0, "conf": 0},
        {"lc": 0, "gc": 0},
        {"form": "trades"},
        {"form": "trades", "beta": 2.0, **WEIGHTS},
    ],
)
def test_adr(how: dict[str, Any]) -> None:
    made = case()
    start = near_start(made.batch, made.key) if "form" in how else made.start()
    x_adv = same_as_published(how, how, start, statistics=True)
    assert (x_adv - made.batch.x).abs().max() > EPS / 2


@pytest.mark.parametrize("bn_compat", [False, True])
def test_adr_with_the_attack_in_train_mode(bn_compat: bool) -> None:
    same_as_published(
        {"attack_mode": "train", "bn_compat": bn_compat},
        {"attack_in_train_mode": True},
        case().start(),
        statistics=bn_compat,
    )


def same_as_published(mine: dict[str, Any], theirs_: dict[str, Any], start: Tensor, statistics: bool) -> Tensor:
    made, method = case(), ADR(**HOW, **mine)
    assert_same(ours(method, made), theirs(published.adr, made, start, **HOW, **theirs_), statistics=statistics)
    x_adv = method.prepare(made.model.train(), made.batch, made.key, State())
    model = copy.deepcopy(case().model).train()
    expected, _ = published.adr(model, *made.batch[:2], start, Steps(model), **HOW, **theirs_)
    close(x_adv, expected, "x'")
    return x_adv


def test_every_term_is_the_published_one_and_weight_0_leaves_it_out() -> None:
    made, x_adv = case(), (case().batch.x + 0.1).clamp(0, 1)
    _, metrics = ADR(EPS, gs=1.0).objective(made.model, made.batch, x_adv)
    model = case().model.train()
    h, h_adv = model.features(made.batch.x), model.features(x_adv)
    expected = published.regularisers(h, h_adv, model.head(h), model.head(h_adv), made.batch.y)
    for name, value in zip(("lc", "gc", "conf", "vat", "gs"), expected, strict=True):
        close(metrics[name], value.detach(), name)
        _, without = ADR(EPS, **{"gs": 1.0, name: 0}).objective(made.model, made.batch, x_adv)
        assert set(metrics) - set(without) == {name}
    assert set(metrics) == {"clean", "adv", "ce", "ce_adv", "lc", "gc", "conf", "vat", "gs"}


class Flat(nn.Module):
    """Features are the pixels."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, CLASSES).double()

    def features(self, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_global_compactness_takes_all_pairs_and_a_small_negative_weight_of_other_classes() -> None:
    made = case(size=3)
    batch = made.batch._replace(
        x=torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 2, 1, 1),
        y=torch.tensor([4, 1, 1]),
    )
    x_adv = batch.x + 0.1
    _, metrics = ADR(EPS).objective(Flat(2), batch, x_adv)
    same = 0.1 + 0.1 + 0.1 + abs(0.3 - 1.0) + abs(0.9 - 0.4)  # three of i = j, two of one class
    other = abs(0.3 - 0.1) + abs(0.9 - 0.1) + abs(0.0 - 0.4) + abs(0.0 - 1.0)
    assert float(metrics["gc"]) == pytest.approx((same - 0.0101010101 * other) / 9, rel=1e-9)
    assert float(metrics["lc"]) == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("size", [1, 6])
def test_a_batch_of_one_class_has_weights_1_and_no_nan(size: int) -> None:
    made = case(size)
    batch = made.batch._replace(y=torch.full((size,), 2))
    model = made.model.eval()
    x_adv = (batch.x + 0.05).clamp(0, 1)
    loss, metrics = ADR(EPS, gs=1.0).objective(model, batch, x_adv)
    loss.backward()
    h, h_adv = model.features(batch.x), model.features(x_adv)
    close(metrics["gc"], (h[None] - h_adv[:, None]).abs().mean().detach(), "gc")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()) and loss.isfinite()


def test_the_regularisers_move_only_the_adversaries() -> None:
    made = case()
    batch = made.batch._replace(x=made.batch.x.clone().requires_grad_())
    x_adv = (made.batch.x + 0.05).clamp(0, 1).requires_grad_()
    only = ADR(EPS, alpha_nat=0, alpha_adv=0, gs=1.0)
    loss, _ = only.objective(made.model.eval(), batch, x_adv)
    clean, adversarial = torch.autograd.grad(loss, (batch.x, x_adv), allow_unused=True)
    assert clean is None and adversarial.abs().max() > 0


def test_features_and_head_are_found_behind_torch_compile_and_asked_for_before_any_forward() -> None:
    made = case()
    method = ADR(**HOW)  # type: ignore[arg-type]
    expected = ours(method, made)
    compiled = torch.compile(case().model.train(), backend="eager")
    loss, _ = method.loss(compiled, made.batch, made.key)  # type: ignore[arg-type]
    close(loss.detach(), expected.loss, "loss")

    model = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)).double()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward was made"))
    with pytest.raises(ValueError, match=r"Sequential has no features and no head: give it features\(x\)"):
        method.loss(model, made.batch, made.key)


def test_without_compactness_any_network_will_do() -> None:
    made = case()
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES)).double()
    loss, metrics = ADR(EPS, lc=0, gc=0).loss(model, made.batch, made.key)
    assert loss.isfinite() and {"conf", "vat"} <= set(metrics)


@pytest.mark.parametrize("form", ["adv", "trades"])
def test_same_key_same_bits_whatever_the_global_generator(form: Any) -> None:
    made, method = case(), ADR(EPS, form=form)
    torch.manual_seed(1)
    first = ours(method, made)
    torch.manual_seed(2)
    second = ours(method, made)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.grads[0], second.grads[0], strict=True))


def test_under_autocast_the_terms_are_computed_in_float32() -> None:
    made = case()
    model, x = made.model.float(), made.batch.x.float()
    batch = made.batch._replace(x=x)
    with torch.autocast("cpu", torch.bfloat16):
        z, z_adv = model(x), model((x + 0.1).clamp(0, 1))
        loss, metrics = ADR(EPS, gs=1.0).loss(model, batch, made.key)
        smooth = global_smoothness(z, z_adv, batch.y)
    assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    z, z_adv = z.detach().float(), z_adv.detach().float()
    close(smooth.detach(), published.regularisers(z, z, z, z_adv, batch.y)[4], "gs", 1e-5)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"bn_compat": True}, "bn_compat is for attack_mode='train' and form='adv'.*got 'eval' and 'adv'"),
        ({"bn_compat": True, "attack_mode": "train", "form": "trades"}, "got 'train' and 'trades'"),
        (dict.fromkeys(("alpha_nat", "alpha_adv", "lc", "gc", "conf", "vat"), 0), "all weights are 0"),
        ({"lc": -1}, "adr: lc must be a number >= 0, got -1"),
        ({"form": "mart"}, "form must be one of 'adv', 'trades'"),
    ],
)
def test_wrong_settings_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADR(EPS, **hyper)
