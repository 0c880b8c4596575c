"""GAIRAT as the authors' GAIRAT.py and GAIR.py have it, and the same weights on TRADES, which is not published."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def attack(model, x, y, start, *, eps, step_size, steps, loss_of):
    """PGD in eval mode that counts, sample by sample, the iterates before a step that are right: (x', kappa)."""
    model.eval()
    kappa = torch.zeros(len(x), dtype=x.dtype)  # on the CPU, wherever x is
    x_adv = start.detach().clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        output = model(x_adv)
        predict = output.max(1)[1]
        for p in range(len(x)):
            if predict[p] == y[p]:
                kappa[p] += 1
        model.zero_grad()
        loss_of(output).backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv, kappa.to(x.device)


def normalised_weights(kappa, steps, lam, kind):
    half = int(steps / 2)
    if kind == "tanh":
        reweight = ((lam + (half - kappa) * 5 / half).tanh() + 1) / 2
    elif kind == "sigmoid":
        reweight = (lam + (half - kappa) * 5 / half).sigmoid()
    else:
        reweight = ((steps + 1) - kappa) / (steps + 1)
    return reweight * len(reweight) / reweight.sum()


def gairat(model, x, y, start, optimizer, *, eps, step_size, steps, lam, kind, begun):
    """``begun``: whether epoch + 1 has reached begin_epoch. Returns (x', loss)."""
    how = {"eps": eps, "step_size": step_size, "steps": steps}
    x_adv, kappa = attack(model, x, y, start, **how, loss_of=lambda output: F.cross_entropy(output, y))
    model.train()
    optimizer.zero_grad()
    logits = model(x_adv)
    if begun:
        loss = F.cross_entropy(logits, y, reduction="none")
        loss = loss.mul(normalised_weights(kappa, steps, lam, kind)).mean()
    else:
        loss = F.cross_entropy(logits, y, reduction="mean")
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()


def gairat_trades(model, x, y, start, optimizer, *, eps, step_size, steps, lam, kind, begun, beta):
    model.eval()
    clean = F.softmax(model(x), dim=1).detach()
    how = {"eps": eps, "step_size": step_size, "steps": steps}
    x_adv, kappa = attack(
        model, x, y, start, **how, loss_of=lambda z: F.kl_div(F.log_softmax(z, dim=1), clean, reduction="sum")
    )
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    kl = F.kl_div(F.log_softmax(model(x_adv), dim=1), F.softmax(logits, dim=1), reduction="none").sum(1)
    weights = normalised_weights(kappa, steps, lam, kind) if begun else torch.ones_like(kappa)
    loss = F.cross_entropy(logits, y) + beta * (weights * kl).mean()
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
