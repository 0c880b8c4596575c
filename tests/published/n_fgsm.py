"""N-FGSM as the authors' train.py has it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def n_fgsm(model, x, y, start, optimizer, *, eps, step_size, project=False):
    """``start``: x with its noise, clipped to pixels; returns (x', loss)."""
    model.train()
    eta = (start - x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x + eta), y), eta)
    delta = eta.detach() + step_size * torch.sign(grad)
    delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    if project:
        delta = torch.clamp(delta, -eps, eps)
    x_adv = x + delta
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
