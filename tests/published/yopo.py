"""YOPO as the authors' pre-res18.yopo-5-3 has it; ``f1`` and ``rest`` are the two parts of the model."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def yopo(model, x, y, start, optimizer, *, f1, rest, eps, sigma, outer, inner):
    """``start``: x + the first eta; ``f1(model, x)``, ``rest(model, h)``. Returns (x', mean loss)."""
    model.train()
    eta, losses = (start - x).requires_grad_(), []
    optimizer.zero_grad()
    for _ in range(outer):
        hidden = f1(model, x + eta.detach())
        hidden.retain_grad()
        loss = F.cross_entropy(rest(model, hidden), y)
        loss.backward()
        p = -1.0 * hidden.grad.detach()
        for _ in range(inner):
            hamiltonian = (f1(model, torch.clamp(x + eta, 0, 1)) * p).sum()
            (grad,) = torch.autograd.grad(hamiltonian, eta)
            e = torch.clamp(eta.detach() - sigma * torch.sign(grad), -eps, eps)
            eta = (torch.clamp(x + e, 0.0, 1.0) - x).requires_grad_()
        x_adv = torch.clamp(x + eta, 0, 1)  # with eta in the graph
        (-1.0 * (f1(model, x_adv) * p).sum()).backward()
        losses.append(loss.detach())
    with torch.no_grad():
        model(x_adv)  # for the log
    optimizer.step()
    return x_adv.detach(), torch.stack(losses).mean()
