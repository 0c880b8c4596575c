"""Averages of the weights: what they are, where they are used, and that they survive a restart to the bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_train import averaging, checkpoint, engine
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.evaluate import evaluate
from atlas_train.noise import noise_keys
from atlas_train.run import Run
from atlas_train.stored import resume
from tiny_runs import EPS, TINY, Lines, same, splits, weights


def config(kind: str, **changed: Any) -> TrainConfig:
    more = {
        "averaging": kind,
        "method": "standard",
        **({"swa_start": 0.5} if kind == "swa" else {"ema_decay": 0.8}),
        "lr": 0.02,
        "ema_warmup": False,
    }
    return TrainConfig(**TINY | more | changed)


def trained(config: TrainConfig, **more: Any) -> tuple[Run, list[dict[str, Tensor]]]:
    """The run, and the network after every batch."""
    seen = []
    after_batch = averaging.Averaging.after_batch

    def spied(self: averaging.Averaging, model: nn.Module) -> None:
        seen.append(weights(model))
        after_batch(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averaging.Averaging, "after_batch", spied)
        return engine.train(config, splits=splits(), **more), seen


def assert_is(run: Run, expected: dict[str, Tensor]) -> None:
    network = run.final_model
    assert network is not run.model and len(expected) > 5
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_ema_follows_every_batch_with_its_statistics() -> None:
    run, seen = trained(config("ema", epochs=2))
    assert len(seen) == 8
    expected = seen[0]
    for now in seen[1:]:
        expected = {k: 0.8 * expected[k] + 0.2 * v if v.is_floating_point() else v for k, v in now.items()}
    assert_is(run, expected)
    name = next(name for name in expected if name.endswith("running_var"))
    assert not torch.allclose(expected[name], seen[-1][name], rtol=1e-2)


def test_swa_is_the_mean_over_the_ends_of_the_last_epochs() -> None:
    run, seen = trained(config("swa"))
    ends = seen[3::4][2:]  # of epochs 3 and 4
    assert len(ends) == 2
    floating = {k: v.is_floating_point() for k, v in ends[0].items()}
    assert_is(run, {k: (ends[0][k] + ends[1][k]) / 2 if floating[k] else ends[1][k] for k in floating})
    one, seen = trained(config("swa", epochs=1, swa_start=0.75))
    assert_is(one, seen[-1])


def test_before_its_first_epoch_swa_has_nothing_to_give() -> None:
    run = engine.train(config("swa", swa_start=0.75), splits=splits(), on_epoch=lambda row: row["epoch"] == 3)
    assert run.final_model is run.model
    assert engine.train(config("none", epochs=1), splits=splits()).average is None


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_resumed_run_has_the_same_average_to_the_bit(tmp_path: Path, kind: str) -> None:
    whole = engine.train(config(kind), splits=splits(), folder=tmp_path / "whole")
    engine.train(config(kind), splits=splits(), folder=tmp_path / "part", on_epoch=lambda row: row["epoch"] == 3)
    assert checkpoint.load(tmp_path / "part")["average"]["count"] == {"ema": 12, "swa": 1}[kind]
    resumed = engine.train(config(kind, resume=str(tmp_path / "part")), splits=splits())
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.final_model), weights(whole.final_model))
    with pytest.raises(ValueError, match="another averaging"):
        engine.train(config("none", resume=str(tmp_path / "part")), splits=splits())


def test_averaging_changes_nothing_in_training() -> None:
    plain = engine.train(config("none"), splits=splits())
    averaged = engine.train(config("ema"), splits=splits())
    assert same(weights(plain.model), weights(averaged.model))
    numbers = ("loss", "clean", "probe")
    assert [[row.get(n) for n in numbers] for row in plain.history] == [
        [row.get(n) for n in numbers] for row in averaged.history
    ]


def test_evaluation_and_exports_are_the_average_and_the_checkpoint_has_both(tmp_path: Path) -> None:
    settings = config("ema", ema_decay=0.97, epochs=2, out_dir=str(tmp_path))
    reported = compare(settings, splits=splits(), show="silent", say=lambda text: None)["standard"].evaluation
    folder = tmp_path / "standard"
    state = checkpoint.load(folder)
    assert not same(state["model"], state["average"]["model"])
    for file in ("last.pt", checkpoint.export_name()):
        if file.endswith((".safetensors", "last.pt")):
            model, _ = checkpoint.load_model(folder / file)
            assert same(weights(model), state["average"]["model"])
    of_average = evaluate(model, splits().test, EPS)
    model.load_state_dict(state["model"])
    of_network = evaluate(model, splits().test, EPS)
    assert (of_average.clean, of_average.pgd) == (reported.clean, reported.pgd)
    assert (of_network.clean, of_network.pgd) != (reported.clean, reported.pgd)


def test_the_average_is_of_weights_without_awps_perturbation() -> None:
    run, seen = trained(config("ema", epochs=1, ema_decay=0.0, awp=0.3))
    assert_is(run, seen[-1])
    assert all(torch.allclose(a, b) for a, b in zip(run.final_model.parameters(), run.model.parameters(), strict=True))


def test_a_skipped_batch_is_not_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    add = engine.Losses.add

    def fail_at_two(losses: engine.Losses, ids: Tensor, loss: Tensor, metrics: Any) -> None:
        add(losses, ids, loss / (0 if losses._run.step == 2 else 1), metrics)

    monkeypatch.setattr(engine.Losses, "add", fail_at_two)
    run, seen = trained(dataclasses.replace(config("ema", epochs=1), on_nonfinite="skip"))
    assert run.skipped == 1 and len(seen) == 3


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_infinities_of_a_mask_stay(kind: str) -> None:
    """The mean of -inf and -inf is NaN where it is taken by their difference."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    run = engine.train(config(kind, swa_start=0.0), splits=splits(), model=model)
    assert run.final_model.mask.tolist() == [0, -torch.inf]  # type: ignore[operator, union-attr]


