"""CURE does what its published code does: loss, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from atlas_train.methods import CURE, State
from atlas_train.methods.cure import direction
from beside_published import EPS, assert_same, case, ours, theirs
from published import cure as published


@pytest.mark.parametrize("form", ["code", "paper"])
def test_cure(form: Any) -> None:
    made = case()
    expected = theirs(published.cure, made, None, h=0.4, weight=1.5, square=form == "paper")
    mine = ours(CURE(EPS, h=0.4, weight=1.5, form=form, grow=False), made)
    assert_same(mine, expected, statistics=True)
    assert int(mine.model.bn1.num_batches_tracked) == 1


def test_the_penalty_of_the_code_is_a_norm_and_that_of_the_paper_its_square() -> None:
    made = case(size=1)
    made.model.bn1.eval()
    made.model.bn2.eval()
    norm, square = (
        CURE(EPS, form=form, grow=False).loss(copy.deepcopy(made.model), made.batch, made.key)[1]["curvature"]
        for form in ("code", "paper")
    )
    assert norm > 1e-3 and abs(norm - 1) > 0.01
    torch.testing.assert_close(norm**2, square)


def test_h_grows_over_four_epochs_as_published() -> None:
    def lengths(method: CURE) -> list[float]:
        made = case()
        return [method.prepare(made.model, made.batch, made.key, State(epoch=epoch)) for epoch in range(6)]

    assert lengths(CURE(EPS, h=3.0)) == pytest.approx([0.1, 0.4, 0.8, 1.8, 3.0, 3.0])
    assert lengths(CURE(EPS, h=3.0, grow=False)) == [3.0] * 6


def test_z_has_length_h_and_is_h_in_every_pixel_where_the_gradient_is_zero() -> None:
    grad = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    grad[0, 0, 0] = 0
    grad[2] = 0
    z = direction(grad, 0.5)
    torch.testing.assert_close(z[:2].flatten(1).norm(dim=1), torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(z[1].sign(), grad[1].sign())
    torch.testing.assert_close(z[2], torch.full_like(z[2], 0.5))


def test_modes_are_put_back() -> None:
    made = case()
    made.model.train()
    made.model.bn2.eval()
    CURE(EPS).loss(made.model, made.batch, made.key)
    assert made.model.training and made.model.bn1.training and not made.model.bn2.training
