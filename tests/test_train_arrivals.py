"""Losses are looked at as they arrive: in order, at the latest ``lag`` steps later, and nothing else is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_train import arrivals, checkpoint, engine
from atlas_train.arrivals import Arrivals
from atlas_train.config import TrainConfig
from tiny_runs import TINY, splits


class Event:
    """Comes to pass when told so, or when waited for."""

    def __init__(self) -> None:
        self.past, self.waits = False, 0

    def query(self) -> bool:
        return self.past

    def synchronize(self) -> None:
        self.past, self.waits = True, self.waits + 1


class Road:
    """Sends numbers that arrive when their event does, and notes what is looked at."""

    def __init__(self, lag: int) -> None:
        self.events: list[Event] = []
        self.seen: list[int] = []
        self.arrivals = Arrivals(self._look, lag, self.send)

    def send(self, number: Tensor) -> tuple[Tensor, Event]:
        self.events.append(Event())
        return number, self.events[-1]

    def _look(self, step: int, number: Tensor, about: Any) -> None:
        assert self.events[len(self.seen)].past, "looked at before it was there"
        assert number.item() == step and about == f"step {step}"
        self.seen.append(step)

    def add(self, step: int) -> None:
        self.arrivals.add(step, torch.tensor(float(step)), f"step {step}")

    @property
    def waits(self) -> list[int]:
        return [event.waits for event in self.events]


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
def test_the_cpu_is_ahead_by_lag_steps_and_waits_for_no_newer_one(lag: int) -> None:
    road = Road(lag)
    for step in range(8):
        road.add(step)
        assert road.seen == list(range(max(0, step - lag + 1)))
        assert road.waits == [1] * len(road.seen) + [0] * (step + 1 - len(road.seen))
    road.arrivals.finish()
    assert road.seen == list(range(8)) and road.waits == [1] * 8
    road.arrivals.finish()


def test_what_has_arrived_is_looked_at_without_waiting() -> None:
    road = Road(3)
    for step in range(3):
        road.add(step)
    road.events[0].past = road.events[2].past = True  # the last overtakes nobody
    road.add(3)
    assert road.seen == [0] and road.waits == [0] * 4
    road.events[1].past = True
    road.add(4)
    assert road.seen == [0, 1, 2] and road.waits == [0] * 5


def test_the_lag_counts_steps_of_several_losses() -> None:
    road = Road(2)
    for step in (0, 0, 0, 1, 1):
        road.add(step)
    assert road.seen == []
    road.add(2)
    assert road.seen == [0, 0, 0] and road.waits == [1, 1, 1, 0, 0, 0]


def test_a_number_on_the_cpu_is_there_at_once() -> None:
    seen: list[int] = []
    Arrivals(lambda step, number, about: seen.append(step), 2).add(0, torch.tensor(1.0), None)
    assert seen == [0]


def test_the_error_names_the_step_that_failed_and_the_state_from_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses that arrive two steps late, as on CUDA; the third of the second epoch's four is infinite."""
    ids: list[list[int]] = []
    backward, adv = engine.OptimizerSteps.backward, TrainConfig(**TINY | {"method": "one_step_adv"})

    def spoiled(descent: engine.OptimizerSteps, loss: Tensor, metrics: Any = None) -> None:
        ids.append(descent._batch.ids.tolist())
        backward(descent, loss * (float("inf") if descent.run.step == 5 else 1.0), metrics)

    monkeypatch.setattr(engine.OptimizerSteps, "backward", spoiled)
    monkeypatch.setattr(engine, "Arrivals", lambda look, lag: Arrivals(look, 2, lambda number: (number, Event())))
    with pytest.raises(engine.NonFiniteLoss, match=r"at step 5 \(loss inf, adv 1\)") as caught:
        engine.train(adv, splits=splits(), folder=tmp_path)
    assert len(ids) == 8 and caught.value.ids == ids[5]  # step 7 was under way
    assert checkpoint.load(tmp_path)["epoch"] == 1

    ids.clear()
    monkeypatch.setattr(engine, "Arrivals", lambda look, lag: Arrivals(look, 9, lambda number: (number, Event())))
    with pytest.raises(engine.NonFiniteLoss, match="at step 5"):  # at the end of the epoch at the latest
        engine.train(adv, splits=splits())
    assert len(ids) == 8


def test_a_run_waits_for_old_losses_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    lags = []
    monkeypatch.setattr(engine, "Arrivals", lambda look, lag: lags.append(lag) or Arrivals(look, lag))
    for policy in ("stop", "skip"):
        config = TrainConfig(**TINY | {"device": device.type, "epochs": 1, "on_nonfinite": policy})
        engine.train(config, splits=splits())
    assert lags == [engine.LAG if device.type == "cuda" else 0, 0]


@pytest.mark.gpu
def test_a_number_is_sent_from_cuda_without_waiting() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    number = torch.ones((), device="cuda")
    torch.cuda._sleep(200_000_000)
    sent, event = arrivals.send(number)
    assert event is not None and not event.query() and sent.is_pinned()
    event.synchronize()
    assert sent.item() == 1.0