def test_ema_warms_up() -> None:
    """decay min(d, (1 + t) / (10 + t)) after t batches, and that is what new runs do."""
    assert TrainConfig().ema_warmup
    run, seen = trained(config("ema", epochs=2, ema_warmup=True, ema_decay=0.35))
    expected = seen[0]
    for t, now in enumerate(seen[1:], 1):
        d = min(0.35, (1 + t) / (10 + t))
        expected = {k: d * expected[k] + (1 - d) * v if v.is_floating_point() else v for k, v in now.items()}
    assert_is(run, expected)
    made = averaging.Averaging(config("ema", ema_warmup=True, ema_decay=0.999), run.model)
    assert [made.decay(t) for t in (1, 8, 10**6)] == [2 / 11, 0.5, 0.999]


def test_a_checkpoint_of_an_earlier_version_keeps_its_average(tmp_path: Path) -> None:
    """Its record says nothing of a warm-up: it had none, and that is no change."""
    whole = engine.train(config("ema"), splits=splits())
    engine.train(config("ema"), splits=splits(), folder=tmp_path, on_epoch=lambda row: row["epoch"] == 2)
    state = checkpoint.load(tmp_path)
    del state["config"]["ema_warmup"]
    checkpoint.save(tmp_path / "last.pt", {key: value for key, value in state.items() if key != "format"})
    run = resume(tmp_path, splits=splits())
    assert not run.config.ema_warmup and run.changes == []
    assert same(weights(run.final_model), weights(whole.final_model))


