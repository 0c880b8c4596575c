"""`Trainer`: the engine of `atlas train`, to the same bits, with callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import atlas_train
from atlas_train import checkpoint, engine, models
from atlas_train.config import TrainConfig
from atlas_train.data import Pictures
from atlas_train.run import Run
from atlas_train.trainer import Callback, Trainer
from tiny_runs import TINY, same, splits, weights

QUICK: dict[str, Any] = {key: value for key, value in TINY.items() if key not in ("model", "beside")} | {"epochs": 2}


class Told(Callback):
    """Keeps what it is told; may end the training after an epoch, or raise."""

    def __init__(self, last: int = 0, error: type[BaseException] | None = None) -> None:
        self.told: list[tuple[str, int]] = []
        self.last, self.error = last, error

    def on_start(self, run: Run) -> None:
        self.told.append(("start", run.epoch))

    def on_epoch(self, run: Run, row: Mapping[str, Any]) -> bool:
        assert row["epoch"] == run.epoch == run.history[-1]["epoch"]
        self.told.append(("epoch", run.epoch))
        if self.error:
            raise self.error
        return run.epoch == self.last

    def on_end(self, run: Run) -> None:
        self.told.append(("end", run.epoch))


def test_it_trains_as_the_engine_does(tmp_path: Path) -> None:
    told = Told()
    settings = QUICK | {"train_size": 32}
    trainer = Trainer(
        "digits_net", "adv", splits(), steps=3, folder=tmp_path / "run", callbacks=[told], show="silent", **settings
    )
    run = trainer.fit()
    config = TrainConfig(**TINY | {"method": "adv", "epochs": 2, "train_size": 32, "hyper": {"steps": 3}})
    assert same(weights(run.final_model), weights(engine.train(config, splits=splits()).final_model))
    assert told.told == [("start", 0), ("epoch", 1), ("epoch", 2), ("end", 2)]
    assert same(weights(atlas_train.load_model(tmp_path / "run")[0]), weights(run.final_model))
    found = trainer.evaluate(steps=2)
    report = trainer.evaluate(attacks="pgd-2", size=40)
    assert report.accuracy("pgd-2") == found.pgd and found.eps == TINY["eps"]
    with pytest.raises(FileExistsError, match="already holds a run"):
        trainer.fit()


def test_a_callback_ends_the_training_and_the_others_are_told() -> None:
    first, second = Told(last=1), Told()
    own = models.build("digits_net", num_classes=4, in_channels=1, width=4)
    run = Trainer(own, "standard", splits(), callbacks=[first, second], show="silent", **QUICK).fit()
    assert run.epoch == 1 and run.model is own
    assert first.told == second.told == [("start", 0), ("epoch", 1), ("end", 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_end_is_told_after_an_error_too(error: type[BaseException], tmp_path: Path) -> None:
    """And the checkpoint of the whole epoch is there."""
    told = Told(error=error)
    trainer = Trainer(
        "digits_net", "standard", splits(), callbacks=[told], show="silent", folder=tmp_path / "r", **QUICK
    )
    with pytest.raises(error):
        trainer.fit()
    assert told.told[-1] == ("end", 1) and checkpoint.load(tmp_path / "r")["epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"epcohs": 3},
            "Trainer: no setting, and no hyper-parameter of adv, is called 'epcohs'; the nearest is 'epochs'",
        ),
        ({"stepz": 3}, "is called 'stepz'; the nearest is 'steps'"),
        ({"epochs": "many"}, "Trainer: epochs must be an integer >= 1, got 'many'"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"method": "adw"}, "no method 'adw'; the nearest is 'adv'"),
        ({"show": "bars"}, "progress must be auto, live, plain or silent"),
        ({"callbacks": [print]}, "callbacks must be instances of Callback"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(**{"method": "adv", "data": splits()} | arguments)


def test_nothing_is_evaluated_before_it_is_trained() -> None:
    with pytest.raises(ValueError, match=r"call fit\(\) first"):
        Trainer("digits_net", data=splits()).evaluate()


def test_pictures_are_read_as_its_settings_say(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate("aabb"):
        (tmp_path / name).mkdir(exist_ok=True)
        image.new("RGB", (10, 12), (60 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    trainer = Trainer("small_cnn", "adv", "folder", data_dir=tmp_path, image_size=8, grey=True, stream=True)
    assert isinstance(trainer.splits.train, Pictures) and trainer.splits.train.shape == (1, 8, 8)
