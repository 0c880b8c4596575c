"""The MNIST network of TRADES (Zhang et al. 2019, arXiv 1901.08573), also used by later methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .classifier import Classifier, Normalize


class SmallCNN(Classifier):
    """Four 3x3 convolutions without padding (width, width, pool, 2*width, 2*width, pool), fc 200, dropout, fc 200, fc.

    Images [B, C, 28, 28]. Parameters carry the names of the published checkpoints. As there, convolutions start from
    Kaiming's normal distribution with zero biases, and the last layer from zero: the first input gradient is exactly
    zero, so the very first attack moves nothing but its random start.
    """

    image_size = 28
    num_features = 200
    stages = ("_stage1", "_stage2")

    def __init__(
        self, *, num_classes: int, in_channels: int = 1, width: int = 32, normalize: Normalize | None = None,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, normalize, activation)
        self.feature_extractor = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(in_channels, width, 3),
                "conv2": nn.Conv2d(width, width, 3),
                "conv3": nn.Conv2d(width, 2 * width, 3),
                "conv4": nn.Conv2d(2 * width, 2 * width, 3),
            }
        )
        self.classifier = nn.ModuleDict(
            {
                "fc1": nn.Linear(2 * width * 4 * 4, 200),
                "drop": nn.Dropout(0.5),
                "fc2": nn.Linear(200, self.num_features),
                "fc3": nn.Linear(self.num_features, num_classes),
            }
        )
        for module in self.feature_extractor.values():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in self.classifier["fc3"].parameters():
            nn.init.zeros_(parameter)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        fc = self.classifier
        x = self._stage2(self._stage1(x)).flatten(1)
        x = fc["drop"](self.active(fc["fc1"](x)))
        return self.active(fc["fc2"](x))

    def _stage1(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.feature_extractor
        return F.max_pool2d(self.active(conv["conv2"](self.active(conv["conv1"](x)))), 2)

    def _stage2(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.feature_extractor
        return F.max_pool2d(self.active(conv["conv4"](self.active(conv["conv3"](x)))), 2)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier["fc3"](features)
        return logits
