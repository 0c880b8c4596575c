"""What tests of the trainer share: a data set that is learnt in a second, and settings for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atlas_train import progress
from atlas_train.data import DataSplits, Images

EPS = 0.1
TINY: dict[str, Any] = {
    "eps": EPS, "epochs": 4, "batch_size": 16, "width": 4, "probe_size": 8, "val_size": 0, "device": "cpu",
    "model": "digits_net", "optimizer": "adam", "lr": 5e-3, "weight_decay": 0.0, "cyclic_peak": 0.4, "beside": (),
    "threads": 1,
}  # fmt: skip


def splits(train: int = 64, test: int = 40, channels: int = 1) -> DataSplits:
    """Four classes of noisy bars, 8x8."""
    rng = torch.Generator().manual_seed(0)

    def images(n: int) -> Images:
        labels = torch.arange(n) % 4
        pixels = torch.randint(0, 60, (n, channels, 8, 8), generator=rng, dtype=torch.uint8)
        for i, label in enumerate(labels.tolist()):
            pixels[i, :, 2 * label : 2 * label + 2] += 160
        return Images(pixels, labels)

    return DataSplits("bars", images(train), images(test), num_classes=4, eps=EPS)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Lines(progress.Silent):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
