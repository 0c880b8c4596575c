"""NuAT as the authors' file (CIFAR10/NuAT_cifar10.py) and the FastAT Benchmark's (fast_at/nu_at.py) have it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def nuclear(a):
    """The sum of the singular values."""
    return torch.linalg.svdvals(a).sum()


def nuat(
    model, epochs, optimizer, *, eps, noise, nuc_max, growing, divisor=None, attack="eval", smooth=0.0, nuc_reg=0.0,
    first=0,
):  # fmt: skip
    """``epochs``: of each, its batches (x, y, signs of the noise); after each of the first ``growing`` of them R grows.
    divisor: None: the images of the batch, as in FastAT's file. first: the count of batches at the start of an epoch.
    Returns the adversaries and the losses of all batches."""
    model.train()
    advs, losses = [], []
    for epoch, batches in enumerate(epochs):
        for counter, (data, target, signs) in enumerate(batches, start=first):
            size = divisor or len(data)
            out = model(data)
            start = torch.clamp(data + noise * signs, 0.0, 1.0).requires_grad_()
            model.train(attack == "train")
            start_out = model(start)
            cost = F.cross_entropy(start_out, target, label_smoothing=smooth)
            if counter % 2:
                cost = cost + nuc_reg * nuclear(out - start_out) / size
            cost.backward()
            moved = start.detach() + eps * torch.sign(start.grad)
            if attack == "eval":  # the authors', in two steps
                moved = torch.clamp(moved, 0.0, 1.0)
            adv_data = torch.clamp(data + torch.clamp(moved - data, -eps, eps), 0.0, 1.0)

            model.train()
            optimizer.zero_grad()
            adv_out = model(adv_data)
            out = model(data)
            cost = F.cross_entropy(out, target, label_smoothing=smooth)
            cost = cost + nuc_reg * (nuclear(out - adv_out) / size)
            cost.backward()
            optimizer.step()
            advs.append(adv_data)
            losses.append(cost.detach())
        if epoch < growing:
            nuc_reg = nuc_reg + nuc_max / growing
    return advs, losses
