"""Training on stored adversaries, which nobody has published: written out from its formula."""

from __future__ import annotations

import torch
from torch.nn import functional as F

DISTANCES = {
    "logit": lambda last, z: ((z - last) ** 2).sum(1),
    "kl": lambda last, z: (last.softmax(1) * (last.log_softmax(1) - z.log_softmax(1))).sum(1),
}


def view(image, top, left, mirrored, padding=4):
    """A crop of the padded image, mirrored or not."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (padding,) * 4)
    crop = padded[:, padding + top : padding + top + height, padding + left : padding + left + width]
    return crop.flip(-1) if mirrored else crop


def stored_adv(
    model, x, y, start, optimizer, *, perturbations, momentum, logits, idx, eps, step_size, decay=0.3, weight=0.0,
    distance="logit", smoothing=0.0, replays=1, views=None,
):  # fmt: skip
    """``start`` is not used. perturbations, momentum, logits: a row for each training image; rows idx are written to.
    Returns (x', mean loss)."""
    losses = []
    for _ in range(replays):
        adv = torch.clamp(x + perturbations[idx], 0, 1).detach().requires_grad_(True)
        images = adv if views is None else torch.stack([view(a, *v) for a, v in zip(adv, views, strict=True)])
        z = model(images)
        seen = ~logits[idx].isnan().any(1)
        apart = DISTANCES[distance](torch.where(seen[:, None], logits[idx], 0.0).to(z.dtype), z)
        loss = F.cross_entropy(z, y, label_smoothing=smoothing) + weight * torch.where(seen, apart, 0.0).mean()
        optimizer.zero_grad()
        loss.backward()
        momentum[idx] = (adv.grad / torch.norm(adv.grad, p=1) + momentum[idx] * decay).to(momentum.dtype)
        moved = torch.clamp(perturbations[idx] + step_size * torch.sign(momentum[idx]), -eps, eps)
        perturbations[idx] = torch.max(torch.min(moved, 1 - x), -x)
        logits[idx] = z.detach().to(logits.dtype)
        optimizer.step()
        losses.append(loss.detach())
    return adv.detach(), torch.stack(losses).mean()
