"""FGSM-UAP and FGSM-CUAP as FastAT Benchmark's fgsm_uap.py and fgsm_cuap.py have them."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def fgsm_uap(
    model, x, y, start, optimizer, *, uaps, momentum, per_class, eps, uap_eps, lamda=10, decay=0.3, smoothing=0.0
):  # fmt: skip
    """``start`` is not used. uaps, momentum: an image, or with ``per_class`` one for each class; written to. Returns
    (x', loss).

    The code keeps the gradient without a copy, and its second backward adds to that tensor what the squared difference
    has by x0. The momentum is meant to be of the attack's gradient, as here: ``clone`` is ours."""
    adv = x.clone() + (uaps[y] if per_class else uaps)
    adv = torch.clamp(x + torch.clamp(adv - x, min=-eps, max=eps), min=0, max=1).detach().requires_grad_(True)
    first = model(adv)
    F.cross_entropy(first, y, label_smoothing=smoothing).backward(retain_graph=True)
    grad = adv.grad.detach().clone()
    adv = adv + eps * grad.sign()
    adv = torch.clamp(x + torch.clamp(adv - x, min=-eps, max=eps), min=0, max=1).detach()
    output = model(adv)
    loss = F.cross_entropy(output, y, label_smoothing=smoothing) + lamda * F.mse_loss(output, first)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    grad = grad / torch.norm(grad, p=1)
    if per_class:
        for c in set(y.tolist()):
            momentum[c] = grad[c == y].mean(dim=0) + momentum[c] * decay
            uaps[c] = torch.clamp(uaps[c] + uap_eps * torch.sign(momentum[c]), -uap_eps, uap_eps)
    else:
        momentum.copy_(grad.mean(dim=0) + momentum * decay)
        uaps.copy_(torch.clamp(uaps + uap_eps * torch.sign(momentum), -uap_eps, uap_eps))
    return adv, loss.detach()
