"""Loss and accuracy over a loader, as the published test loops have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import losses
from ..outputs import logits_of, predicted


def evaluate(
    test_loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module, adversaries: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) on ``adversaries(X, y)``, on the model's device; leaves the model in eval mode.

    An image with a NaN among its logits is wrong, whatever its label.
    """
    model.eval()
    device = next(model.parameters()).device
    sums, n = torch.zeros(2, dtype=torch.float64, device=device), 0
    for X, y in test_loader:
        X, y = X.to(device), y.to(device)
        X = adversaries(X, y)
        with torch.no_grad():
            output = logits_of(model(X))
            sums[0] += losses.cross_entropy(output, y, reduction="sum")
            sums[1] += (predicted(output) == y).sum()
        n += len(y)
    if not n:
        raise ValueError("test_loader gives no images")
    loss, accuracy = (sums / n).tolist()
    return loss, accuracy
