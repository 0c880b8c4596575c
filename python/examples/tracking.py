"""A training logged to trackio or Weights & Biases, by a callback; both have the same three functions.

    pip install trackio
    python python/examples/tracking.py --to trackio --epochs 10
    trackio show

With `--to wandb` (pip install wandb; WANDB_MODE=offline without an account) it is Weights & Biases.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

from atlas_train import Callback, Trainer
from atlas_train.config import recorded
from atlas_train.run import Run


class Tracking(Callback):
    """Settings when training begins, the numbers of each epoch (the columns of log.csv), and how it ended."""

    def __init__(self, tracker: Any, project: str) -> None:
        self.tracker, self.project = tracker, project

    def on_start(self, run: Run) -> None:
        name = f"{run.config.method}-{run.config.dataset}-seed{run.config.seed}"
        self.tracker.init(project=self.project, name=name, config=recorded(run.config))

    def on_epoch(self, run: Run, row: Mapping[str, Any]) -> None:
        self.tracker.log({key: value for key, value in row.items() if value is not None})

    def on_end(self, run: Run) -> None:
        self.tracker.log({"finished": run.epoch == run.config.epochs})
        self.tracker.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=["trackio", "wandb"], default="trackio")
    parser.add_argument("--method", default="atlas", help="`atlas methods` lists them")
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()

    tracker = importlib.import_module(arguments.to)
    trainer = Trainer(
        None, arguments.method, "digits", epochs=arguments.epochs, callbacks=[Tracking(tracker, "atlas")]
    )  # fmt: skip
    trainer.fit()
    found = trainer.evaluate()
    print(f"{arguments.method}: clean {found.clean:.1%}, PGD-20 {found.pgd:.1%}")


if __name__ == "__main__":
    main()
