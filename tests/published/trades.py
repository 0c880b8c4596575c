"""TRADES as the authors' trades.py has it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def trades(model, x, y, start, optimizer, *, eps, step_size, steps, beta):
    """Returns (x', loss)."""
    kl_sum = torch.nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_()
        loss_kl = kl_sum(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
        (grad,) = torch.autograd.grad(loss_kl, [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    model.train()
    x_adv = torch.clamp(x_adv, 0.0, 1.0)
    optimizer.zero_grad()
    loss_natural = F.cross_entropy(model(x), y)
    loss_robust = (1.0 / len(x)) * kl_sum(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
    loss = loss_natural + beta * loss_robust
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
