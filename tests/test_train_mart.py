"""MART does what its published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_train.methods import MART, Batch
from atlas_train.methods.terms import near_start
from beside_published import EPS, assert_same, case, close, ours, theirs
from published import mart as published


def test_mart() -> None:
    made = case(size=16)
    how = {"eps": EPS, "step_size": EPS / 3, "steps": 4, "beta": 5.0}
    expected = theirs(published.mart, made, near_start(made.batch, made.key), **how)
    mine = ours(MART(**how), made)
    close(mine.images[1], expected.images[1], "x'")
    assert_same(mine, expected, statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 2


def test_the_gradient_flows_through_the_weight_of_the_kl_term() -> None:
    made = case()
    mine = ours(MART(EPS, steps=2), made)
    clean, adv = (made.model.train()(images) for images in mine.images)
    p, q = clean.softmax(1), adv.softmax(1)
    wrong = q.scatter(1, made.batch.y[:, None], 0.0).amax(1)
    weight = 1.0000001 - p.gather(1, made.batch.y[:, None])[:, 0]
    kl = F.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)

    def gradient(weight: Tensor) -> Tensor:
        losses = F.cross_entropy(adv, made.batch.y, reduction="none") - (1.0001 - wrong + 1e-12).log()
        return torch.autograd.grad((losses + 6.0 * kl * weight).mean(), made.model.linear.weight, retain_graph=True)[0]

    found = mine.grads[0][-2]
    close(found, gradient(weight), "gradient")
    assert (found - gradient(weight.detach())).abs().max() > 0.01 * found.abs().max()


def test_the_largest_wrong_class_counts_and_the_kl_term_is_bounded() -> None:
    """The network hands its images on as logits, so the loss can be computed by hand."""
    likely = torch.tensor([0.6, 0.3, 0.1, 1e-30], dtype=torch.float64)
    even = torch.full((4,), 0.25, dtype=torch.float64)

    def loss(clean: Tensor, adv: Tensor, label: int) -> float:
        batch = Batch(clean.log().reshape(1, 4, 1, 1), torch.tensor([label]), torch.tensor([0]))
        return float(MART(EPS, beta=2.0).objective(nn.Flatten(), batch, adv.log().reshape(1, 4, 1, 1))[0])

    assert math.isclose(loss(likely, likely, 0), -math.log(0.6) - math.log(1.0001 - 0.3), rel_tol=1e-9)
    assert math.isclose(loss(likely, likely, 1), -math.log(0.3) - math.log(1.0001 - 0.6), rel_tol=1e-9)
    kl = sum(0.25 * math.log(0.25 / q) for q in (0.6, 0.3, 0.1, 1e-12))
    boosted = -math.log(0.6) - math.log(1.0001 - 0.3) + 2.0 * kl * (1.0000001 - 0.25)
    assert math.isclose(loss(even, likely, 0), boosted, rel_tol=1e-9)


def test_steps_are_the_published_share_of_eps_on_cifar10() -> None:
    assert 0.031 * MART.defaults["cifar10"]["step_size"] == 0.007 and MART(EPS).steps == 10 and MART(EPS).beta == 6
