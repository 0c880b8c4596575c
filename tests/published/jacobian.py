"""Jacobian regularisation as facebookresearch's jacobian.py and its MNIST example have it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def jacobian(model, x, y, start, optimizer, *, weight, vectors):
    """Returns (x, loss). vectors: a list of n normal draws [B, C], or None for the C basis vectors."""
    data = x.clone().requires_grad_()
    output = model(data)
    batch, classes = output.shape
    number = classes if vectors is None else len(vectors)
    j2 = 0
    for i in range(number):
        if vectors is None:
            v = torch.zeros_like(output)
            v[:, i] = 1
        else:
            v = vectors[i] / torch.norm(vectors[i], 2, 1, True)
        (jv,) = torch.autograd.grad(output.reshape(-1), data, v.reshape(-1), create_graph=True)
        j2 = j2 + classes * torch.norm(jv) ** 2 / (number * batch)
    loss = F.cross_entropy(output, y) + weight * j2 / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x, loss.detach()
