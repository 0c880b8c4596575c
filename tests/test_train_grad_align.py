"""GradAlign does what its published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atlas_train.methods import GradAlign
from atlas_train.methods.grad_align import misalignment
from atlas_train.noise import uniform
from beside_published import EPS, Case, Outcome, assert_same, case, close, ours, theirs
from published import grad_align as published


def of_published(made: Case, start: str = "zero", **how: Any) -> Outcome:
    x, key, ids = made.batch.x, made.key, made.batch.ids
    first = x + EPS * uniform(x, key, ids, 0) if start == "random" else x
    return theirs(published.grad_align, made, first, eps=EPS, weight=0.7, noise=EPS * uniform(x, key, ids, 1), **how)


@pytest.mark.parametrize("bn_compat", [False, True])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_grad_align(start: Any, bn_compat: bool) -> None:
    made = case()
    expected = of_published(made, start)
    mine = ours(GradAlign(EPS, weight=0.7, start=start, bn_compat=bn_compat), made)
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=bn_compat)
    assert int(mine.model.bn1.num_batches_tracked) == (3 if bn_compat else 2)


def test_g1_is_a_constant() -> None:
    made = case()
    with pytest.raises(AssertionError, match="off by"):
        assert_same(ours(GradAlign(EPS, weight=0.7), made), of_published(made, detach=False), statistics=False)


def test_samples_with_a_zero_gradient_are_dropped_from_the_mean() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    a[1] = b[3] = 0
    b.requires_grad_()
    found = misalignment(a, b)
    kept = [0, 2]
    torch.testing.assert_close(found, 1 - torch.cosine_similarity(a[kept].flatten(1), b[kept].flatten(1)).mean())
    (grad,) = torch.autograd.grad(found, b)
    assert grad.isfinite().all() and grad[[1, 3]].abs().max() == 0 and grad[kept].abs().max() > 0


def test_the_size_of_a_gradient_does_not_matter() -> None:
    """Also where its square is no number of float32."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    for size in (1e-21, 1e-30, 1e25):
        torch.testing.assert_close(misalignment(size * a, size * b), misalignment(a, b))


def test_no_sample_left_is_no_penalty() -> None:
    b = torch.randn(4, 3, 2, 2, requires_grad=True)
    found = misalignment(torch.zeros(4, 3, 2, 2), b)
    (grad,) = torch.autograd.grad(found, b)
    assert found == 0 and grad.abs().max() == 0


@pytest.mark.parametrize(
    ("eps", "weight"),
    [(2 / 255, 0.036), (4 / 255, 0.063), (8 / 255, 0.2), (12 / 255, 0.632), (16 / 255, 2.0), (0.3, 2.0)],
)
def test_the_weight_grows_with_eps_as_published(eps: float, weight: float) -> None:
    assert GradAlign(eps).effective_weight == pytest.approx(weight, rel=0.02)
    assert GradAlign(eps, weight=5.0).effective_weight == 5.0
