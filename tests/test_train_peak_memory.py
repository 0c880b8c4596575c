"""Peak memory of training: what counts, on a CPU to the byte, and on CUDA as torch has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atlas_train import engine
from atlas_train.config import TrainConfig
from atlas_train.peak_memory import of_training, watched
from atlas_train.run import Run
from tiny_runs import TINY, same, splits, weights

SGD = {"optimizer": "sgd", "method": "adv"}


def trained(**changed: Any) -> Run:
    return engine.train(TrainConfig(**TINY | SGD | {"epochs": 1} | changed), splits=splits())


def test_on_a_cpu_it_is_what_is_kept_and_the_most_of_a_step() -> None:
    run = trained()
    before, random = weights(run.model), torch.get_rng_state()
    peak = of_training(run)
    assert same(weights(run.model), before) and torch.equal(torch.get_rng_state(), random)
    parameters = sum(p.nbytes for p in run.model.parameters())
    network = parameters + sum(b.nbytes for b in run.model.buffers())
    assert peak is not None and peak > network + 2 * parameters  # momentum and gradients
    assert of_training(trained(momentum=0.0)) == peak - parameters
    assert of_training(trained(averaging="swa", swa_start=0.9)) == peak + network  # held before it begins, too
    run.memory["kept"] = torch.zeros(1000)
    assert of_training(run) == peak + 4000
    double = of_training(trained(batch_size=32))
    fixed = network + 2 * parameters
    assert double is not None and 1.8 * (peak - fixed) < double - fixed < 2 * (peak - fixed)
    less = of_training(trained(checkpoint_activations=True, method="standard"))
    more = of_training(trained(method="standard"))
    assert less is not None and more is not None and less < more <= peak


def test_somebody_elses_profiler_is_left_alone() -> None:
    run = trained()
    with torch.profiler.profile() as profile:
        found = of_training(run)
        torch.zeros(3).add_(1)
    assert found is None and any(event.key == "aten::add_" for event in profile.key_averages())


def test_on_cuda_it_is_the_largest_of_all_epochs_of_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[torch.device] = []
    peaks = iter([300, 700, 500])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    run: Any = SimpleNamespace(device=torch.device("cuda"), peak_memory=0)
    seen = []
    for _ in range(3):
        with watched(run):
            seen.append(len(resets))  # from the beginning of the epoch on
        seen.append(run.peak_memory)
    assert seen == [1, 300, 2, 700, 3, 700] and of_training(run) == 700
    assert of_training(SimpleNamespace(device=torch.device("cuda"), peak_memory=0)) is None  # type: ignore[arg-type]


def test_a_run_that_goes_on_knows_the_peak_from_before(tmp_path: Any) -> None:
    run = engine.train(TrainConfig(**TINY | SGD | {"epochs": 1}), splits=splits(), folder=tmp_path)
    run.peak_memory = 1234
    engine.save(run)
    resumed = engine.train(TrainConfig(**TINY | SGD | {"epochs": 2, "resume": str(tmp_path)}), splits=splits())
    assert resumed.peak_memory == 1234
