"""Jacobian regularisation does what its published code does: loss, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels import noise_key
from atlas_train.methods import Jacobian
from atlas_train.noise import normal
from beside_published import CLASSES, EPS, Case, assert_same, case, ours, theirs
from published import jacobian as published


def draws(made: Case, count: int) -> list[torch.Tensor]:
    like = made.batch.x.new_empty(len(made.batch.x), count, CLASSES)
    return list(normal(like, made.key, made.batch.ids, 1).unbind(1))


@pytest.mark.parametrize("count", [1, 3, -1])
def test_jacobian(count: int) -> None:
    made = case()
    vectors = None if count < 0 else draws(made, count)
    expected = theirs(published.jacobian, made, None, weight=0.7, vectors=vectors)
    mine = ours(Jacobian(EPS, weight=0.7, projections=count), made)
    assert_same(mine, expected, statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 1


def test_with_the_basis_vectors_it_is_half_the_squared_frobenius_norm() -> None:
    made = case(size=4)
    model, x = made.model.eval(), made.batch.x
    _, metrics = Jacobian(EPS, projections=-1).loss(model, made.batch, made.key)
    rows = [torch.autograd.functional.jacobian(lambda one: model(one[None])[0], image) for image in x]
    torch.testing.assert_close(metrics["jacobian"], sum(j.square().sum() for j in rows) / 2 / len(x))


def test_the_estimate_is_unbiased() -> None:
    made = case(size=4)
    made.model.eval()
    exact = Jacobian(EPS, projections=-1).loss(made.model, made.batch, made.key)[1]["jacobian"]
    keys = [noise_key(generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    many = torch.stack([Jacobian(EPS, projections=20).loss(made.model, made.batch, k)[1]["jacobian"] for k in keys])
    error = many.std() / len(keys) ** 0.5
    assert abs(many.mean() - exact) < 4 * error and error < 0.05 * exact


def test_no_projections_are_refused() -> None:
    with pytest.raises(ValueError, match="projections must be an integer >= 1, or -1 for the exact norm, got 0"):
        Jacobian(EPS, projections=0)