@pytest.mark.parametrize("how", ["clean", "method"])
def test_batchnorm_of_an_average_can_be_measured_anew(how: str) -> None:
    """As a pass over the images of the last epoch in train mode leaves it, averaged over the batches."""
    run = engine.train(config("swa", average_bn=how, method="adv", hyper={"steps": 2}), splits=splits())
    plain = engine.train(config("swa", method="adv", hyper={"steps": 2}), splits=splits())
    assert same(weights(run.model), weights(plain.model))  # training goes on unseen
    for (name, mine), theirs in zip(run.final_model.named_parameters(), plain.final_model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    network = copy.deepcopy(plain.final_model).train()
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = 1.0
    sums = [torch.zeros(2, len(layer.weight)) for layer in layers]
    run.batches.set_epoch(3)
    for batch, key in zip(run.batches, noise_keys(0, 12, 4), strict=True):
        given = run.method.prepare(network, batch, key, run.state) if how == "method" else batch.x
        network(given)
        for total, layer in zip(sums, layers, strict=True):
            total += torch.stack([layer.running_mean, layer.running_var]) / 4  # type: ignore[list-item]
    measured = [module for module in run.final_model.modules() if isinstance(module, nn.BatchNorm2d)]
    for total, layer in zip(sums, measured, strict=True):
        torch.testing.assert_close(torch.stack([layer.running_mean, layer.running_var]), total)  # type: ignore[list-item]
        assert layer.momentum == 0.1
    assert not torch.allclose(measured[0].running_var, layers[0].running_var, rtol=1e-3)  # type: ignore[arg-type]


def test_measured_statistics_are_in_the_checkpoint_and_after_a_restart(tmp_path: Path) -> None:
    settings = config("swa", average_bn="method", method="free", hyper={})
    whole = engine.train(settings, splits=splits(), folder=tmp_path / "whole")
    model, _ = checkpoint.load_model(tmp_path / "whole")
    assert same(weights(model), weights(whole.final_model))
    engine.train(settings, splits=splits(), folder=tmp_path / "part", on_epoch=lambda row: row["epoch"] == 3)
    resumed = engine.train(dataclasses.replace(settings, resume=str(tmp_path / "part")), splits=splits())
    assert same(weights(resumed.final_model), weights(whole.final_model))
    assert same(resumed.memory, whole.memory)


def test_an_average_that_never_began_is_said(tmp_path: Path) -> None:
    lines = Lines()
    stop: dict[str, Any] = {"on_epoch": lambda row: row["epoch"] == 2, "display": lines, "folder": tmp_path}
    engine.train(config("swa", swa_start=0.75), splits=splits(), **stop)
    (said,) = [text for text in lines.said if "WARNING" in text]
    assert (
        "averaging 'swa' begins with epoch 4, and training ended after epoch 2" in said and "smaller swa_start" in said
    )
    with pytest.warns(UserWarning, match="averaging 'swa' had not begun .* are the weights in training"):
        checkpoint.load_model(tmp_path)
    lines.said.clear()
    engine.train(config("swa", swa_start=0.75), splits=splits(), display=lines)
    assert not any("WARNING" in text for text in lines.said)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"extra_share": 0.3}, "extra_share=0.3 changes nothing, as extra_data is not given"),
        ({"ema_decay": 0.9}, "ema_decay=0.9 changes nothing, as averaging is none"),
        ({"averaging": "ema", "swa_start": 0.5}, "swa_start=0.5 changes nothing, as averaging is ema"),
        ({"average_bn": "clean"}, "average_bn=clean changes nothing, as averaging is none"),
    ],
)
def test_a_setting_without_the_one_that_it_belongs_to_is_said(setting: dict[str, Any], why: str) -> None:
    lines = Lines()
    engine.train(TrainConfig(**TINY | {"epochs": 1} | setting), splits=splits(), display=lines)
    assert lines.said == [f"WARNING: {why}"]


def test_an_average_that_will_hold_its_first_weights_is_said() -> None:
    lines = Lines()
    engine.train(config("ema", ema_decay=0.999, epochs=1), splits=splits(), display=lines)
    (said,) = [text for text in lines.said if "WARNING" in text]
    assert "will hold 100 % of the weights after the first batch at the end of 4 batches: set ema_warmup" in said
    lines.said.clear()
    engine.train(config("ema", ema_decay=0.999, epochs=1, ema_warmup=True), splits=splits(), display=lines)
    assert not any("WARNING" in text for text in lines.said)
