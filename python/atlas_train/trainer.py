"""``atlas train`` from Python: a network, a method and data in, a trained network and its accuracies out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

from torch import nn

from . import data as datasets
from . import engine, methods, progress
from .compiled_step import TrainStep
from .config import TrainConfig, from_dict
from .data import Dataset, DataSplits
from .evaluate import Evaluation, evaluate
from .options import shown, suggestion
from .robustness.report import Report
from .run import Run


class Callback:
    """Told of a training; define what you need. ``run`` is the training itself: config, model, epoch, history."""

    def on_start(self, run: Run) -> None:
        """Before the first batch, also of a run that goes on."""

    def on_epoch(self, run: Run, row: Mapping[str, Any]) -> bool | None:
        """After an epoch and its checkpoint. row: its numbers, the columns of log.csv. True ends the training."""
        return None

    def on_end(self, run: Run) -> None:
        """When training is over, be it by an error or Ctrl-C; a run that never started has none."""


class Trainer:
    """Trains a network by one of the methods of ``atlas train``; the same engine, settings, files and bits.

        trainer = Trainer(model, "trades", "cifar10", epochs=30, eps="8/255", beta=6, folder="runs/mine")
        run = trainer.fit()
        print(trainer.evaluate(attacks=("pgd-20", "autoattack"), size=1000).table())

    Args:
        model: a network of your own, images in [0, 1] -> logits; or a name or an import path, as for ``--model``;
            default: the data set's.
        method: its name; ``atlas methods`` lists them.
        data: a name or an import path, as for ``--dataset``; a ``Dataset``; or ``DataSplits``.
        folder: where checkpoints, log.csv and weights go; default: nowhere. A run that is there already is refused:
            ``stored.resume`` goes on with it.
        callbacks: told of start, epochs and end, in this order.
        show: progress: auto, live, plain or silent.
        settings: of ``TrainConfig``, and hyper-parameters of the method, by name. A name or a value that cannot be is
            refused here, before any data are read.
    """

    def __init__(
        self,
        model: nn.Module | str | None = None,
        method: str = "atlas",
        data: str | Dataset | DataSplits = "digits",
        *,
        folder: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Callback] = (),
        show: str = "auto",
        **settings: Any,
    ) -> None:
        name = data if isinstance(data, str) else data.name
        named = {} if model is None or isinstance(model, nn.Module) else {"model": model}
        own = _settings(method, settings)
        known = {"dataset": name} if isinstance(data, str) or name in datasets.names() else {}
        self.config: TrainConfig = from_dict({"method": method, "beside": (), **known, **named, **own}, "Trainer")
        self.model = model if isinstance(model, nn.Module) else None
        self.folder = None if folder is None else Path(folder)
        self.callbacks = tuple(callbacks)
        self.show = show
        self.run: Run | None = None
        self._data = data
        progress.make(show)  # which says what it may be
        if wrong := next((each for each in self.callbacks if not isinstance(each, Callback)), None):
            raise ValueError(f"callbacks must be instances of Callback, got {shown(wrong)}: derive its class from it")

    @property
    def splits(self) -> DataSplits:
        """The data, read when they are asked for first."""
        if isinstance(self._data, str):
            self._data = engine.load_splits(self.config)
        elif isinstance(self._data, Dataset):
            self._data = self._data(self.config.data_dir, self.config.download)
        return self._data

    def fit(self) -> Run:
        """Trains, and gives the finished run: ``run.final_model`` is the network. Raises as ``engine.train``."""
        display = progress.make(self.show)
        try:
            return engine.train(
                self.config, splits=self.splits, model=self.model, folder=self.folder, display=display,
                on_epoch=self._on_epoch, on_start=self._on_start,
            )  # fmt: skip
        finally:
            for callback in self.callbacks if self.run else ():
                callback.on_end(self._running())

    @overload
    def evaluate(self, eps: float | None = None, *, attacks: None = None, **how: Any) -> Evaluation: ...
    @overload
    def evaluate(
        self, eps: float | Sequence[float] | None = None, *, attacks: Sequence[str] | str, **how: Any
    ) -> Report: ...
    def evaluate(
        self,
        eps: float | Sequence[float] | None = None,
        *,
        attacks: Sequence[str] | str | None = None,
        **how: Any,
    ) -> Evaluation | Report:
        """Accuracies of the trained network on the test images: with names of attacks a ``Report``, else clean, FGSM
        and PGD. eps: default: the run's. how: as for ``evaluate.evaluate``."""
        run = self._running()
        how = {"norm": run.config.norm, "size": run.config.eval_size, "channels_last": run.config.channels_last} | how
        at: Any = run.config.eps if eps is None else eps
        return evaluate(run.final_model, self.splits.test, at, attacks=attacks, **how)

    def _running(self) -> Run:
        if self.run is None:
            raise ValueError("nothing is trained yet: call fit() first, or atlas_train.load_model for what is stored")
        return self.run

    def _on_start(self, run: Run, step: TrainStep) -> None:
        self.run = run
        for callback in self.callbacks:
            callback.on_start(run)

    def _on_epoch(self, row: dict[str, Any]) -> bool:
        return any([callback.on_epoch(self._running(), row) for callback in self.callbacks])  # each of them is told


def _settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with hyper-parameters of the method in their place. Raises ValueError that names the nearest."""
    settings = [field.name for field in fields(TrainConfig)]
    own = methods.hyper_parameters(methods.get(method))
    for name in given:
        if name not in settings and name not in own:
            raise ValueError(
                f"Trainer: no setting, and no hyper-parameter of {method}, is called {shown(name)}"
                f"{suggestion(name, (*settings, *own))}"
            )
    hyper = {**given.get("hyper", {}), **{name: value for name, value in given.items() if name in own}}
    texts = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in given.items() if name in settings}
    return {**texts, "hyper": hyper}
