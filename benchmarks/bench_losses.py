"""The losses, forward and backward, against the forms people write, eager and compiled.

Bytes by the model: each tensor of logits is read once and its gradient written once, labels are read and the value per
sample is written; the loss itself and what autograd moves are not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import atlas_kernels as ak
from atlas_kernels import formulas
from harness import Call, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(128, 10), (256, 1000)]
if DEVICE.type == "cuda":
    SIZES.append((512, 32768))
BETA, NEIGHBOURS = 6.0, 2

pytestmark = pytest.mark.parametrize("size", SIZES, ids=str)


def logits(size: tuple[int, int], batches: int = 1) -> Tensor:
    return torch.randn(batches * size[0], size[1], device=DEVICE).requires_grad_()


def labels(size: tuple[int, int]) -> Tensor:
    return torch.randint(size[1], size[:1], device=DEVICE)


def kl_logs(p, q):  # type: ignore[no-untyped-def]
    return F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="batchmean", log_target=True)


def kl_softmax(p, q):  # type: ignore[no-untyped-def]
    return F.kl_div(F.log_softmax(q, 1), F.softmax(p, 1), reduction="batchmean")


def trades_plain(kl: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda z, adv, y: F.cross_entropy(z, y) + BETA * kl(z, adv)


def mart_published(z, adv, y):  # type: ignore[no-untyped-def]
    q = F.softmax(adv, 1)
    top = torch.argsort(q, dim=1)[:, -2:]
    return mart_from(z, q, adv, y, torch.where(top[:, -1] == y, top[:, -2], top[:, -1]))


def mart_topk(z, adv, y):  # type: ignore[no-untyped-def]
    q = F.softmax(adv, 1)
    top = torch.topk(q, 2, dim=1).indices
    return mart_from(z, q, adv, y, torch.where(top[:, 0] == y, top[:, 1], top[:, 0]))


def mart_from(z, q, adv, y, other):  # type: ignore[no-untyped-def]
    p = F.softmax(z, 1)
    bce = F.cross_entropy(adv, y) + F.nll_loss(torch.log(1.0001 - q + 1e-12), other)
    kl = F.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    return bce + BETA * (kl * (1.0000001 - p.gather(1, y[:, None])[:, 0])).mean()


def atlas_plain(kl: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(z, y):  # type: ignore[no-untyped-def]
        x, adv, *near = z.split(len(y))
        held = adv.detach()
        return F.cross_entropy(adv, y) + sum(kl(held, n) for n in near) / len(near) + kl(x, adv)

    return run


def with_backward(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Call:
    needing = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(loss(*inputs), needing)


def run(report, op, size, ours, contenders, *inputs) -> None:  # type: ignore[no-untyped-def]
    """Check value and gradients against the plain formula, then measure forward and backward beside the contenders."""
    torch._dynamo.reset()
    calls: dict[str, Call] = {"ours": with_backward(ours, inputs)}
    for name, form in contenders.items():
        calls[f"plain {name}"] = with_backward(form, inputs)
        calls[f"compile {name}"] = with_backward(torch.compile(form, dynamic=False), inputs)
    first = next(iter(contenders.values()))
    pairs = zip((ours(*inputs), *calls["ours"]()), (first(*inputs), *with_backward(first, inputs)()), strict=True)
    checked = all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)
    bytes_moved = sum(2 * t.nbytes if t.requires_grad else t.nbytes for t in inputs) + 4 * size[0]
    report(measure(f"{op} fwd+bwd", size, bytes_moved, calls, checked, DEVICE), calls["ours"])


def test_cross_entropy(size, report):
    forms = {"F.cross_entropy": F.cross_entropy}
    run(report, "cross_entropy", size, ak.cross_entropy, forms, logits(size), labels(size))


def test_cross_entropy_of_distributions(size, report):
    forms = {"F.cross_entropy": F.cross_entropy}
    run(report, "cross_entropy, [B, C]", size, ak.cross_entropy, forms, logits(size), logits(size).detach().softmax(1))


@pytest.mark.parametrize("distance", ["logit", "prob", "js", "kl"])
def test_consistency_loss(size, report, distance):
    ours = lambda z, other, y: ak.consistency_loss(z, other, y, distance=distance, weight=BETA)  # noqa: E731
    forms = {"functional": consistency_plain(distance, BETA)}
    run(report, f"consistency_loss {distance}", size, ours, forms, logits(size), logits(size), labels(size))


def consistency_plain(distance: str, weight: float) -> Callable[..., Tensor]:
    def apart(other, z):  # type: ignore[no-untyped-def]
        if distance == "logit":
            return z.shape[1] * F.mse_loss(z, other)
        if distance == "prob":
            return z.shape[1] * F.mse_loss(F.softmax(z, 1), F.softmax(other, 1))
        if distance == "kl":
            return kl_softmax(other, z)
        p, q = F.softmax(other, 1), F.softmax(z, 1)
        m = (0.5 * (p + q)).clamp(min=1e-30).log()
        return 0.5 * (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean"))

    return lambda z, other, y: F.cross_entropy(z, y) + weight * apart(other, z)


def test_kl_div(size, report):
    forms = {"softmax": kl_softmax, "log_target": kl_logs}
    run(report, "kl_div", size, ak.kl_div, forms, logits(size), logits(size))


def test_trades_loss(size, report):
    forms = {"softmax": trades_plain(kl_softmax), "log_target": trades_plain(kl_logs)}
    ours = lambda z, adv, y: ak.trades_loss(z, adv, y, beta=BETA)  # noqa: E731
    run(report, "trades_loss", size, ours, forms, logits(size), logits(size), labels(size))


def test_mart_loss(size, report):
    forms = {"argsort": mart_published, "topk": mart_topk}
    ours = lambda z, adv, y: ak.mart_loss(z, adv, y, beta=BETA)  # noqa: E731
    run(report, "mart_loss", size, ours, forms, logits(size), logits(size), labels(size))


def test_atlas_loss(size, report):
    forms = {"softmax": atlas_plain(kl_softmax), "log_target": atlas_plain(kl_logs)}
    joint = logits(size, 2 + NEIGHBOURS)
    run(report, f"atlas_loss n={NEIGHBOURS}", size, ak.atlas_loss, forms, joint, labels(size))


def test_dlr_loss(size, report):
    forms = {"sort": lambda z, y: formulas.dlr_loss(z, y).mean(), "topk": dlr_topk}
    run(report, "dlr_loss", size, ak.dlr_loss, forms, logits(size), labels(size))


def dlr_topk(z, y):  # type: ignore[no-untyped-def]
    top, classes = torch.topk(z, 3, dim=1)
    other = torch.where(classes[:, 0] == y, top[:, 1], top[:, 0])
    return (-(z.gather(1, y[:, None])[:, 0] - other) / (top[:, 0] - top[:, 2] + 1e-12)).mean()
