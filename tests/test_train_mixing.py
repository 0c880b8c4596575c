"""Mixup and CutMix: what is drawn, what images and losses become, and that runs with them go on to the bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_kernels import PGD
from atlas_train import engine, methods
from atlas_train.config import TrainConfig
from atlas_train.methods import AWP, Batch, Method, Mixing, State
from atlas_train.methods.double_backward import loss_gradient
from atlas_train.methods.mixed import MixedBatch
from atlas_train.methods.mixing import beta
from atlas_train.noise import noise_keys
from beside_published import CLASSES, EPS, Case, Steps, case, close, ours
from tiny_runs import TINY, same, splits, weights

REFUSED = {
    "gairat": "counts how long", "adr": "compares the images of a class", "mma": "stops being of its class",
    "liet": "starts from the noise of an image's label",
}  # fmt: skip
MIXABLE = [name for name in methods.names() if name not in REFUSED]
#: Whose loss is not linear in what the labels say: a norm of a gradient, or the sign of a difference.
NOT_LINEAR = ("grad_align", "cure", "llr")


def images(n: int, size: int = 8, channels: int = 3) -> Batch:
    torch.manual_seed(n)
    x = torch.rand(n, channels, size, size)
    return Batch(x, torch.randint(CLASSES, (n,)), torch.randperm(1000)[:n])


def two_labels(made: Case, share: float) -> MixedBatch:
    """The case's images with a second label, another one."""
    second = (made.batch.y + 1 + torch.arange(len(made.batch.y)) % (CLASSES - 1)) % CLASSES
    return MixedBatch.of(made.batch, made.batch.x, second, torch.tensor(share, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 1.4, 8.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    drawn = torch.stack([beta(alpha, key) for key in noise_keys(3, 0, 1000)])
    assert drawn.dtype == torch.float64 and ((drawn >= 0) & (drawn <= 1)).all()
    torch.manual_seed(0)
    expected = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double()).sample((100_000,))
    grid = torch.linspace(0.01, 0.99, 99).double()
    gap = ((drawn[:, None] <= grid).double().mean(0) - (expected[:, None] <= grid).double().mean(0)).abs().max()
    assert gap < 1.7 / math.sqrt(1000)  # Kolmogorov & Smirnov, of one in a hundred; the draws do not change
    assert abs(drawn.var().item() * 4 * (2 * alpha + 1) - 1) < 0.15


def test_mixup_is_its_formula() -> None:
    batch = images(40)
    for key in noise_keys(1, 0, 5):
        mixed = Mixing(methods.build("standard", EPS), "mixup", 1.0).mixed(batch, key)
        partner = [int(((batch.x - other).abs().flatten(1).sum(1) == 0).nonzero()) for other in batch.x]
        assert partner == list(range(40))  # no two images are alike
        lam = mixed.share.item()
        assert lam == pytest.approx(beta(1.0, key).item())
        others = (mixed.x - lam * batch.x) / (1 - lam)
        order = torch.cdist(others.flatten(1), batch.x.flatten(1)).argmin(1)
        assert order.sort().values.tolist() == list(range(40)) and order.tolist() != list(range(40))
        torch.testing.assert_close(mixed.x, lam * batch.x + (1 - lam) * batch.x[order], rtol=0, atol=1e-6)
        assert torch.equal(mixed.second, batch.y[order]) and torch.equal(mixed.y, batch.y)
        assert torch.equal(mixed.ids, batch.ids) and mixed.x.min() >= 0 and mixed.x.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 20)])
