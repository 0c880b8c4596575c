"""The trainer from Python: a network of your own, a callback, and a report on what came of it.

    python python/examples/trainer.py --method atlas --epochs 10

prints a line for each epoch, and accuracies at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import nn

from atlas_train import Callback, Trainer
from atlas_train.run import Run


def network() -> nn.Module:
    """Images [B, 1, 8, 8] in [0, 1] to logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )  # fmt: skip


class Lines(Callback):
    """A line for each epoch; training ends where clean accuracy in validation is high enough."""

    def __init__(self, enough: float) -> None:
        self.enough = enough

    def on_start(self, run: Run) -> None:
        print(f"{run.config.method}, {sum(p.numel() for p in run.model.parameters()):,} parameters")

    def on_epoch(self, run: Run, row: Mapping[str, Any]) -> bool:
        print(f"epoch {run.epoch} of {run.config.epochs}, loss {row['loss']:.3f}, validation {row['val_clean']:.1%}")
        return bool(row["val_clean"] >= self.enough)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="atlas", help="`atlas methods` lists them")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--enough", type=float, default=1.0, help="clean accuracy at which training ends")
    parser.add_argument("--folder", help="for checkpoints; default: none are kept")
    arguments = parser.parse_args()

    # Settings of `atlas train`, and hyper-parameters of the method, are keywords here.
    trainer = Trainer(
        network(), arguments.method, "digits", folder=arguments.folder, epochs=arguments.epochs, eps="51/255",
        callbacks=[Lines(arguments.enough)], show="silent",
    )  # fmt: skip
    trainer.fit()
    report = trainer.evaluate(attacks=("fgsm", "pgd-20"))
    print(report.table())
    print(f"{arguments.method}: clean {report.accuracy('clean'):.1%}, PGD-20 {report.accuracy('pgd-20'):.1%}")


if __name__ == "__main__":
    main()
