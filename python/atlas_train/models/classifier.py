"""What all models share: the check of the input, the normalisation, and features apart from the head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .activations import ACTIVATIONS


class Normalize(nn.Module):
    """(x - mean) / std per channel, x [B, C, H, W]. Raises ValueError for unequal lengths, what is not finite, or a std
    that is not > 0.

    mean and std are saved with the model, so that a checkpoint says what it was trained with.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"std must be positive and as many as mean, got mean {mean} and std {std}")
        if not all(map(math.isfinite, (*mean, *std))):
            raise ValueError(f"mean and std must be finite, got mean {mean} and std {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """A model in two parts: logits = head(features(x)).

    A subclass defines `_features` (normalised images to [B, num_features]) and `head`. No layer works in place, so
    that gradients of input gradients (double backward) are right.
    """

    image_size: int | None = None  # height and width that the layers need; None: any
    num_features: int
    unused: tuple[str, ...] = ()  # beginnings of names in published checkpoints that no forward uses
    stages: tuple[str, ...] = ()  # methods of several layers, which ``recompute`` takes as its blocks

    def __init__(self, in_channels: int, normalize: Normalize | None, activation: str = "relu") -> None:
        super().__init__()
        self.in_channels, self.active = in_channels, ACTIVATIONS[activation]
        self.normalize = normalize

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The penultimate vectors [B, num_features] of images x [B, C, H, W] in [0, 1].

        Raises ValueError when x has the wrong shape for this model.
        """
        size = self.image_size
        if x.dim() != 4 or x.shape[1] != self.in_channels or (size and x.shape[2:] != (size, size)):
            side = size or "any"
            raise ValueError(
                f"x must be [B, {self.in_channels}, {side}, {side}] for {type(self).__name__}, got {list(x.shape)}; "
                "choose another model, or build it with the right in_channels"
            )
        return self._features(x if self.normalize is None else self.normalize(x))

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """The logits [B, num_classes] of features [B, num_features]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits [B, num_classes] of images x [B, C, H, W] in [0, 1]."""
        return self.head(self.features(x))

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
