"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146), the large networks of CIFAR-10 comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .activations import Activation
from .classifier import Classifier, Normalize

STEM = 16  # channels before the first stage, however wide the stages are


class WideBlock(nn.Module):
    """BatchNorm, activation, conv 3x3, twice, around a shortcut, which takes what the first activation gives where
    channels change."""

    def __init__(self, in_planes: int, planes: int, stride: int, active: Activation) -> None:
        super().__init__()
        self.active = active
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = None if in_planes == planes else nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.active(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: torch.Tensor = self.conv2(self.active(self.bn2(self.conv1(active))))
        return out + shortcut


class WideStage(nn.Module):
    """Blocks in a row, of which the first may change channels and size."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int, active: Activation) -> None:
        super().__init__()
        rest = [WideBlock(planes, planes, 1, active) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(WideBlock(in_planes, planes, stride, active), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


class WideResNet28(Classifier):
    """conv 3x3 (16), three stages of four blocks (width, 2, 4 times width), BatchNorm, activation, mean, linear.

    width is 16 times the widening factor: 160, the default, makes WRN-28-10. Without dropout, with the parameter names
    and the initialisation of the usual adversarial-training code (that of TRADES), whose checkpoints load; they are for
    images that are not normalised (``normalize=False``). Any image size of which every stride leaves something.
    """

    blocks = 4
    unused = ("sub_block1.",)  # a second first stage, which the published code makes and its checkpoints hold

    def __init__(
        self, *, num_classes: int, in_channels: int = 3, width: int = 160, normalize: Normalize | None = None,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, normalize, activation)
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False)
        self.block1 = WideStage(self.blocks, STEM, width, 1, self.active)
        self.block2 = WideStage(self.blocks, width, 2 * width, 2, self.active)
        self.block3 = WideStage(self.blocks, 2 * width, 4 * width, 2, self.active)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.active(self.bn1(x)).mean((2, 3))

    def head(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(features)
        return logits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state_dict if key.startswith(tuple(prefix + name for name in self.unused))]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class WideResNet34(WideResNet28):
    """As ``WideResNet28``, with five blocks a stage: WRN-34-10, the network of TRADES, MART and GAIRAT."""

    blocks = 5
