"""The nuclear norm, forward and backward, against PyTorch's, and the plain ways around its SVD.

Bytes by the model: the matrix read, the gradient written. They bound nothing here: "floor" among the contenders is the
time of the fewest multiply-adds that orthogonalise the shorter side's vectors once (their products, and one turn of
each pair), at the rate of this machine's float64 products, measured in the same run. Sizes: NuAT's, then more classes.
"""

from __future__ import annotations

import pytest
import torch

import atlas_kernels as ak
from harness import Call, interleaved, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(64, 10), (128, 10), (128, 20), (128, 100), (128, 200)]

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def by_torch(d):  # type: ignore[no-untyped-def]
    return torch.linalg.matrix_norm(d, ord="nuc")


def by_eigenvalues(d):  # type: ignore[no-untyped-def]
    """Of the squares: cheaper, but of small singular values half of the digits are lost, and at 0 the slope is NaN."""
    tall = d if d.shape[0] >= d.shape[1] else d.T
    return torch.linalg.eigvalsh(tall.T @ tall).sqrt().sum()


FORMS = {"matrix_norm": by_torch, "eigvalsh": by_eigenvalues}


def forward_backward(norm, d) -> Call:  # type: ignore[no-untyped-def]
    def run() -> torch.Tensor:
        (grad,) = torch.autograd.grad(norm(d), d)
        return grad

    return run


def multiply_adds_per_second() -> float:
    a = torch.rand(512, 512, device=DEVICE, dtype=torch.float64)
    return 512**3 / interleaved({"product": lambda: a @ a}, DEVICE)["product"]


def test_nuclear_norm(size, report):
    d = torch.randn(size, device=DEVICE, requires_grad=True)
    ours = forward_backward(ak.nuclear_norm, d)
    calls: dict[str, Call] = {"ours": ours}
    calls |= {f"plain {name}": forward_backward(form, d) for name, form in FORMS.items()}
    expected = forward_backward(by_torch, d.detach().double().requires_grad_())()
    checked = bool((ours() - expected).abs().max() <= 1e-6)
    row = measure("nuclear_norm", size, 4 * 2 * d.numel(), calls, checked, DEVICE)
    short, long = sorted(size)
    row.times["floor"] = (short * short * long + 2 * short * short * (long + short)) / multiply_adds_per_second()
    report(row, ours)
