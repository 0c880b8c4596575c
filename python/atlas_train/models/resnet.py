"""ResNet-18 (He et al. 2016, arXiv 1512.03385) for 32x32 images, the network of most published CIFAR-10 numbers."""

from __future__ import annotations

import torch
from torch import nn

from .activations import Activation
from .classifier import Classifier, Normalize


class BasicBlock(nn.Module):
    """conv 3x3, BatchNorm, activation, conv 3x3, BatchNorm, plus the shortcut, activation. Where the shape changes, the
    shortcut is a convolution 1x1 with BatchNorm."""

    def __init__(self, in_planes: int, planes: int, stride: int, active: Activation) -> None:
        super().__init__()
        self.active = active
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            conv = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.active(self.bn1(self.conv1(x)))))
        return self.active(out + self.shortcut(x))


class ResNet18(Classifier):
    """conv 3x3, BatchNorm, activation, four stages of two blocks (width, 2, 4, 8 times width), mean over the image,
    linear. Any image size.

    The form for CIFAR (github.com/kuangliu/pytorch-cifar), whose first convolution keeps the size: torchvision's begins
    with one of 7x7 and stride 2, made for larger images. Names and order of the weights are those of that
    code: conv1, bn1, layer1.0.conv1, .bn1, .conv2, .bn2, .shortcut.0 (convolution), .shortcut.1 (BatchNorm), ...,
    linear. Published checkpoints load; they are mostly for images that are not normalised (``normalize=False``).
    """

    def __init__(
        self, *, num_classes: int, in_channels: int = 3, width: int = 64, normalize: Normalize | None = None,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, normalize, activation)
        self.num_features = 8 * width
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    def _stage(self, in_planes: int, planes: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_planes, planes, stride, self.active), BasicBlock(planes, planes, 1, self.active)
        )

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.active(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    def head(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(features)
        return logits
