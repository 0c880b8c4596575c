"""MART as the authors' mart.py has it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def mart(model, x, y, start, optimizer, *, eps, step_size, steps, beta):
    """Returns (x', loss)."""
    model.eval()
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    logits_adv = model(x_adv)
    adv_probs = F.softmax(logits_adv, dim=1)
    top, second = adv_probs.sort(dim=1, descending=True).indices[:, :2].unbind(1)
    wrong = torch.where(top == y, second, top)
    loss_adv = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), wrong)
    nat_probs = F.softmax(logits, dim=1)
    true_probs = nat_probs[torch.arange(len(y)), y]
    kl = torch.nn.KLDivLoss(reduction="none")(torch.log(adv_probs + 1e-12), nat_probs).sum(dim=1)
    loss_robust = (1.0 / len(x)) * torch.sum(kl * (1.0000001 - true_probs))
    loss = loss_adv + beta * loss_robust
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
