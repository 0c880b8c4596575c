"""Free adversarial training as Wong, Rice & Kolter's train_free.py has it, and as Shafahi et al.'s free_train.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def free(model, x, y, start, optimizer, *, eps, replays):
    """``start``: delta of the largest batch, changed in place; returns (x', mean loss)."""
    model.train()
    delta, losses = start.requires_grad_(), []
    for _ in range(replays):
        optimizer.zero_grad()
        delta.grad = None
        loss = F.cross_entropy(model(x + delta[: len(x)]), y)
        loss.backward()
        delta.data = torch.clamp(delta.data + eps * torch.sign(delta.grad), -eps, eps)
        rows = delta.data[: len(x)]
        delta.data[: len(x)] = torch.max(torch.min(rows, 1 - x), 0 - x)
        optimizer.step()
        losses.append(loss.detach())
    return (x + delta[: len(x)]).detach(), torch.stack(losses).mean()


def free_sum(model, x, y, start, optimizer, *, eps, replays):
    """The other: delta is clipped to eps alone, the sum to the image range inside of the graph."""
    model.train()
    delta, losses = start.requires_grad_(), []
    for _ in range(replays):
        optimizer.zero_grad()
        delta.grad = None
        loss = F.cross_entropy(model(torch.clamp(x + delta[: len(x)], 0, 1)), y)
        loss.backward()
        delta.data = torch.clamp(delta.data + eps * torch.sign(delta.grad), -eps, eps)
        optimizer.step()
        losses.append(loss.detach())
    return torch.clamp(x + delta[: len(x)], 0, 1).detach(), torch.stack(losses).mean()
