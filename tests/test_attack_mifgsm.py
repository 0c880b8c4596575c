"""MI-FGSM against its paper, and against torchattacks where both do the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.attacks import MIFGSM, PGD
from atlas_kernels.compat import torchattacks as drop_ins
from published.mifgsm import mifgsm

EPS = 8 / 255


@pytest.fixture
def case(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Images far enough from the ends of their range, which the paper does not clip to."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5)).double().to(device)
    x = 0.2 + 0.6 * torch.rand(6, 3, 4, 4, generator=g, dtype=torch.float64)
    return model, x.to(device), torch.randint(5, (6,), generator=g).to(device)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 0.1)])
@pytest.mark.parametrize("decay", [0.0, 0.4, 1.0])
def test_the_published_attack(case, norm: str, eps: float, targeted: bool, decay: float) -> None:
    model, x, y = case
    adv = MIFGSM(eps, steps=7, norm=norm, targeted=targeted, decay=decay)(model, x, y)
    expected = mifgsm(model, x, y, eps=eps, steps=7, mu=decay, norm=norm, targeted=targeted)
    assert (adv - expected).abs().max() <= 1e-9 and (adv - x).abs().max() > eps / 10


def test_without_memory_it_is_pgd_from_x(case) -> None:
    model, x, y = case
    pgd = PGD(EPS, EPS / 5, 5, random_start=False)(model, x, y)
    assert torch.equal(MIFGSM(EPS, steps=5, decay=0.0)(model, x, y), pgd)
    assert not torch.equal(MIFGSM(EPS, steps=5)(model, x, y), pgd)


def test_torchattacks_and_its_drop_in_are_the_same_attack(case) -> None:
    theirs = pytest.importorskip("torchattacks", exc_type=ImportError)
    model, x, y = case
    adv = MIFGSM(EPS, 0.01, 5, decay=0.7)(model, x, y)
    assert torch.equal(drop_ins.MIFGSM(model, EPS, 0.01, 5, 0.7)(x, y), adv)
    assert (theirs.MIFGSM(model, EPS, 0.01, 5, 0.7)(x, y) - adv).abs().max() <= 1e-9


def test_a_nearly_certain_prediction_moves_too(case) -> None:
    """Its gradient is 0 in float32: in the attack it is not, and only its direction counts."""
    model, x, y = case
    model = nn.Sequential(model, nn.Linear(5, 5, dtype=torch.float64, device=x.device)).float()
    x = x.float()
    with torch.no_grad():
        model[1].weight.copy_(300 * torch.eye(5))
        y = model(x).argmax(1)
    moved = (MIFGSM(EPS, steps=3)(model, x, y) - x).flatten(1).abs().amax(1)
    assert moved.min() > EPS / 2


def test_16_bit_images_have_momentum_of_32(case) -> None:
    model, x, y = case
    x, attack = x.bfloat16(), MIFGSM(EPS, steps=2)
    batch = attack.batch(x, y)
    grads = [torch.full_like(x, value) for value in (1.0, -1.0 - 2**-7)]  # of equal size once they are scaled
    _, carried = attack.step(batch, x, grads[0], None, 1.0)
    _, carried = attack.step(batch, x, grads[1], 1.001 * carried, 0.0)
    assert carried.dtype == torch.float32 and (carried > 0).all()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"decay": -0.1}, "decay must be a number >= 0, got -0.1"),
        ({"decay": float("nan")}, "decay must be"),
        ({"norm": "l1"}, "norm must be one of 'linf', 'l2', got 'l1'"),
        ({"steps": -1}, "steps must be"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIFGSM(EPS, **wrong)
    assert replace(MIFGSM(EPS), decay=0.5).decay == 0.5
