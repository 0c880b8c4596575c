"""A small network for 8x8 images, which trains in seconds on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .classifier import Classifier, Normalize


class DigitsNet(Classifier):
    """conv 3x3 (width), conv 3x3 (2*width), each with BatchNorm and activation; max pool; fc 128; fc. [B, C, 8, 8]."""

    image_size = 8
    num_features = 128
    stages = ("_stage1", "_stage2")

    def __init__(
        self, *, num_classes: int, in_channels: int = 1, width: int = 32, normalize: Normalize | None = None,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, normalize, activation)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width * 4 * 4, self.num_features)
        self.linear = nn.Linear(self.num_features, num_classes)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return self.active(self.fc(self._stage2(self._stage1(x)).flatten(1)))

    def _stage1(self, x: torch.Tensor) -> torch.Tensor:
        return self.active(self.bn1(self.conv1(x)))

    def _stage2(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.active(self.bn2(self.conv2(x))), 2)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(features)
        return logits
