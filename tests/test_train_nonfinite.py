"""Losses that are NaN or infinite: the run stops, or leaves the batch out as if it had not been there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from atlas_train import checkpoint, engine, methods, nonfinite, progress
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.methods import Method
from atlas_train.nonfinite import Losses
from atlas_train.run import Run
from tiny_runs import TINY, same, splits, weights

#: The steps whose loss is made infinite.
BAD: set[int] = set()


def spoil(loss: Tensor, step: int) -> Tensor:
    return loss * float("inf") if step in BAD else loss


@dataclass(frozen=True)
class OneUpdate(Method):
    name: ClassVar[str] = "one_update"
    adversarial: ClassVar[bool] = False

    def prepare(self, model, batch, key, state):
        return state.step

    def objective(self, model, batch, given):
        return spoil(nn.functional.cross_entropy(model(batch.x), batch.y), given), {}


@dataclass(frozen=True)
class ThreeUpdates(OneUpdate):
    """Several updates on one batch, as Free has them; the second loss is the one that is spoiled."""

    name: ClassVar[str] = "three_updates"

    @property
    def updates(self) -> int:
        return 3

    def train_step(self, model, batch, key, state, descent):
        for update in range(3):
            loss, metrics = self.objective(model, batch, state.step if update == 1 else -1)
            descent.backward(loss, metrics)
            descent.step()
        return loss.detach(), metrics


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch):
    for method in (OneUpdate, ThreeUpdates):
        monkeypatch.setitem(methods._METHODS, method.name, method)
    BAD.clear()
    yield
    BAD.clear()


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"method": "one_update", "epochs": 2, "on_nonfinite": "skip"} | changed)


def watched(config: TrainConfig, see: Callable[[Run], None], **more: Any) -> Run:
    """Trains, and shows the run before every step."""
    method = type(config.build_method())
    train_step = method.train_step
    runs: list[Run] = []
    prepare = engine.prepare

    def spied(self: Method, *args: Any) -> Any:
        see(runs[0])
        return train_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "prepare", lambda *args: runs.append(prepare(*args)) or runs[0])
        patch.setattr(method, "train_step", spied)
        return engine.train(config, splits=splits(), **more)


@pytest.mark.parametrize("awp", [0.0, 0.01])
def test_a_skipped_batch_leaves_no_trace(awp: float) -> None:
    BAD.update({2, 5})
    seen: list[tuple[dict[str, Tensor], str]] = []
    run = watched(
        config(awp=awp), lambda run: seen.append((weights(run.model), str(run.optimizer.state_dict()["state"])))
    )
    for step in range(7):
        unchanged = same(seen[step][0], seen[step + 1][0]) and seen[step][1] == seen[step + 1][1]
        assert unchanged == (step in BAD)
    assert [row["skipped"] for row in run.history] == [1, 1] and run.skipped == 2 and run.step == 8
    assert all(row["loss"] < 10 for row in run.history)


def test_earlier_updates_of_the_batch_stay_and_the_statistics_do_not() -> None:
    BAD.add(2)
    seen: list[dict[str, Tensor]] = []
    run = watched(config(method="three_updates"), lambda run: seen.append(weights(run.model)))
    buffers = {name for name, _ in run.model.named_buffers()}
    for name in seen[2]:
        assert torch.equal(seen[2][name], seen[3][name]) == (name in buffers)
    assert run.skipped == 1 and all(value.isfinite().all() for value in seen[-1].values())


def test_a_run_stops_by_default() -> None:
    assert TrainConfig().on_nonfinite == "stop"
    assert "skipped" not in engine.train(config(on_nonfinite="stop"), splits=splits()).history[0]
    BAD.add(2)
    with pytest.raises(engine.NonFiniteLoss, match="not finite at step 2"):
        engine.train(config(on_nonfinite="stop"), splits=splits())


def test_an_epoch_without_any_batch_stops_the_run(tmp_path: Path) -> None:
    BAD.update(range(4, 8))
    with pytest.raises(engine.NonFiniteLoss, match="not finite at step 7") as caught:
        engine.train(config(), splits=splits(), folder=tmp_path)
    assert caught.value.checkpoint == tmp_path / "last.pt"


class Road(Losses):
    """Losses of a run on a device whose name says whether one waits for it."""

    def __init__(self, device: str, policy: str = "stop", folder: Path | None = None) -> None:
        self.run = SimpleNamespace(
            step=0, device=torch.device(device), config=config(on_nonfinite=policy), folder=folder
        )
        super().__init__(self.run)  # type: ignore[arg-type]
        self.reads = 0

    def drive(self, losses: Sequence[float], each: int = 1) -> None:
        """Steps with ``each`` such losses."""
        for loss in losses:
            for _ in range(each):
                self.add(torch.tensor([self.run.step]), torch.tensor(loss), {"adv": torch.tensor(0.5)})
            self.run.step += 1

    def read(self) -> None:
        self.reads += 1
        super().read()


@pytest.mark.parametrize("each", [1, 3])
def test_losses_on_cuda_are_read_a_few_steps_together(each: int, tmp_path: Path) -> None:
    road = Road("cuda")
    road.drive([1.0] * 3 * nonfinite.STEPS, each)
    assert road.reads == 3
    late = Road("cuda", folder=tmp_path)
    late.drive([1.0, float("inf"), float("nan")] + [1.0] * (nonfinite.STEPS - 4), each)
    with pytest.raises(engine.NonFiniteLoss, match=r"at step 1 \(loss inf, adv 0.5\)") as caught:
        late.drive([1.0], each)
    assert (caught.value.step, caught.value.ids, caught.value.checkpoint) == (1, [1], tmp_path / "last.pt")
    late.read()  # it has been told


def test_losses_at_the_end_of_an_epoch_are_read() -> None:
    road = Road("cuda")
    road.drive([1.0, float("nan")])
    with pytest.raises(engine.NonFiniteLoss, match="at step 1"):
        road.read()


@pytest.mark.parametrize(("device", "policy"), [("cpu", "stop"), ("cpu", "skip"), ("cuda", "skip")])
def test_elsewhere_a_loss_is_read_before_its_backward(device: str, policy: str) -> None:
    road = Road(device, policy)
    road.drive([1.0, 2.0])
    assert road.reads == 2
    with pytest.raises(engine.NonFiniteLoss, match="at step 2"):
        road.drive([float("nan")])


def test_a_loss_that_is_read_late_names_its_step_and_the_state_from_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: the third loss of the second epoch's four is infinite, and is read with the fourth."""

    class Late(Losses):
        def __init__(self, run: Run) -> None:
            super().__init__(run)
            self._steps = nonfinite.STEPS

    ids: list[list[int]] = []
    backward = engine.OptimizerDescent.backward

    def noted(descent: engine.OptimizerDescent, loss: Tensor, metrics: Any = None) -> None:
        ids.append(descent.look.args[0].tolist())  # type: ignore[attr-defined]
        backward(descent, loss, metrics)

    BAD.add(6)
    monkeypatch.setattr(engine, "Losses", Late)
    monkeypatch.setattr(engine.OptimizerDescent, "backward", noted)
    with pytest.raises(engine.NonFiniteLoss, match="at step 6") as caught:
        engine.train(config(on_nonfinite="stop"), splits=splits(), folder=tmp_path)
    assert len(ids) == 8 and caught.value.ids == ids[6]
    assert checkpoint.load(tmp_path)["epoch"] == 1


