"""FGSM-PGI as its authors' FGSM_MEP.py has it, and as FastAT Benchmark's fgsm_pgi.py, which clips the start."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def reset(signs, eps):
    """What all_delta and all_momentum are at first, and after each ``epochs_reset`` epochs; signs: uniform numbers."""
    all_delta = torch.clamp(eps * torch.sign(signs), -eps, eps)
    return all_delta, torch.zeros_like(all_delta)


def fgsm_pgi(
    model, x, y, start, optimizer, *, all_delta, all_momentum, idx, eps, clip_start=True, lamda=10, decay=0.3,
    smoothing=0.0,
):  # fmt: skip
    """``start`` is not used. all_delta, all_momentum: a row for each training image; rows idx are written to. Returns
    (x', loss)."""
    delta = all_delta[idx].clone()
    momentum = all_momentum[idx].clone()
    adv = x + delta
    adv = (torch.clamp(adv, 0, 1) if clip_start else adv).detach().requires_grad_(True)
    first = model(adv)
    F.cross_entropy(first, y, label_smoothing=smoothing).backward(retain_graph=True)
    grad = adv.grad.detach().clone()
    momentum = grad / torch.norm(grad, p=1) + momentum * decay
    next_delta = torch.clamp(delta + eps * torch.sign(momentum), -eps, eps)
    next_delta = torch.clamp(next_delta, -x, 1 - x)
    delta = torch.clamp(delta + eps * torch.sign(grad), -eps, eps)
    delta = torch.clamp(delta, -x, 1 - x)
    adv = (x + delta).detach()
    output = model(adv)
    loss = F.cross_entropy(output, y, label_smoothing=smoothing) + lamda * F.mse_loss(output, first)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    all_momentum[idx] = momentum
    all_delta[idx] = next_delta
    return adv, loss.detach()
