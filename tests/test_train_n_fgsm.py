"""N-FGSM does what its published code does: loss, adversary, gradients and BatchNorm, to 1e-9."""

from __future__ import annotations

import pytest
import torch

from atlas_train.methods import ATLAS, NFGSM, OneStepADV, State
from beside_published import EPS, assert_same, case, close, ours, theirs
from published import n_fgsm as published


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("bn_compat", [False, True])
def test_n_fgsm(bn_compat: bool, project: bool) -> None:
    made = case()
    how = {"eps": EPS, "step_size": 0.8 * EPS, "project": project}
    expected = theirs(published.n_fgsm, made, made.start(3 * EPS), **how)
    mine = ours(NFGSM(**how, noise_magnitude=3.0, bn_compat=bn_compat), made)
    close(mine.images[-1], expected.images[-1], "x'")
    assert_same(mine, expected, statistics=bn_compat)
    assert int(mine.model.bn1.num_batches_tracked) == (2 if bn_compat else 1)


def perturbation(method: NFGSM) -> torch.Tensor:
    """Of images that the image range does not bind."""
    made = case(size=64)
    batch = made.batch._replace(x=0.35 + 0.3 * made.batch.x)
    return method.prepare(made.model.train(), batch, made.key, State()) - batch.x


def test_the_perturbation_reaches_three_eps() -> None:
    size = perturbation(NFGSM(EPS)).abs()
    assert 2.95 * EPS < size.max() <= 3 * EPS + 1e-12
    assert abs((size > EPS).double().mean() - 0.5) < 0.03  # where the step goes the way of the noise
    assert perturbation(NFGSM(EPS, project=True)).abs().max() <= EPS + 1e-12


def test_without_noise_it_is_fgsm_from_the_image() -> None:
    size = perturbation(NFGSM(EPS, noise_magnitude=0)).abs()
    assert ((size - EPS).abs() < 1e-12).double().mean() > 0.99
    # A radius of noise and step that would not fit into the range is no error.
    assert perturbation(NFGSM(0.5, noise_magnitude=4)).abs().max() <= 1


@pytest.mark.parametrize("noise", [2.0, 0.5])
def test_one_step_adv_and_atlas_can_start_from_the_same_noise(noise: float) -> None:
    """The three methods have the same adversaries, to the bit. ATLAS without its terms has the same loss, too."""
    made = case()
    mine = ours(NFGSM(EPS, noise_magnitude=noise), made)
    for method in (
        OneStepADV(EPS, wide_start=noise),
        ATLAS(EPS, wide_start=noise, local="none", global_term="none"),
    ):
        other = ours(method, made)
        assert method.in_use()["step_size"] == EPS
        assert torch.equal(other.images[-1], mine.images[-1]) and torch.equal(other.loss, mine.loss)
        assert all(map(torch.equal, other.grads[0], mine.grads[0]))
    for local in ("neighbours", "worst"):
        x, adv, point = ours(ATLAS(EPS, wide_start=noise, local=local), made).images[-1].chunk(3)
        assert torch.equal(adv, mine.images[-1]) and torch.equal(x, made.batch.x)
        assert 0.9 * EPS / 2 < (point - adv).abs().max() <= EPS / 2 + 1e-12
    assert not torch.equal(ours(OneStepADV(EPS), made).images[-1], mine.images[-1])


def test_a_wide_start_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="atlas: wide_start is of one step in l_inf, got steps=2"):
        ATLAS(EPS, wide_start=2, steps=2)
    with pytest.raises(ValueError, match="atlas: project keeps points in the ball, and wide_start leaves it"):
        ATLAS(EPS, wide_start=2, project=True)
    with pytest.raises(ValueError, match="one_step_adv: wide_start is of one step in l_inf, got norm='l2'"):
        OneStepADV(EPS, wide_start=2, norm="l2")
