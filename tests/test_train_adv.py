"""ADV and one-step ADV do what their published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import pytest

from atlas_train.methods import ADV, OneStepADV
from beside_published import EPS, assert_same, case, close, ours, theirs
from published import adv as published


@pytest.mark.parametrize("bn_compat", [False, True])
def test_adv(bn_compat: bool) -> None:
    made = case()
    method = ADV(EPS, steps=4, step_size=EPS / 3, bn_compat=bn_compat)
    expected = theirs(published.adv, made, made.start(), eps=EPS, step_size=EPS / 3, steps=4)
    mine = ours(method, made)
    close(mine.images[-1], expected.images[-2], "x'")
    assert_same(mine, expected, statistics=bn_compat)


@pytest.mark.parametrize("bn_compat", [False, True])
def test_one_step_adv(bn_compat: bool) -> None:
    made = case()
    expected = theirs(published.one_step_adv, made, made.start(), eps=EPS, step_size=1.25 * EPS)
    mine = ours(OneStepADV(EPS, bn_compat=bn_compat), made)
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=bn_compat)
