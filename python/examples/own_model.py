"""A network of your own in the trainer, on scikit-learn's digits.

    python python/examples/own_model.py --method atlas --epochs 10
    atlas train --model python/examples/own_model.py:Net

The first is this script, which calls the trainer from Python; the second is the trainer's own command line.
"""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from atlas_train import engine
from atlas_train.config import TrainConfig
from atlas_train.evaluate import evaluate


class Net(nn.Module):
    """Images [B, C, 8, 8] in [0, 1] to logits; a network that wants normalised images normalises them first in here."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 16, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="atlas", help="`atlas methods` lists them")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    config = TrainConfig(method=arguments.method, dataset="digits", epochs=arguments.epochs)
    run = engine.train(config, model=Net())
    found = evaluate(run.model, run.splits.test, run.config.eps)
    print(f"{config.method}: clean {found.clean:.1%}, PGD-{found.pgd_steps} {found.pgd:.1%}")


if __name__ == "__main__":
    main()
