"""GradAlign as tml-epfl's train.py has it for attack=fgsm; the clamp of the attack's input is torch's own."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def grad_align(model, x, y, start, optimizer, *, eps, weight, noise, detach=True):
    """Returns (x', loss). start: x + delta, not clipped; noise: that of g2. detach=False: not as published."""
    model.train()
    delta = (start - x).requires_grad_()
    loss = F.cross_entropy(model(torch.clamp(x + delta, 0, 1)), y)
    (grad,) = torch.autograd.grad(loss, delta, create_graph=True)
    if detach:
        grad = grad.detach()
    d = torch.clamp(delta.detach() + 1.25 * eps * torch.sign(grad.detach()), -eps, eps)
    d = torch.clamp(x + d, 0, 1) - x

    loss = F.cross_entropy(model(x + d), y)

    delta2 = noise.clone().requires_grad_()
    loss2 = F.cross_entropy(model(x + delta2), y)
    (grad2,) = torch.autograd.grad(loss2, delta2, create_graph=True)
    nnz = ((grad**2).sum([1, 2, 3]) ** 0.5 != 0) * ((grad2**2).sum([1, 2, 3]) ** 0.5 != 0)
    grad, grad2 = grad[nnz], grad2[nnz]
    grad = grad / ((grad**2).sum([1, 2, 3]) ** 0.5)[:, None, None, None]
    grad2 = grad2 / ((grad2**2).sum([1, 2, 3]) ** 0.5)[:, None, None, None]
    loss = loss + weight * (1.0 - (grad * grad2).sum((1, 2, 3)).mean())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x + d, loss.detach()
