"""What a network says to two fixed images: weights that fit it are not all that a network is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from atlas_kernels.outputs import logits_of

from .evaluate import evaluating
from .options import plain

#: Rounding on another device is far below this share of the largest logit, and another normalisation far above.
_TOLERANCE = 0.02


def answers(model: nn.Module, shape: Sequence[int]) -> list[list[float]] | None:
    """The logits of fixed images of that shape, in eval mode; None where they are random, or none.

    The model is left as it was.
    """
    device = next(model.parameters()).device
    pixels = (torch.arange(2 * torch.Size(shape).numel()) * 2654435761 % 2**32).double() / 2**32
    x = pixels.float().reshape(2, *shape).to(device)
    with torch.no_grad(), evaluating(model):
        outputs = model(x), model(x)
    try:
        first, second = map(logits_of, outputs)
    except TypeError:
        return None
    if not torch.equal(first, second) or not first.isfinite().all():
        return None
    return first.float().tolist()


def require_same(model: nn.Module, recorded: list[list[float]] | None, shape: Sequence[int], source: object) -> None:
    """Raises ValueError if the network, with the weights of ``source``, says other things than what was recorded."""
    if recorded is None or (given := answers(model, shape)) is None:
        return
    then, now = torch.tensor(recorded), torch.tensor(given)
    if then.shape != now.shape or (then - now).abs().max() > _TOLERANCE * then.abs().max():
        raise ValueError(
            f"{plain(source)} was made with another {type(model).__name__}: its weights fit this one, and the same "
            "images get other logits. Build it as it was for the run: normalisation, activations and the like"
        )
