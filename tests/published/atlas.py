"""ATLAS as OUR documentation has it, in plain PyTorch.

This states our instance of the framework, not the paper: no closed form of the paper's terms is known to us.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def atlas(
    model, x, y, start, optimizer, *, eps, step_size, steps, bn, global_term, global_weight, local, local_weight,
    radius, local_objective="kl", project=False, directions=None, rivals=1, noise=(), shares=(),
):  # fmt: skip
    """``directions`` [m, B, C]: the random unit vectors of jacobian. ``noise`` [m, B, ...]: that of neighbours, in
    [-1, 1]. ``shares`` [m, B]: of the way from x' back to x, those of segment. Returns (x', loss)."""

    def climb(at):
        at = at.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)
        return grad.sign()

    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adv = start.detach()
    for _ in range(steps):
        adv = torch.clamp(adv + step_size * climb(adv), x - eps, x + eps).clamp(0, 1)
    near = []
    if local == "worst":
        worst = adv + radius * climb(adv)
        if project:
            worst = torch.clamp(worst, x - eps, x + eps)
        near = [worst.clamp(0, 1)]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])  # an attack leaves no trace

    if local == "neighbours":
        near = [(adv + radius * u).clamp(0, 1) for u in noise]
    if local == "segment":
        near = [on_segment(adv, x, t) for t in shares]
    adv.requires_grad_(not near)
    parts = [*([x] if global_term != "none" else []), adv, *near]
    logits = list(model(torch.cat(parts)).split(len(x))) if bn == "joint" else [model(part) for part in parts]
    z_x = logits.pop(0) if global_term != "none" else None
    z = logits[0]

    loss = F.cross_entropy(z, y)
    if global_term == "kl":
        loss = loss + global_weight * kl(z_x, z)
    elif global_term == "ce":
        loss = loss + global_weight * F.cross_entropy(z_x, y)
    elif global_term == "logit":
        loss = loss + global_weight * ((z_x - z) ** 2).sum(1).mean()

    if near:
        term = {
            "kl": lambda z_near: kl(z.detach(), z_near),
            "ce": lambda z_near: F.cross_entropy(z_near, y),
            "logit": lambda z_near: ((z_near - z) ** 2).sum(1).mean(),
        }[local_objective]
        term = sum(term(z_near) for z_near in logits[1:]) / len(near)
    elif local == "jacobian":
        term = 0.0
        for v in directions:
            (grad,) = torch.autograd.grad((z * v).sum(), adv, create_graph=True)
            term = term + z.shape[1] / 2 * (grad**2).sum((1, 2, 3)).mean() / len(directions)
    elif local == "margin":
        j = (z - 1e9 * F.one_hot(y, z.shape[1])).argmax(1)
        term = (radius * margin_and_slope(z, adv, y, j)[1]).mean()
    else:
        ranked = (z - 1e9 * F.one_hot(y, z.shape[1])).argsort(1, descending=True)[:, :rivals]
        rhos = [(m.clamp(min=0) / slope) for m, slope in (margin_and_slope(z, adv, y, j) for j in ranked.T)]
        j = ranked[torch.arange(len(y)), torch.stack(rhos, 1).argmin(1)]
        m, slope = margin_and_slope(z, adv, y, j)
        term = torch.log1p(torch.exp(1 - m.clamp(min=0) / slope / radius)).mean()
    loss = loss + local_weight * term

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return adv.detach(), loss.detach()


def atlas_start(
    model, x, y, start, optimizer, *, eps, step_size, local_objective, local_weight, global_term="none",
    global_weight=1.0, steps=1, smoothing=0.0, ball=None, segment_weight=0.0, segment_objective="ce", shares=(),
    iterates="first", keep="first",
):  # fmt: skip
    """local="start": one forward at the start, for attack and loss. ``ball``: of x'; None: eps. ``shares`` [1, B]: of
    the way from x' to x, that of the further point. ``iterates``: that LOCAL is of; ``keep``: those of them that the
    training forward sees and the gradient reaches. Returns (x', loss)."""

    def ce(logits):
        return F.cross_entropy(logits, y, label_smoothing=smoothing)

    model.train()
    ball = eps if ball is None else ball
    adv, points = start.detach(), []
    for step in range(steps):
        kept = keep == "all" and (iterates == "all" or not step) or keep == "first" and not step
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        at = adv.detach().requires_grad_()
        z_at = model(at)
        (grad,) = torch.autograd.grad(ce(z_at), at, retain_graph=True)
        adv = torch.clamp(adv + step_size * grad.sign(), x - ball, x + ball).clamp(0, 1)
        if not kept:
            for name, buffer in model.named_buffers():
                buffer.data.copy_(before[name])  # an attack leaves no trace
        if iterates == "all" or not step:
            points.append(z_at if kept else z_at.detach())
    z = model(adv.detach())

    def local(z_start):
        p, q = z_start.softmax(1), z.softmax(1)
        m = (p + q) / 2
        return {
            "kl": (p * (p.log() - q.log())).sum(1),
            "js": ((p * (p.log() - m.log())).sum(1) + (q * (q.log() - m.log())).sum(1)) / 2,
            "logit": ((z_start - z) ** 2).sum(1),
            "prob": ((p - q) ** 2).sum(1),
        }[local_objective].mean()

    loss = ce(z) + local_weight * sum(local(z_at) for z_at in points) / len(points)

    def tied(kind, z_other):
        return {"kl": kl(z_other, z), "ce": ce(z_other), "logit": ((z_other - z) ** 2).sum(1).mean()}[kind]

    if segment_weight:
        loss = loss + segment_weight * tied(segment_objective, model(on_segment(adv.detach(), x, shares[0])))
    if global_term != "none":
        loss = loss + global_weight * tied(global_term, model(x))

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return adv.detach(), loss.detach()


def on_segment(adv, x, t):
    return (1 - t[:, None, None, None]) * adv + t[:, None, None, None] * x


def kl(a, b):
    return (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1).mean()


def margin_and_slope(z, x, y, j):
    """z_y - z_j and the l_1 norm of its gradient; the gradient is that of the batch's sum."""
    margin = z[torch.arange(len(y)), y] - z[torch.arange(len(y)), j]
    (grad,) = torch.autograd.grad(margin.sum(), x, create_graph=True)
    return margin, grad.abs().sum((1, 2, 3))
