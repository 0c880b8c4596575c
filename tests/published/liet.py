"""LIET as the authors' main.py (fzjcdt/LIET) and FastAT Benchmark's liet.py have it; what they draw is given."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def random_smoothing(output, target, smoothing, numbers):
    """CustomCrossEntropyLoss; ``numbers``: its torch.rand_like."""
    smooth = torch.zeros_like(output).scatter_(1, target.unsqueeze(1), 1.0)
    if smoothing > 0:
        smooth = smooth * (1 - smoothing)
        spread = (numbers * smoothing).masked_fill(smooth.bool(), 0)
        smooth = smooth + spread / spread.sum(dim=1, keepdim=True) * smoothing
    return (-smooth * F.log_softmax(output, dim=-1)).sum(dim=-1).mean()


def label_noise(model, like, numbers, *, eps, smoothing, classes):
    """LI: what is made on every ``li_update``-th batch of an epoch, of gray images shaped like those of ``like``."""
    model.eval()
    gray = torch.full((classes, *like.shape[1:]), 0.5, dtype=like.dtype, requires_grad=True)
    random_smoothing(model(gray), torch.arange(classes), smoothing, numbers).backward()
    model.train()
    return eps * torch.sign(gray.grad).detach()


def liet(
    model, x, y, start, optimizer, *, noise, replaced, uniform, minus, numbers, eps, large, smoothing, cur_lambda
):  # fmt: skip
    """``start`` is not used. noise: LI; replaced: where ``uniform`` takes its place; minus: whether it is subtracted;
    numbers: of the two random smoothings; large: eps > 8 / 255. Returns (x', loss)."""
    delta = noise[y].clone()
    delta[replaced] = uniform[replaced]
    adv = torch.clamp(x - delta if minus else x + delta, 0, 1).detach().requires_grad_(True)
    first = model(adv)
    random_smoothing(first, y, smoothing, numbers[0]).backward(retain_graph=True)
    adv = adv + eps * adv.grad.sign().detach()
    if large:
        adv = torch.clamp(adv, min=0, max=1).detach()
    else:
        adv = torch.clamp(x + torch.clamp(adv - x, min=-eps, max=eps), min=0, max=1).detach()
    output = model(adv)
    loss = random_smoothing(output, y, smoothing, numbers[1])
    p, q = F.softmax(first, dim=1), F.softmax(output, dim=1)
    m = torch.clamp((p + q) / 2.0, 0, 1).log()
    divergence = F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean")
    loss = loss + cur_lambda * divergence / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return adv, loss.detach()
