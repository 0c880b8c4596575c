"""AWP as its authors' AdvWeightPerturb has it: a second network takes a step, and the difference is the direction.

v = ||w|| (w~ - w) / (||w~ - w|| + 1e-20) for weights with more than one dimension, w~ the second network after one step
of plain SGD on -loss, in train mode on buffers of its own.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F

from .adv import attack

EPSILON = 1e-20
PROXY_LR = 0.01


def calc_awp(model, loss_of):
    """{name: v} for the loss ``loss_of(network)``."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=PROXY_LR)
    loss = -loss_of(proxy)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    old, new = model.state_dict(), proxy.state_dict()
    diff = {}
    for name, w in old.items():
        if w.dim() > 1 and "weight" in name:
            step = new[name] - w
            diff[name] = w.norm() / (step.norm() + EPSILON) * step
    return diff


def shift(model, diff, coefficient):
    with torch.no_grad():
        for name, w in model.named_parameters():
            if name in diff:
                w.add_(coefficient * diff[name])


def at_awp(model, x, y, start, optimizer, *, eps, step_size, steps, gamma):
    """Adversarial training with AWP around the step; the last forward, of x, is for the log."""
    model.train()
    delta = attack(model, x, y, start, eps=eps, step_size=step_size, steps=steps)
    model(x + delta)
    x_adv = (x + delta).detach().clamp(0, 1)
    awp = calc_awp(model, lambda net: F.cross_entropy(net(x_adv), y))
    shift(model, awp, gamma)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    shift(model, awp, -gamma)
    model(x)
    return x_adv, loss.detach()


def trades_awp(model, x, y, start, optimizer, *, eps, step_size, steps, beta, gamma):
    """TRADES with AWP. AWP's script runs x' before x; here as in TRADES' own: only running statistics could tell."""

    def trades(net):
        natural = F.cross_entropy(net(x), y)
        log_p_adv = F.log_softmax(net(x_adv), dim=1)
        return natural + beta * F.kl_div(log_p_adv, F.softmax(net(x), dim=1), reduction="batchmean")

    model.eval()
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_()
        kl = F.kl_div(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1), reduction="sum")
        (grad,) = torch.autograd.grad(kl, [x_adv])
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0.0, 1.0)
    model.train()
    awp = calc_awp(model, trades)
    shift(model, awp, gamma)
    loss = trades(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    shift(model, awp, -gamma)
    return x_adv, loss.detach()