def test_skipped_batches_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BAD.update({1, 2, 6})
    compare(config(out_dir=str(tmp_path)), splits=splits(), show="plain")
    printed = capsys.readouterr().out
    assert "3 of 8 batches were skipped: their loss was not finite" in printed and "skipped 1" in printed
    folder = tmp_path / "one_update"
    assert [row["skipped"] for row in csv.DictReader((folder / "log.csv").open())] == ["2", "1"]
    assert json.loads((folder / "results.json").read_text())["methods"]["one_update"]["skipped"] == 3
    BAD.clear()
    again = engine.train(config(epochs=3, resume=str(folder)), splits=splits())
    assert again.skipped == 3 and again.history[-1]["skipped"] == 0
    row = again.history[-1] | {"epochs": 3, "eta": 0}
    assert "skipped" not in progress.describe(row)[1] and "skipped 4" in progress.describe(row | {"skipped": 4})[1]


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_an_update_that_breaks_the_network_is_no_result(tmp_path: Path, rule: str) -> None:
    """The last update of an epoch, after which no loss is looked at: the slope of a root at 0 times 0 is NaN."""

    class Rooted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)) + (0 * self.weight).sum().sqrt()

    with pytest.raises(engine.NonFiniteLoss, match="holds NaN or infinity after epoch 1, in weight for one; the"):
        engine.train(config(on_nonfinite=rule), splits=splits(16, 8), model=Rooted(64, 4), folder=tmp_path)
    assert checkpoint.load(tmp_path)["epoch"] == 0 and not (tmp_path / checkpoint.export_name()).exists()


def test_infinities_from_the_start_are_a_mask() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert engine.train(config(), splits=splits(), model=model).epoch == 2
