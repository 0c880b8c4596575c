"""LLR as google-deepmind's regularizers.py, graph.py and batchnorm.py have it: for networks whose BatchNorms run
once each. TensorFlow makes the gradients that are asked for and no others, and so do the steps here."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


def llr(
    model, x, y, start, optimizer, *, eps, steps, lr, ce_weight=2.0, weight=4.0, smoothing=0.3, ascent="code",
    running=False, stop_statistics=False,
):  # fmt: skip
    """Returns (x', loss). Not as published: ascent="exact", running averages, no gradient through the statistics."""
    model.train()
    cross_entropy = F.cross_entropy(model(x), y)  # the one forward that moves the running averages

    inputs = x.detach().requires_grad_()
    stats = [(bn.running_mean, bn.running_var) for bn in norms(model)] if running else None
    logits, stats = network(model, inputs, stats)
    losses = F.cross_entropy(logits, y, reduction="none")
    grad = torch.autograd.grad(losses.sum(), inputs, create_graph=True)[0]
    if stop_statistics:
        stats = [(mean.detach(), var.detach()) for mean, var in stats]

    d = start - x
    m, u = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, steps + 1):
        leaf = d.detach().requires_grad_()
        new_losses = F.cross_entropy(network(model, x + leaf, stats)[0], y, reduction="none")
        perturbation = leaf.detach() if ascent == "code" else leaf
        diff = new_losses - losses.detach() - (perturbation * grad.detach()).sum((1, 2, 3))
        (g,) = torch.autograd.grad(-(torch.sign(diff.detach()) * diff).mean(), leaf)
        m = 0.9 * m + (1 - 0.9) * g
        u = 0.999 * u + (1 - 0.999) * g * g
        d = d - lr * (m / (1 - 0.9**t)) / (torch.sqrt(u / (1 - 0.999**t)) + 1e-9)
        d = torch.clamp(x + torch.clamp(d, -eps, eps), 0, 1) - x
    x_adv = x + d

    new_losses = F.cross_entropy(network(model, x_adv, stats)[0], y, reduction="none")
    linear = (d * grad).sum((1, 2, 3))
    linearity = ((new_losses - losses - linear).abs() + smoothing * linear.abs()).mean()
    loss = ce_weight * cross_entropy + weight * linearity
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def network(model, x, stats):
    """The logits with those statistics of the BatchNorms, in order, or with the batch's own; and the statistics."""
    used = []

    def normalise(bn, h):
        mean, var = stats[len(used)] if stats else (h.mean((0, 2, 3)), (h**2).mean((0, 2, 3)) - h.mean((0, 2, 3)) ** 2)
        used.append((mean, var))  # the variance as the published code has it
        mean, var, scale, offset = (t[None, :, None, None] for t in (mean, var, bn.weight, bn.bias))
        return scale * (h - mean) / torch.sqrt(var + 1e-5) + offset

    for bn in norms(model):
        bn.forward = partial(normalise, bn)
    logits = model(x)
    for bn in norms(model):
        del bn.forward
    return logits, used