def test_cutmix_is_a_box_of_the_other_image(height: int, width: int) -> None:
    n = 12
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, height, width) / n
    batch = Batch(x.contiguous(), torch.arange(n) % CLASSES, torch.arange(n))
    seen = []
    for key in noise_keys(2, 0, 60):
        mixed = Mixing(methods.build("standard", EPS), "cutmix", 1.0).mixed(batch, key)
        foreign = (mixed.x != batch.x)[:, 0]
        moved = foreign.flatten(1).any(1)
        box = foreign[moved][0] if moved.any() else torch.zeros(height, width, dtype=torch.bool)
        assert (foreign[moved] == box).all()
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)  # a rectangle, without a hole
        for side in (rows, columns):
            assert int(side.int().diff().abs().sum()) <= 2
        area = box.double().mean().item()
        if moved.any():
            assert mixed.share.item() == pytest.approx(1 - area)
            inside = mixed.x[:, 0][:, box][:, 0]
            assert torch.equal(batch.y[(inside * n).round().long()], mixed.second)
        lam = beta(1.0, key).item()
        height_of, width_of = ((int(side * math.sqrt(1 - lam)) // 2) * 2 for side in (height, width))
        assert rows.sum() <= height_of and columns.sum() <= width_of  # cut off at the edges
        seen.append((bool(rows[0]), bool(rows[-1]), bool(columns[0]), bool(columns[-1])))
    assert all(any(at[edge] for at in seen) and not all(at[edge] for at in seen) for edge in range(4))


def test_what_is_drawn_goes_by_the_key_and_the_samples() -> None:
    method, batch = Mixing(methods.build("standard", EPS), "mixup", 1.0), images(20)
    first, second = noise_keys(0, 0, 2)
    mixed = method.mixed(batch, first)
    assert torch.equal(method.mixed(batch, first).x, mixed.x) and not torch.equal(
        method.mixed(batch, second).x, mixed.x
    )
    random = torch.get_rng_state()
    last = batch._replace(x=batch.x.to(memory_format=torch.channels_last))
    other = method.mixed(last, first)
    assert torch.equal(other.x, mixed.x) and other.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", [name for name in MIXABLE if name not in NOT_LINEAR])
def test_losses_are_the_mean_over_both_labels(name: str) -> None:
    """On the same adversaries: lambda of the loss with the one label and the rest of that with the other."""
    made, share = case(), 0.3
    mixed = two_labels(made, share)
    method, state = methods.build(name, EPS, label_smoothing=0.2), State(epochs=1)
    method.before_step(made.model.train(), made.batch, made.key, state)

    def loss(batch: Batch) -> tuple[Tensor, Any]:
        model = copy.deepcopy(made.model).train()
        return method.objective(model, batch, method.prepare(model, mixed, made.key, copy.deepcopy(state)))

    parts = [loss(batch)[0] for batch in (made.batch, made.batch._replace(y=mixed.second))]
    whole, metrics = loss(mixed)
    close(whole.detach(), (share * parts[0] + (1 - share) * parts[1]).detach(), "loss")
    assert (parts[0] - parts[1]).abs() > 1e-3
    assert all(0 <= metrics[key] <= 1 for key in {"clean", "adv"} & set(metrics))


@pytest.mark.parametrize("name", MIXABLE)
@pytest.mark.parametrize("share", [0.0, 1.0, 0.4])
def test_a_step_on_one_label_is_the_methods_own(name: str, share: float) -> None:
    """If one label has the whole share, or both labels are equal."""
    made = case()
    mixed = two_labels(made, share)
    alone = made.batch if share else made.batch._replace(y=mixed.second)
    if share == 0.4:
        mixed.second = made.batch.y
    how = {"ramp": 0.0} if name == "llr" else {}
    expected = ours(methods.build(name, EPS, how), replace(made, batch=alone))
    mine = ours(methods.build(name, EPS, how), replace(made, batch=mixed))
    close(mine.loss, expected.loss, "loss")
    for a, b in zip(mine.grads[-1], expected.grads[-1], strict=True):
        close(a, b, "gradient")


@pytest.mark.parametrize("steps", [1, 3])
def test_attacks_climb_the_cross_entropy_of_both_labels(steps: int) -> None:
    """As in Rice, Wong & Kolter's code: PGD on lambda CE(y_a) + (1 - lambda) CE(y_b), in plain PyTorch."""
    made, share, size = case(), 0.35, 0.4 * EPS
    mixed = two_labels(made, share)
    method = methods.build("adv", EPS, {"steps": steps, "step_size": size})
    model = copy.deepcopy(made.model).train()
    adv = method.prepare(model, mixed, made.key, State())
    x, at = made.batch.x, made.start()
    for _ in range(steps):
        at.requires_grad_()
        logits = model(at)
        loss = share * F.cross_entropy(logits, mixed.y) + (1 - share) * F.cross_entropy(logits, mixed.second)
        (grad,) = torch.autograd.grad(loss, at)
        at = (at.detach() + size * grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    close(adv, at, "x'")
    assert not torch.equal(adv, method.prepare(model, made.batch, made.key, State()))


def test_gradients_that_are_differentiated_again_are_of_both_labels() -> None:
    made, share = case(), 0.35
    mixed = two_labels(made, share)
    made.model.eval()
    _, losses, grad = loss_gradient(made.model, made.batch.x, mixed)
    x = made.batch.x.clone().requires_grad_()
    first, second = (F.one_hot(y, CLASSES).double() for y in (mixed.y, mixed.second))
    expected = F.cross_entropy(made.model(x), share * first + (1 - share) * second, reduction="none")
    close(losses.detach(), expected.detach(), "losses")
    close(grad.detach(), torch.autograd.grad(expected.sum(), x)[0], "gradient")


@pytest.mark.parametrize("name", MIXABLE)
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_every_method_that_can_trains_on_mixed_images(name: str, kind: Any) -> None:
    """In bf16 and channels_last too."""
    made = case()
    method = Mixing(methods.build(name, EPS), kind, 1.0)
    model = copy.deepcopy(made.model).float().train()
    x = made.batch.x.float().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = method.step(model, made.batch._replace(x=x), made.key, State(size=100), Steps(model))
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert method.in_use() == method.method.in_use() and method.name == name
    parts = method.parts(State())
    assert [type(each) for _, each in parts] == [Mixing]


def test_methods_that_ask_for_one_label_are_refused_by_name() -> None:
    for name, why in REFUSED.items():
        for kind in ("mixup", "cutmix"):
            with pytest.raises(ValueError, match=f"{kind} cannot be had with {name}, which .*{why}.*: set {kind}=0"):
                TrainConfig(method=name, **{kind: 1.0})
        with pytest.raises(ValueError, match=f"mixup cannot be had with {name}"):
            TrainConfig(method="adv", beside=(name,), mixup=1.0)
    for local in ("margin", "radius"):
        with pytest.raises(ValueError, match=f"cutmix cannot be had with atlas with local='{local}'"):
            TrainConfig(method="atlas", hyper={"local": local}, cutmix=1.0)
    with pytest.raises(ValueError, match="mixup and cutmix do not go together, as a batch is mixed in one way"):
        TrainConfig(mixup=1.0, cutmix=1.0)
    with pytest.raises(ValueError, match="mixup must be a number >= 0 and <= 100, got -1"):
        TrainConfig(mixup=-1)
    with pytest.raises(ValueError, match="mixup cannot be had with gairat"):
        Mixing(AWP(methods.build("gairat", EPS), 0.01), "mixup", 1.0)


@pytest.mark.parametrize(
    "how",
    [
        {"method": "atlas", "mixup": 1.0, "awp": 0.01},
        {"method": "one_step_adv", "cutmix": 1.0, "averaging": "ema", "train_precision": "bf16", "channels_last": True},
    ],
    ids=["mixup", "cutmix"],
)
def test_a_resumed_run_comes_to_the_same_bits(how: dict[str, Any], tmp_path: Path) -> None:
    settings = TrainConfig(**TINY | {"epochs": 3} | how)
    whole = engine.train(settings, splits=splits())
    assert isinstance(whole.method, Mixing) and isinstance(whole.method.method, Method)
    engine.train(settings, splits=splits(), folder=tmp_path, on_epoch=lambda row: row["epoch"] == 1)
    resumed = engine.train(replace(settings, resume=str(tmp_path)), splits=splits())
    assert same(weights(resumed.final_model), weights(whole.final_model))
    kind = "mixup" if "mixup" in how else "cutmix"
    with pytest.raises(ValueError, match=f"cannot be resumed with another {kind}: it has 1.0, you gave 0.0"):
        engine.train(replace(settings, resume=str(tmp_path), **{kind: 0.0}), splits=splits())
    plain = engine.train(replace(settings, **{kind: 0.0}), splits=splits())
    assert not same(weights(plain.model), weights(whole.model))


def test_attacks_in_graphs_and_objectives_of_some_samples() -> None:
    """What the attack kit does with an objective: take rows of it, and put other tensors in place of its own."""
    made = case()
    mixed = two_labels(made, 0.35)
    batch = methods.mixed.samples(PGD(EPS), mixed, made.key)
    some = batch.rows(torch.tensor([1, 3])).goal
    logits = torch.randn(len(mixed.y), CLASSES, dtype=torch.float64)
    assert torch.equal(some.cotangent(logits[[1, 3]]), batch.goal.cotangent(logits)[[1, 3]])
    assert isinstance(made.model, nn.Module)
    again = batch.holding([tensor.clone() for tensor in batch.tensors()])
    assert torch.equal(again.goal.cotangent(logits), batch.goal.cotangent(logits))
