"""GAT as the authors' files (CIFAR10/GAT_cifar10.py, MNIST/GAT-MNIST.py) and the FastAT Benchmark's have it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def guided_attack(model, image, target, eps, p_out, l2_reg, alt, *, smooth=0.0, slip=False):
    """``slip``: FastAT's file gives the probabilities to the cross-entropy where there is no guide. The authors' takes
    the guide times ``alt``: its backward goes through ``p_out`` in every batch."""
    img = image.clone().requires_grad_()
    out = model(img)
    r_out = torch.softmax(out, dim=1)
    if alt or not slip:
        cost = F.cross_entropy(out, target, label_smoothing=smooth)
        cost = cost + alt * l2_reg * ((p_out - r_out) ** 2.0).sum(1).mean(0)
    else:
        cost = F.cross_entropy(r_out, target, label_smoothing=smooth)
    cost.backward()
    return torch.clamp(image + eps * torch.sign(img.grad), 0, 1)


def gat(
    model, epochs, optimizer, *, eps, noise, l2_reg, mul, after, alternate=True, smooth=0.0, slip=False, attack="eval"
):
    """``epochs``: of each, its batches (x, y, signs of the noise). ``after``: the epochs after which the weight grows.
    Returns the adversaries and the losses of all batches."""
    model.train()
    advs, losses = [], []
    for epoch, batches in enumerate(epochs):
        for counter, (data, target, signs) in enumerate(batches):
            p_out = torch.softmax(model(data), dim=1)
            adv_data = torch.clamp(data + noise * signs, 0.0, 1.0)
            model.train(attack == "train")
            alt = counter % 2 if alternate else 1
            adv_data = guided_attack(model, adv_data, target, eps, p_out, l2_reg, alt, smooth=smooth, slip=slip)
            delta = torch.clamp(adv_data - data, -eps, eps)
            adv_data = torch.clamp(data + delta, 0.0, 1.0)

            model.train()
            optimizer.zero_grad()
            adv_out = model(adv_data)
            out = model(data)
            q_out, p_out = torch.softmax(adv_out, dim=1), torch.softmax(out, dim=1)
            closs = F.cross_entropy(out, target, label_smoothing=smooth)
            cost = closs + l2_reg * ((p_out - q_out) ** 2.0).sum(1).mean(0)
            cost.backward()
            optimizer.step()
            advs.append(adv_data)
            losses.append(cost.detach())
        if epoch in after:
            l2_reg = l2_reg * mul
    return advs, losses
