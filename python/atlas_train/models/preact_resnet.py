"""PreActResNet-18 (He et al. 2016, arXiv 1603.05027) for 32x32 images, the usual network of CIFAR-10 comparisons."""

from __future__ import annotations

import torch
from torch import nn

from .activations import Activation
from .classifier import Classifier, Normalize


class PreActBlock(nn.Module):
    """BatchNorm, activation, conv 3x3, twice, around a shortcut, which takes what the first activation gives where the
    shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int, active: Activation) -> None:
        super().__init__()
        self.active = active
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.active(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: torch.Tensor = self.conv2(self.active(self.bn2(self.conv1(active))))
        return out + shortcut


class PreActResNet18(Classifier):
    """conv 3x3, four stages of two blocks (width, 2, 4, 8 times width), BatchNorm, activation, mean over the image,
    linear.

    With the final BatchNorm and ReLU of the usual adversarial-training code, and its parameter names. Any image size.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int = 3, width: int = 64, normalize: Normalize | None = None,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, normalize, activation)
        self.num_features = 8 * width
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def _stage(self, in_planes: int, planes: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            PreActBlock(in_planes, planes, stride, self.active), PreActBlock(planes, planes, 1, self.active)
        )

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.active(self.bn(x)).mean((2, 3))

    def head(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(features)
        return logits
