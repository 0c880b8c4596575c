"""attack_cotangent against the loss graph that it replaces: the gradient of the mean loss with respect to the logits.

Bytes by the model: logits (and reference) are read once, the cotangent is written once, labels are read.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import atlas_kernels as ak
from harness import Call, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(1, 10), (128, 10), (256, 1000)]

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def graph(loss, z, *rest) -> Call:  # type: ignore[no-untyped-def]
    def call():  # type: ignore[no-untyped-def]
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, *rest), leaf)[0]

    return call


def margin_topk(z, y):  # type: ignore[no-untyped-def]
    top, classes = torch.topk(z, 2, dim=1)
    return (torch.where(classes[:, 0] == y, top[:, 1], top[:, 0]) - z.gather(1, y[:, None])[:, 0]).mean()


def closed_ce(z, y):  # type: ignore[no-untyped-def]
    p = z.softmax(1)
    return p.scatter_add_(1, y[:, None], torch.full_like(z[:, :1], -1.0))


def run(report, op, size, ours, graphs, closed, bytes_moved, z, *rest) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    calls: dict[str, Call] = {"ours": ours}
    for name, loss in graphs.items():
        calls[f"plain graph {name}"] = graph(loss, z, *rest)
        calls[f"compile graph {name}"] = graph(torch.compile(loss, dynamic=False), z, *rest)
    for name, form in closed.items():
        compiled = torch.compile(form, dynamic=False)
        calls[f"plain {name}"] = lambda form=form: form(z, *rest)
        calls[f"compile {name}"] = lambda compiled=compiled: compiled(z, *rest)
    expected = graph(next(iter(graphs.values())), z, *rest)() * len(z)
    checked = torch.allclose(ours().cotangent, expected, rtol=1e-3, atol=1e-6)
    report(measure(op, size, bytes_moved, calls, checked, DEVICE), ours)


def inputs(size):  # type: ignore[no-untyped-def]
    return torch.randn(size, device=DEVICE), torch.randint(size[1], size[:1], device=DEVICE)


def test_cross_entropy(size, report):
    z, y = inputs(size)
    graphs = {"F.cross_entropy": F.cross_entropy, "nll": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y)}
    closed = {"p - onehot": closed_ce}
    run(report, "ce", size, lambda: ak.attack_cotangent(z, y), graphs, closed, 2 * z.nbytes + y.nbytes, z, y)


def test_kl(size, report):
    z, _ = inputs(size)
    reference = torch.randn_like(z)
    graphs = {"F.kl_div": lambda z, r: F.kl_div(F.log_softmax(z, 1), F.softmax(r, 1), reduction="batchmean")}
    closed = {"p - q": lambda z, r: z.softmax(1).sub_(r.softmax(1))}
    ours = lambda: ak.attack_cotangent(z, objective="kl", reference=reference)  # noqa: E731
    run(report, "kl", size, ours, graphs, closed, 3 * z.nbytes, z, reference)


def test_margin(size, report):
    z, y = inputs(size)
    ours = lambda: ak.attack_cotangent(z, y, objective="margin")  # noqa: E731
    run(report, "margin", size, ours, {"topk": margin_topk}, {}, 2 * z.nbytes + y.nbytes, z, y)


def test_cross_entropy_with_the_count(size, report):
    """GAIRAT's attack step: cotangent, correct-now mask and kappa."""
    z, y = inputs(size)
    kappa, plain_kappa = torch.zeros_like(y), torch.zeros_like(y)

    def counted(z, y):  # type: ignore[no-untyped-def]
        plain_kappa.add_(z.detach().argmax(1) == y)
        return F.cross_entropy(z, y)

    ours = lambda: ak.attack_cotangent(z, y, kappa=kappa)  # noqa: E731
    run(report, "ce, kappa", size, ours, {"argmax": counted}, {}, 2 * z.nbytes + 3 * y.nbytes, z, y)
