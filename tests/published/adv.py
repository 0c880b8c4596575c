"""ADV as Rice, Wong & Kolter's train_cifar.py has it, and one-step ADV as Wong, Rice & Kolter's train_fgsm.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def adv(model, x, y, start, optimizer, *, eps, step_size, steps):
    """PGD training in train mode, statistics moved by every forward; returns (x', loss)."""
    model.train()
    delta = (start - x).clone().requires_grad_()
    for _ in range(steps):
        loss = F.cross_entropy(model(x + delta), y)
        (grad,) = torch.autograd.grad(loss, delta)
        d = torch.clamp(delta.detach() + step_size * torch.sign(grad), -eps, eps)
        delta = torch.clamp(d, 0 - x, 1 - x).requires_grad_()
    model(x + delta)  # the loss of each sample at the end, which picks the best restart
    delta = delta.detach()
    x_adv = torch.clamp(x + delta, 0, 1)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model(x)  # for the log
    return x_adv, loss.detach()


def one_step_adv(model, x, y, start, optimizer, *, eps, step_size):
    model.train()
    delta = (start - x).clone().requires_grad_()
    loss = F.cross_entropy(model(x + delta), y)
    (grad,) = torch.autograd.grad(loss, delta)
    d = torch.clamp(delta.detach() + step_size * torch.sign(grad), -eps, eps)
    x_adv = x + torch.clamp(d, 0 - x, 1 - x)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
