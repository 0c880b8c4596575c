"""Adversary divergence reduction: the losses of the authors' train_compact.py and compact_loss.py, in PyTorch.

Both of the authors' PyTorch versions (ADR_pt, and the one in ASCL that runs) go on to two forwards for a log: ``log``.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def adr(
    model, x, y, start, optimizer, *, eps, step_size, steps, form="adv", attack_in_train_mode=False, beta=6.0,
    alpha_nat=0.5, alpha_adv=0.5, lc=1.0, gc=1.0, conf=1.0, vat=1.0, gs=0.0, log=False,
):  # fmt: skip
    """Returns (x', loss). log: in train mode, so running statistics see them, after every update."""
    model.train(attack_in_train_mode)
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_()
        if form == "adv":
            goal = F.cross_entropy(model(x_adv), y)
        else:
            goal = F.kl_div(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1), reduction="sum")
        (grad,) = torch.autograd.grad(goal, [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    model.train()
    optimizer.zero_grad()
    h, h_adv = model.features(x).flatten(1), model.features(x_adv).flatten(1)
    z, z_adv = model.head(h), model.head(h_adv)
    if form == "adv":
        loss = alpha_nat * F.cross_entropy(z, y) + alpha_adv * F.cross_entropy(z_adv, y)
    else:
        kl = F.kl_div(F.log_softmax(z_adv, dim=1), F.softmax(z, dim=1), reduction="batchmean")
        loss = F.cross_entropy(z, y) + beta * kl
    terms = regularisers(h.detach(), h_adv, z.detach(), z_adv, y)
    for weight, term in zip((lc, gc, conf, vat, gs), terms, strict=True):
        loss = loss + weight * term
    loss.backward()
    optimizer.step()
    for images in (x, x_adv) if log else ():
        (model(images).argmax(dim=1) == y).float().mean()
    return x_adv, loss.detach()


def regularisers(h, h_adv, z, z_adv, y):
    """Local and global compactness, confidence, VAT, global smoothness."""
    p, log_q = F.softmax(z, dim=1), F.log_softmax(z_adv, dim=1)
    w = 1 - (y[:, None] != y[None, :]).to(h.dtype) / 0.99
    return (
        (h - h_adv).abs().mean(1).mean(),
        (w * (h[None, :, :] - h_adv[:, None, :]).abs().mean(2)).sum() / len(y) ** 2,
        -(log_q.exp() * log_q).sum(1).mean(),
        -(p * log_q).sum(1).mean(),
        -(w * (p[None, :, :] * log_q[:, None, :]).sum(2)).sum() / len(y) ** 2,
    )
