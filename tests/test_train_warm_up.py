"""A warm-up: all that a run does once is done by then, and what follows is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.capture import Recording
from atlas_train import engine, optimizers
from atlas_train.config import TrainConfig
from atlas_train.run import Run
from atlas_train.step_graph import StepGraph
from atlas_train.warm_up import STEPS, warm_up
from fake_graph import recorded
from tiny_runs import TINY, splits

SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4}
#: Methods with memory of each kind, with steps that take turns, and one whose step moves weights several times.
FORMS: list[dict[str, Any]] = [
    {"method": "atlas"},
    {"method": "atlas", "hyper": {"local": "start", "start_noise": "pgi"}},
    {"method": "liet"},
    {"method": "fgsm_uap"},
    {"method": "nuat"},
    {"method": "free"},
    {"method": "adv", "awp": 0.01},
    {"method": "trades", "mixup": 1.0},
    {"method": "one_step_adv", "optimizer": "adam", "lr": 5e-3},
    {"method": "one_step_adv", "averaging": "swa", "schedule": "one_cycle", "schedule_step": "epoch",
     "momentum": 0.95, "momentum_low": 0.85},
]  # fmt: skip


class Net(nn.Module):
    """BatchNorm, and dropout, which draws from torch's generator."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.bn, self.drop, self.out = nn.BatchNorm2d(1), nn.Dropout(dropout), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.bn(x)).flatten(1))  # type: ignore[no-any-return]


def moved(run: Run) -> dict[str, Tensor]:
    """All that a step moves, and what it draws from."""
    networks = {"model": run.model.state_dict(), "average": run.average.state_dict()["model"] if run.average else {}}
    found = {f"{name}.{key}": value for name, values in networks.items() for key, value in values.items()}
    for number, state in run.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in state.items()}
    count = torch.tensor(run.average.state_dict()["count"] if run.average else 0)
    return {n: v.clone() for n, v in {**found, **run.memory, "count": count, "rng": torch.get_rng_state()}.items()}


def trained(form: dict[str, Any], on_start: engine.OnStart | None = None, dropout: float = 0.3, **changed: Any) -> Run:
    settings = TINY | SGD | {"epochs": 2, "probe_size": 0, "averaging": "ema"} | form | changed
    return engine.train(TrainConfig(**settings), splits=splits(), model=Net(dropout), on_start=on_start)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_it_leaves_all_as_it_was(form: dict[str, Any]) -> None:
    seen: list[dict[str, Tensor]] = []

    def look(run: Run, step: Any) -> None:
        def first(*arguments: Any) -> Any:
            seen.append(moved(run))
            return step(*arguments)

        before, settings = moved(run), [dict(group) for group in run.optimizer.param_groups]
        warm_up(run, first)
        same(moved(run), before)
        assert all(weight.grad is None for weight in run.model.parameters())
        for group, old in zip(run.optimizer.param_groups, settings, strict=True):
            assert [name for name in old if name != "params" and group[name] != old[name]] == []

    warm, cold = trained(form, look), trained(form)
    same(moved(warm), moved(cold))
    assert [row["loss"] for row in warm.history] == [row["loss"] for row in cold.history]
    assert len(seen) == STEPS and not torch.equal(seen[0]["model.out.weight"], seen[-1]["model.out.weight"])


@pytest.mark.parametrize("form", [f for f in FORMS if f["method"] != "free" and "momentum_low" not in f])
def test_graphs_are_recorded_by_then_and_make_the_same_weights(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the optimisers of CUDA, whose memory the graphs write to."""
    recordings: list[str] = []
    now = ["warm-up"]

    def recorder(call: Callable[[], Any], device: torch.device, **how: Any) -> Recording:
        recordings.append(now[0])
        return recorded(call, device, **how)

    def warm(run: Run, step: Any) -> None:
        warm_up(run, step)
        now[0] = "training"

    monkeypatch.setattr(optimizers, "fusible", lambda weight: True)
    cold = trained(form, dropout=0.0)  # which eager steps and graphs draw from other generators
    monkeypatch.setattr(
        engine, "make_train_step", lambda run, display: StepGraph(run.method, run.optimizer, pytest.fail, recorder)
    )
    same(moved(trained(form, warm, dropout=0.0)), moved(cold))
    assert set(recordings) == {"warm-up"}


def test_memory_that_is_there_is_put_back_where_it_lies() -> None:
    """As of a run that goes on; and the images of a small set are fewer than the warm-up's steps want."""

    def look(run: Run, step: Any) -> None:
        run.memory.update({name: torch.rand(64, 1, 8, 8) * 0.05 for name in run.method.stores})
        before, places = moved(run), {name: value.data_ptr() for name, value in run.memory.items()}
        warm_up(run, step)
        same(moved(run), before)
        assert {name: value.data_ptr() for name, value in run.memory.items()} == places

    assert trained({"method": "fgsm_pgi"}, look, epochs=1, batch_size=48).epoch == 1


def test_what_goes_wrong_in_it_is_put_back_too() -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no")

    def look(run: Run, step: Any) -> None:
        before = moved(run)
        with pytest.raises(RuntimeError, match="no"):
            warm_up(run, fails)
        same(moved(run), before)

    trained({"method": "standard"}, look, epochs=1)
