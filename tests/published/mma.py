"""MMA as the authors' trainer.py and anpgd.py have it, radii read and written one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def slm(logits, y):
    """Soft logit margin: logsumexp of the other logits, less the label's."""
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), float("-inf"))
    return torch.logsumexp(others, 1) - logits.gather(1, y[:, None])[:, 0]


def times(values, images):
    return values.view(-1, 1, 1, 1) * images


def pgd(model, x, y, noise, eps, steps):
    """Per-sample radii; the objective is SLM; in eval mode, the weights frozen."""
    model.eval().requires_grad_(False)
    delta = times(eps, noise)
    delta = torch.clamp(x + delta, 0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(slm(model(x + delta), y).sum(), delta)
        delta = delta.detach() + times(2.5 * eps / steps, torch.sign(grad))
        delta = torch.max(torch.min(delta, times(eps, torch.ones_like(x))), times(eps, -torch.ones_like(x)))
        delta = torch.clamp(x + delta, 0, 1) - x
    model.train().requires_grad_(True)
    return torch.clamp(x + delta, 0, 1)


def bisect(model, x, y, eps, way, margin, top, steps):
    low, high = torch.zeros_like(margin), top * torch.ones_like(margin)
    assert (eps <= high).all()
    for _ in range(steps):
        robust = (margin < 0).to(eps)
        low = torch.max(robust * eps, low)
        high = torch.min(robust * top + (1 - robust) * eps, high)
        eps = (low + high) / 2
        margin = slm(model(torch.clamp(x + times(eps, way), 0, 1)), y).detach()
    return eps


def mma(model, x, y, start, optimizer, *, ids, known, steps, d_max, min_eps, search_steps, clean_weight):
    """``start``: noise in [-1, 1] of every sample; ``known``: {id: eps}, changed in place. Returns (x', loss)."""
    model.train()
    logits = model(x)
    clean = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    clean.backward()
    saved = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    correct = slm(logits.detach(), y) < 0
    mixed, found = x.clone(), x.new_zeros(len(x))
    if correct.any():
        few, labels = x[correct], y[correct]
        eps = x.new_tensor([max(min_eps, known.setdefault(i, min_eps)) for i in map(Tensor.item, ids[correct])])
        adv = pgd(model, few, labels, start[correct], eps, steps)
        way = times(1.0 / (eps + 1e-12), adv - few)
        margin = slm(model(adv), labels).detach()
        found[correct] = bisect(model, few, labels, eps, way, margin, 1.05 * d_max, search_steps)
        mixed[correct] = few + times(found[correct], way)
    outputs = model(mixed)
    total = outputs.new_zeros(())
    if correct.any():
        losses = F.cross_entropy(outputs[correct], y[correct], reduction="none")
        total = total + losses[d_max > found[correct]].sum()
    if (~correct).any():
        total = total + F.cross_entropy(outputs[~correct], y[~correct]) * (~correct).sum()
    margin_loss = total / len(x)
    optimizer.zero_grad()
    margin_loss.backward()
    for p, before in zip(model.parameters(), saved, strict=True):
        p.grad = (1 - clean_weight) * p.grad + clean_weight * before
    optimizer.step()
    known.update(zip(map(Tensor.item, ids), map(Tensor.item, found), strict=True))
    return mixed, clean_weight * clean.detach() + (1 - clean_weight) * margin_loss.detach()
