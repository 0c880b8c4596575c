"""The losses per sample as their authors' code or PyTorch has them, written from the text; logits in fp32 or fp64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(z, y, smoothing=0.0):
    return F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)


def soft_cross_entropy(z, t, smoothing=0.0):
    return F.cross_entropy(z, t, reduction="none", label_smoothing=smoothing)


def kl_div(p, q):
    return F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="none", log_target=True).sum(1)


def trades(z, adv, y, beta=6.0):
    return F.cross_entropy(z, y, reduction="none") + beta * F.kl_div(
        F.log_softmax(adv, dim=1), F.softmax(z, dim=1), reduction="none"
    ).sum(1)


def mart(z, adv, y, beta=6.0):
    adv_probs = F.softmax(adv, dim=1)
    tmp1 = torch.argsort(adv_probs, dim=1)[:, -2:]
    new_y = torch.where(tmp1[:, -1] == y, tmp1[:, -2], tmp1[:, -1])
    loss_adv = F.cross_entropy(adv, y, reduction="none") + F.nll_loss(
        torch.log(1.0001 - adv_probs + 1e-12), new_y, reduction="none"
    )
    nat_probs = F.softmax(z, dim=1)
    true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze(1)
    kl = F.kl_div(torch.log(adv_probs + 1e-12), nat_probs, reduction="none").sum(1)
    return loss_adv + beta * kl * (1.0000001 - true_probs)


def entropy(z):
    return torch.distributions.Categorical(logits=z).entropy()


def margin(z, y):
    hot = F.one_hot(y, z.shape[1])
    return (z - hot * 1e9).max(1).values - (hot * z).sum(1)


def dlr(x, y):
    """AutoAttack's, which calls the logits x."""
    x_sorted, ind_sorted = x.sort(dim=1)
    ind = (ind_sorted[:, -1] == y).to(x.dtype)
    u = torch.arange(x.shape[0], device=x.device)
    return -(x[u, y] - x_sorted[:, -2] * ind - x_sorted[:, -1] * (1.0 - ind)) / (
        x_sorted[:, -1] - x_sorted[:, -3] + 1e-12
    )


def dlr_targeted(x, y, y_target):
    x_sorted, _ = x.sort(dim=1)
    u = torch.arange(x.shape[0], device=x.device)
    return -(x[u, y] - x[u, y_target]) / (x_sorted[:, -1] - 0.5 * (x_sorted[:, -3] + x_sorted[:, -4]) + 1e-12)


def logit_pairing(z, adv):
    return F.mse_loss(adv, z, reduction="none").sum(1)


def consistency(z, other, y, distance, weight, smoothing=0.0):
    """The loss of an adversary tied to other logits: squared logits (FGSM-PGI), squared probabilities (GAT),
    Jensen-Shannon (LIET), KL. y: classes, or distributions."""
    log_p, log_o = F.log_softmax(z, 1), F.log_softmax(other, 1)
    log_m = torch.logaddexp(log_p, log_o) - torch.log(torch.full((), 2.0, dtype=z.dtype, device=z.device))
    apart = {
        "logit": lambda: F.mse_loss(z, other, reduction="none").sum(1),
        "prob": lambda: ((F.softmax(z, 1) - F.softmax(other, 1)) ** 2).sum(1),
        "js": lambda: 0.5 * (log_p.exp() * (log_p - log_m) + log_o.exp() * (log_o - log_m)).sum(1),
        "kl": lambda: kl_div(other, z),
    }[distance]()
    return F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing) + weight * apart


def atlas(z, y, local, local_weight, global_term, global_weight):
    """(loss, CE, LOCAL, GLOBAL); the table in the docstring of ``ATLAS``, a line an entry."""
    parts = list(z.split(len(y)))
    x = parts.pop(0) if global_term != "none" else None
    adv, *near = parts
    ce = F.cross_entropy(adv, y, reduction="none")
    local_loss = global_loss = torch.zeros_like(ce)
    if near:
        local_loss = {
            "kl": lambda: sum(kl_div(adv.detach(), n) for n in near) / len(near),
            "ce": lambda: sum(cross_entropy(n, y) for n in near) / len(near),
            "logit": lambda: sum(((n - adv) ** 2).sum(1) for n in near) / len(near),
        }[local]()
    if x is not None:
        global_loss = {
            "kl": lambda: kl_div(x, adv),
            "ce": lambda: cross_entropy(x, y),
            "logit": lambda: ((x - adv) ** 2).sum(1),
        }[global_term]()
    return ce + local_weight * local_loss + global_weight * global_loss, ce, local_loss, global_loss


def gairat(kappa, steps, lam) -> Tensor:
    half = int(steps / 2)
    reweight = ((lam + (half - kappa.double()) * 5 / half).tanh() + 1) / 2
    return reweight * len(reweight) / reweight.sum()
