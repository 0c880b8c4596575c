"""ADV as Rice, Wong & Kolter's train_cifar.py (robust_overfitting) and Wong, Rice & Kolter's train_pgd.py
(fast_adversarial) have it, one-step ADV as the latter's train_fgsm.py, and training without an attack.

All of their attacks call ``backward``, so they also make the gradients of the weights, which the update then discards.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def adv(model, x, y, start, optimizer, *, eps, step_size, steps):
    """robust_overfitting: statistics moved by every forward, the two that the update has no use for among them.

    Returns (x', loss), as all of these.
    """
    model.train()
    delta = attack(model, x, y, start, eps=eps, step_size=step_size, steps=steps)
    losses = F.cross_entropy(model(x + delta), y, reduction="none")  # which picks the best restart
    best = torch.zeros_like(x)
    best[losses >= 0] = delta.detach()[losses >= 0]
    x_adv = torch.clamp(x + best, 0, 1)
    loss = update(model, x_adv, y, optimizer)
    log(F.cross_entropy(output := model(x), y), output, y)
    return x_adv, loss


def adv_fast(model, x, y, start, optimizer, *, eps, step_size, steps):
    """fast_adversarial: neither of those two forwards."""
    model.train()
    x_adv = x + attack(model, x, y, start, eps=eps, step_size=step_size, steps=steps).detach()
    return x_adv, update(model, x_adv, y, optimizer)


def one_step_adv(model, x, y, start, optimizer, *, eps, step_size):
    return adv_fast(model, x, y, start, optimizer, eps=eps, step_size=step_size, steps=1)


def standard(model, x, y, start, optimizer):
    model.train()
    return x, update(model, x, y, optimizer)


def attack(model, x, y, start, *, eps, step_size, steps):
    """The perturbation; the gradients of the weights add up until the update's ``zero_grad``."""
    delta = (start - x).clone().requires_grad_()
    for _ in range(steps):
        F.cross_entropy(model(x + delta), y).backward()
        grad = delta.grad.detach()
        delta.data = torch.clamp(delta.data + step_size * torch.sign(grad), -eps, eps)
        delta.data = torch.max(torch.min(delta.data, 1 - x), 0 - x)
        delta.grad.zero_()
    return delta


def update(model, x, y, optimizer):
    output = model(x)
    loss = F.cross_entropy(output, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    log(loss, output, y)
    return loss.detach()


def log(loss, output, y):
    """What is added up for the log of the epoch, waiting for the device."""
    return loss.item() * len(y), (output.max(1)[1] == y).sum().item()
