"""CURE as F-Salehi's CURE.py has it, with sums of losses where torch 1.0 summed scalar losses over a vector of ones."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cure(model, x, y, start, optimizer, *, h, weight, square=False):
    """Returns (x + z, loss); square: the penalty of the paper."""
    inputs = x.clone()
    outputs = model.train()(inputs)

    model.eval()
    inputs.requires_grad_()
    model(inputs)  # of no use there either
    F.cross_entropy(model(inputs), y, reduction="sum").backward()
    z = torch.sign(inputs.grad.data)
    z = h * (z + 1e-7) / (z.reshape(z.size(0), -1).norm(dim=1)[:, None, None, None] + 1e-7)
    inputs.grad = None
    optimizer.zero_grad()

    loss_pos = F.cross_entropy(model(inputs + z), y, reduction="sum")
    loss_orig = F.cross_entropy(model(inputs), y, reduction="sum")
    (grad_diff,) = torch.autograd.grad(loss_pos - loss_orig, inputs, create_graph=True)
    reg = grad_diff.reshape(grad_diff.size(0), -1).norm(dim=1)
    reg = reg**2 if square else reg
    loss = F.cross_entropy(outputs, y) + torch.sum(weight * reg) / inputs.size(0)
    loss.backward()
    optimizer.step()
    model.train()
    return x + z, loss.detach()
