"""MI-FGSM as published: algorithm 1 and, in l2, equation 8 (Dong et al. 2018, arXiv 1710.06081)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def mifgsm(model, x, y, *, eps, steps, mu=1.0, norm="linf", targeted=False):
    """Images one by one; x has to be eps away from the ends of its range, which the paper does not clip to."""
    alpha, made = eps / steps, []
    for image, label in zip(x, y, strict=True):
        g, adv = torch.zeros_like(image), image.clone()
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            loss = F.cross_entropy(model(adv[None]), label[None])
            (gradient,) = torch.autograd.grad(-loss if targeted else loss, adv)
            g = mu * g + gradient / gradient.abs().sum()
            adv = adv + alpha * (g.sign() if norm == "linf" else g / g.norm())
        made.append(adv.detach())
    return torch.stack(made)
