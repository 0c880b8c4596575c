"""TRADES does what its published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import pytest
import torch

from atlas_train.methods import TRADES
from atlas_train.methods.terms import near_start
from beside_published import EPS, assert_same, case, close, ours, theirs
from published import trades as published


@pytest.mark.parametrize("bn_compat", [False, True])
def test_trades(bn_compat: bool) -> None:
    made = case()
    start = near_start(made.batch, made.key)
    assert (start < 0).any() and (start > 1).any()  # not clipped
    how = {"eps": EPS, "step_size": EPS / 3, "steps": 4, "beta": 6.0}
    expected = theirs(published.trades, made, start, **how)
    mine = ours(TRADES(**how, bn_compat=bn_compat), made)
    close(mine.images[1], expected.images[1], "x'")
    assert_same(mine, expected, statistics=bn_compat)
    assert int(mine.model.bn1.num_batches_tracked) == (3 if bn_compat else 2)


def test_trades_start_is_normal_noise_of_a_thousandth() -> None:
    made = case(size=64)
    noise = (near_start(made.batch, made.key) - made.batch.x) / 0.001
    assert (
        abs(noise.mean()) < 0.05
        and abs(noise.std() - 1) < 0.05
        and abs((noise.abs() < 1).double().mean() - 0.683) < 0.02
    )
    assert torch.equal(near_start(made.batch, made.key), near_start(made.batch, made.key))
