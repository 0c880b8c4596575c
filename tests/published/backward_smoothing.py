"""Backward Smoothing as the authors' trades_backward.py has it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def backward_smoothing(model, x, y, psi, optimizer, *, eps, step_size, steps, beta, gamma):
    """``psi``: the noise on the logits; returns (x', loss)."""
    kl_sum = torch.nn.KLDivLoss(reduction="sum")
    model.eval()
    logits = model(x).detach()
    target = F.softmax(logits + gamma * psi, dim=1)
    x_adv = x.clone()
    for step in range(1 + steps):
        x_adv.requires_grad_()
        log_probs = F.log_softmax(model(x_adv), dim=1)
        loss_kl = -kl_sum(log_probs, target) if step == 0 else kl_sum(log_probs, F.softmax(logits, dim=1))
        (grad,) = torch.autograd.grad(loss_kl, [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    model.train()
    optimizer.zero_grad()
    clean, adv = model(x), model(x_adv)
    loss_robust = (1.0 / len(x)) * kl_sum(F.log_softmax(adv, dim=1), F.softmax(clean, dim=1))
    loss = F.cross_entropy(clean, y) + beta * loss_robust
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
