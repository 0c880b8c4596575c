"""Compactness over all pairs, forward and backward, against the forms people write, eager and compiled.

Bytes by the model: both batches of features read, the gradient written. What bounds the operator is arithmetic, though:
"floor" among the contenders is the time of the fewest operations that give a distance and its sign (subtract,
accumulate, compare, count) at the rate of this machine's multiply-adds, measured by a matrix product in the same run.
"""

from __future__ import annotations

import pytest
import torch

import atlas_kernels as ak
from harness import Call, interleaved, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(128, 64), (128, 512), (256, 640), (128, 1024)]
OPERATIONS, SCALE = 4, 0.99

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def weights(labels: torch.Tensor) -> torch.Tensor:
    return torch.where(labels[:, None] == labels[None], 1.0, 1 - 1 / SCALE)


def l1_broadcast(h, h_adv, labels):  # type: ignore[no-untyped-def]
    return (weights(labels) * (h[None] - h_adv[:, None]).abs().mean(-1)).mean()


def l1_cdist(h, h_adv, labels):  # type: ignore[no-untyped-def]
    return (weights(labels) * torch.cdist(h_adv, h, p=1.0)).mean() / h.shape[1]


def squared_broadcast(h, h_adv, labels):  # type: ignore[no-untyped-def]
    return (weights(labels) * (h[None] - h_adv[:, None]).square().mean(-1)).mean()


def squared_matmul(h, h_adv, labels):  # type: ignore[no-untyped-def]
    distances = h_adv.square().sum(1)[:, None] + h.square().sum(1)[None] - 2 * h_adv @ h.T
    return (weights(labels) * distances).mean() / h.shape[1]


FORMS = {
    "l1": {"broadcast": l1_broadcast, "cdist": l1_cdist},
    "squared": {"broadcast": squared_broadcast, "matmul": squared_matmul},
}


def forward_backward(loss, h, h_adv, labels) -> Call:  # type: ignore[no-untyped-def]
    def run() -> torch.Tensor:
        (grad,) = torch.autograd.grad(loss(h, h_adv, labels), h_adv)
        return grad

    return run


def multiply_adds_per_second() -> float:
    a, b = torch.rand(1024, 1024, device=DEVICE), torch.rand(1024, 1024, device=DEVICE)
    return 1024**3 / interleaved({"product": lambda: a @ b}, DEVICE)["product"]


@pytest.mark.parametrize("distance", list(FORMS))
def test_compactness(size, distance, report):
    torch._dynamo.reset()
    batch, features = size
    h, h_adv = torch.randn(size, device=DEVICE).relu(), torch.randn(size, device=DEVICE).relu().requires_grad_()
    labels = torch.randint(10, (batch,), device=DEVICE)

    def compactness(h, h_adv, labels):  # type: ignore[no-untyped-def]
        return ak.compactness(h, h_adv, labels, scale=SCALE, distance=distance)

    ours = forward_backward(compactness, h, h_adv, labels)
    calls: dict[str, Call] = {"ours": ours}
    for name, form in FORMS[distance].items():
        calls[f"plain {name}"] = forward_backward(form, h, h_adv, labels)
        calls[f"compile {name}"] = forward_backward(torch.compile(form, dynamic=False), h, h_adv, labels)
    wide = h_adv.detach().double().requires_grad_()
    expected = forward_backward(FORMS[distance]["broadcast"], h.double(), wide, labels)()
    checked = bool((ours() - expected).abs().max() <= 1e-5 * expected.abs().max())
    row = measure(f"compactness {distance}", size, 4 * 3 * batch * features, calls, checked, DEVICE)
    row.times["floor"] = OPERATIONS * batch * batch * features / multiply_adds_per_second()
    report(row, ours)
