"""The training loop and what it leaves behind: resuming to the bit, alarms, checkpoints, logs, evaluation."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.attacks import FGSM, PGD
from atlas_train import checkpoint, engine, methods, progress, report, saving, schedules, watch
from atlas_train import evaluate as evaluation
from atlas_train import run as runs
from atlas_train.attack_share import AttackShare, part_of
from atlas_train.config import RETIRED, TrainConfig, from_dict, from_file, resolved, to_dict
from atlas_train.data import Images, get, names
from atlas_train.evaluate import evaluate, predict
from atlas_train.noise import noise_keys
from tiny_runs import EPS, TINY, Lines, splits


class Dropping(nn.Module):
    """BatchNorm and dropout: what draws random numbers and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(4 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.bn(self.conv(x)).relu().flatten(1)))  # type: ignore[no-any-return]


def dropping() -> Dropping:
    torch.manual_seed(5)
    return Dropping()


def state(run: runs.Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- the loop


@pytest.mark.parametrize("method", ["standard", "one_step_adv", "adv", "atlas"])
def test_training_learns_and_logs(method: str) -> None:
    config = TrainConfig(method=method, hyper={"steps": 2} if method == "adv" else {}, **TINY)
    run = engine.train(config, splits=splits())
    assert (run.epoch, run.step, len(run.history)) == (4, 16, 4)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    result = evaluate(run.model, run.splits.test, EPS)
    assert result.clean > 0.8 and result.images == 40
    row = run.history[-1]
    assert {"epoch", "step", "lr", "loss", "probe", "images_per_s", "seconds"} <= set(row)
    assert ("clean" in row) == (method in ("standard", "atlas")) and ("adv" in row) == (method != "standard")
    assert (row["probe"] is None) == (method == "standard")
    assert 0 < row["seconds"] == run.seconds


@pytest.mark.parametrize(("method", "optimizer"), [("atlas", "adam"), ("one_step_adv", "sgd")])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, method: str, optimizer: str) -> None:
    config = TrainConfig(**TINY | {"method": method, "optimizer": optimizer})
    whole = engine.train(config, splits=splits(), model=dropping(), folder=tmp_path / "whole")

    folder = tmp_path / "killed"
    rate = runs.Run.rate

    def killed(run: runs.Run, update: int) -> float:
        if run.step == 10:  # in the middle of the third epoch
            raise KeyboardInterrupt
        return rate(run, update)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "rate", killed)
        engine.train(config, splits=splits(), model=dropping(), folder=folder)
    assert checkpoint.load(folder)["epoch"] == 2
    torch.manual_seed(123)  # another process has another random state
    resumed = engine.train(dataclasses.replace(config, resume=str(folder)), splits=splits(), model=dropping())
    assert_same(state(resumed), state(whole))
    assert resumed.folder == folder and resumed.step == whole.step
    drop = ("seconds", "images_per_s")
    strip = [[{k: v for k, v in row.items() if k not in drop} for row in run.history] for run in (resumed, whole)]
    assert strip[0] == strip[1]
    rows = list(csv.DictReader((folder / saving.LOG).open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


def test_a_finished_run_can_go_on_for_more_epochs(tmp_path: Path) -> None:
    config = TrainConfig(**TINY | {"schedule": "constant"})
    engine.train(dataclasses.replace(config, epochs=2), splits=splits(), folder=tmp_path / "a")
    more = engine.train(dataclasses.replace(config, resume=str(tmp_path / "a")), splits=splits())
    assert_same(state(more), state(engine.train(config, splits=splits())))  # a constant lr does not know the end
    changed = dataclasses.replace(config, resume=str(tmp_path / "a"), weight_decay=0.5)
    assert engine.train(changed, splits=splits()).optimizer.param_groups[0]["weight_decay"] == 0.5
    with pytest.raises(
        ValueError, match="has done 4 epochs already, you gave epochs=[0-9]+: give epochs=5 or more, or 4 "
    ):
        engine.train(dataclasses.replace(config, epochs=3, resume=str(tmp_path / "a")), splits=splits())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adv"}, "another method: it has 'atlas', you gave 'adv'"),
        ({"hyper": {"radius": 0.07}}, "other hyper-parameters"),
        ({"eps": 0.2}, "other hyper-parameters"),
        ({"width": 8}, "another model width: it has 4, you gave 8"),
        ({"optimizer": "sgd"}, "another optimizer"),
        ({"seed": 1}, "another seed"),
        ({"batch_size": 8}, "another batch_size"),
        (
            {"method": "adv", "width": 8},
            "another method: it has 'atlas', you gave 'adv'; another model width: it has 4",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), folder=tmp_path)
    with pytest.raises(ValueError, match=f"cannot be resumed with {message}"):
        engine.train(TrainConfig(**TINY | change, resume=str(tmp_path)), splits=splits())
    with pytest.raises(ValueError, match="another model name: it has 'digits_net', you gave 'Dropping'"):
        engine.train(TrainConfig(**TINY, resume=str(tmp_path)), splits=splits(), model=dropping())


def test_noise_keys_depend_on_seed_and_step_alone() -> None:
    keys = noise_keys(0, 0, 1000)
    assert keys.dtype == torch.int64 and keys.shape == (1000, 2) and (keys[:, 1] == 0).all()
    assert torch.equal(torch.cat([noise_keys(0, 0, 7), noise_keys(0, 7, 993)]), keys)
    seeds = torch.cat([keys[:, 0], noise_keys(1, 0, 1000)[:, 0], noise_keys(2**40, 0, 1000)[:, 0]])
    assert len(seeds.unique()) == 3000
    ones = sum(bin(seed % 2**64).count("1") for seed in seeds.tolist()) / (64 * 3000)
    assert abs(ones - 0.5) < 0.01  # well mixed: half of the bits
    assert noise_keys(0, 0, 0).shape == (0, 2)


def spy(monkeypatch: pytest.MonkeyPatch, see: Callable[..., Any]) -> None:
    """``see`` is told of every training step before it is made."""
    train_step = methods.Method.train_step

    def spied(self: methods.Method, *args: Any) -> Any:
        see(*args)
        return train_step(self, *args)

    monkeypatch.setattr(methods.Method, "train_step", spied)


def test_every_step_gets_its_own_key_whatever_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    spy(monkeypatch, lambda model, batch, key, *rest: seen.append(key.clone()))
    engine.train(TrainConfig(**TINY), splits=splits())
    assert torch.equal(torch.stack(seen), noise_keys(0, 0, 16))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state_from_before(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}

    def poison(row: dict[str, Any]) -> None:
        before.update(state(run[0]))
        with torch.no_grad():
            run[0].model.linear.bias[0] = float("nan")  # type: ignore[union-attr, operator]

    run: list[runs.Run] = []
    prepare = engine.prepare
    with pytest.MonkeyPatch.context() as patch, pytest.raises(engine.NonFiniteLoss) as caught:
        patch.setattr(engine, "prepare", lambda *args: run.append(prepare(*args)) or run[0])
        engine.train(TrainConfig(**TINY), splits=splits(), folder=tmp_path, on_epoch=poison)
    error = caught.value
    assert error.step == 4 and error.checkpoint == tmp_path / "last.pt"
    assert len(error.ids) == 16 and len(set(error.ids)) == 16 and max(error.ids) < 64
    for part in ("not finite at step 4", "loss nan", "training images", "last.pt", "smaller lr"):
        assert part in str(error)
    assert_same(checkpoint.load(error.checkpoint)["model"], before)


def test_a_loss_that_is_never_finite_leaves_the_initial_state(tmp_path: Path) -> None:
    model = dropping()
    nn.init.constant_(model.out.bias, float("inf"))
    with pytest.raises(engine.NonFiniteLoss, match="not finite at step 0"):
        engine.train(TrainConfig(**TINY | {"method": "standard"}), splits=splits(), model=model, folder=tmp_path)
    assert checkpoint.load(tmp_path)["epoch"] == 0


def test_every_epoch_is_a_new_order_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    spy(monkeypatch, lambda model, batch, *rest: seen.extend(batch.ids.tolist()))
    engine.train(TrainConfig(**TINY), splits=splits())
    epochs = [seen[i : i + 64] for i in range(0, 256, 64)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_collapse_under_pgd_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.45, 0.5, 0.3, 0.05])
    monkeypatch.setattr(watch, "probe", lambda run: {"probe": next(accuracies)})
    monkeypatch.setattr(watch, "PROBE_GAP", 1.0)  # the other signs, tested below
    monkeypatch.setattr(watch, "LEAP", 1.0)
    lines = Lines()
    run = engine.train(TrainConfig(**TINY), splits=splits(), display=lines)
    assert [row["probe"] for row in run.history] == [0.45, 0.5, 0.3, 0.05]
    assert len(lines.said) == 1 and "from 50 % to 5 % in epoch 4: catastrophic overfitting" in lines.said[0]


@pytest.mark.parametrize(
    ("now", "before", "alarm"),
    [(0.0, [], False), (0.1, [0.5], True), (0.35, [0.5], False), (0.29, [0.5], False), (0.02, [0.2, 0.1], False)],
)
def test_the_alarm_needs_a_drop_of_20_points_and_by_half(now: float, before: list[float], alarm: bool) -> None:
    assert watch.overfits(now, before) == alarm


def test_the_alarm_sees_a_method_that_fits_its_own_attack_only() -> None:
    healthy, masked = {"adv": 0.9, "probe": 0.6}, {"adv": 0.95, "probe": 0.5}
    said = (
        "the network learned its own attack: PGD-5 accuracy on the same training images is 50 %, but 95 % under the "
        "method's own attack"
    )
    assert watch.collapse(masked, [healthy]) == said
    assert watch.collapse(masked, []) is not None
    assert watch.collapse(masked, [healthy, masked]) is None  # said once
    assert watch.collapse(healthy, [healthy]) is None
    assert watch.collapse({"probe": 0.1}, [{"probe": 0.2}]) is None  # a method that logs no adversarial accuracy


def test_the_probe_is_pgd_accuracy_of_fixed_images_and_draws_nothing() -> None:
    run = engine.train(TrainConfig(**TINY | {"probe_size": 64, "eps": 0.3}), splits=splits())
    random, before = torch.get_rng_state(), state(run)
    first = watch.probe(run)
    assert_same(state(run), before)
    assert torch.equal(torch.get_rng_state(), random) and run.model.training
    assert watch.probe(run) == first == {name: run.history[-1][name] for name in ("probe", "probe_10")}
    x, y = run.splits.train.images.float() / 255, run.splits.train.labels
    adv = PGD(0.3, steps=5)(run.model, x, y, key=noise_keys(0, -1, 1)[0])
    right = run.model.eval()(adv).argmax(1) == y
    assert 0 < right.sum() < 64
    assert first["probe"] == right.float().mean().item()
    further = PGD(0.3, 0.3 / 8, steps=5)(run.model, x, y, start=adv)
    assert first["probe_10"] == (right & (run.model(further).argmax(1) == y)).float().mean().item()


def test_bf16_and_channels_last_train(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, dtypes = [], set()
    channels_last = torch.channels_last
    spy(monkeypatch, lambda model, batch, *rest: seen.append(batch.x.is_contiguous(memory_format=channels_last)))
    spy(monkeypatch, lambda model, *rest: model.conv2.register_forward_hook(lambda *a: dtypes.add(a[2].dtype)))
    colours = {"mean": (0.27, 0.27, 0.27), "std": (0.28, 0.28, 0.28)}
    config = TrainConfig(**TINY | colours | {"train_precision": "bf16", "channels_last": True})
    run = engine.train(config, splits=splits(channels=3))
    assert set(seen) == {True} and torch.bfloat16 in dtypes
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def test_the_second_update_on_a_batch_sees_the_weights_of_the_first_in_16_bits_too() -> None:
    losses: list[float] = []

    class Twice(methods.Standard):
        def train_step(self, model: nn.Module, batch: Any, key: Tensor, state: methods.State, descent: Any) -> Any:
            for _ in range(2):
                loss, metrics = self.objective(model, batch, None)
                descent.backward(loss)
                descent.step()
                losses.append(loss.item())
            return loss.detach(), metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods._METHODS, "standard", Twice)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))  # no parameter that stays in 32 bits
        config = TrainConfig(**TINY | {"method": "standard", "train_precision": "bf16", "lr": 0.05})
        engine.train(config, splits=splits(), model=linear)
    assert all(abs(first - second) > 1e-3 * first for first, second in zip(losses[::2], losses[1::2], strict=True))


def test_validation_and_early_end() -> None:
    config = TrainConfig(**TINY | {"val_size": 16})
    run = engine.train(config, splits=splits(), on_epoch=lambda row: row["epoch"] == 3)
    assert run.epoch == 3
    assert all(0 <= row["val_pgd"] <= row["val_clean"] <= 1 for row in run.history)


def test_threads_are_those_of_the_run_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(engine, "watch", lambda *args: seen.append(torch.get_num_threads()))
    engine.train(TrainConfig(**TINY | {"threads": 2, "epochs": 1, "batch_size": 64}), splits=splits())
    assert seen == [2] and torch.get_num_threads() == 1


def test_the_learning_rate_of_the_step_reaches_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = engine.OptimizerDescent.step

    def spied(descent: engine.OptimizerDescent) -> None:
        step(descent)
        rates.extend(group["lr"] for group in descent._optimizer.param_groups)

    monkeypatch.setattr(engine.OptimizerDescent, "step", spied)
    engine.train(TrainConfig(**TINY), splits=splits())
    assert rates == [schedules.learning_rate("cyclic", 5e-3, step, 16, 0.4) for step in range(16)]


# --- schedules


def test_schedules() -> None:
    def of(name: str, total: int = 100, **kw: float) -> list[float]:
        return [schedules.learning_rate(name, 0.2, step, total, **kw) for step in range(total)]

    cyclic = of("cyclic", 99, cyclic_peak=0.4)
    assert cyclic.index(max(cyclic)) == 39 and max(cyclic) == pytest.approx(0.2)
    assert min(cyclic) > 0 and cyclic[0] == pytest.approx(0.2 / 40) and cyclic[-1] == pytest.approx(0.2 / 60)
    assert of("cyclic", 9, cyclic_peak=0.0)[0] == pytest.approx(0.2 * 0.9)
    assert of("piecewise") == [0.2] * 50 + [0.2 * 0.1] * 25 + [0.2 * 0.01] * 25
    cosine = of("cosine")
    assert cosine[0] == 0.2 and cosine[50] == pytest.approx(0.1) and cosine == sorted(cosine, reverse=True)
    assert set(of("constant")) == {0.2}
    with pytest.raises(ValueError, match="schedule must be"):
        of("step")


# --- checkpoints


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.ones(2)}})

    def broken(content: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    with path.open("rb") as reader:  # whoever reads the old file goes on reading the old file
        content = path.read_bytes()
        checkpoint.save(path, {"model": {"w": torch.ones(2)}, "more": 1})
        assert reader.read() == content != path.read_bytes()
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"model": {"w": torch.zeros(2)}})
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    assert torch.equal(checkpoint.load(path)["model"]["w"], torch.ones(2))


def test_unusable_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere: name the folder of a run"):
        checkpoint.load(tmp_path / "nowhere")
    path = tmp_path / "last.pt"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="last.pt cannot be read as a checkpoint .*damaged"):
        checkpoint.load(tmp_path)
    checkpoint.save(path, {"model": {"w": torch.randn(5000)}})
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint of atlas.*load_state_dict"):
        checkpoint.load(path)
    torch.save({"format": 99, "model": {}}, path)
    with pytest.raises(ValueError, match="checkpoint format 99, this version reads 1"):
        checkpoint.load(path)
    checkpoint.save(tmp_path / "group" / "adv" / "last.pt", {"model": {}})
    assert checkpoint.locate(tmp_path / "group") == tmp_path / "group" / "adv" / "last.pt"  # the only one
    checkpoint.save(tmp_path / "group" / "trades" / "last.pt", {"model": {}})
    with pytest.raises(FileNotFoundError, match="it holds the runs .*adv.*trades: name one of them"):
        checkpoint.load(tmp_path / "group")


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": 1, "model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("file", ["", "last.pt", "model.safetensors"])
def test_a_trained_network_loads_from_what_the_run_leaves(tmp_path: Path, file: str) -> None:
    pytest.importorskip("safetensors")
    run = engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), folder=tmp_path)
    model, config = checkpoint.load_model(tmp_path / file)
    assert not model.training and config["method"] == "atlas" and config["eps"] == EPS
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(model(x), run.model.eval()(x))


def test_exports_are_bare_state_dicts(tmp_path: Path) -> None:
    model = dropping()
    checkpoint.export_state_dict(model, tmp_path / "m.pt")
    other = Dropping()
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    safetensors = pytest.importorskip("safetensors.torch")
    checkpoint.export_state_dict(model, tmp_path / "m.safetensors")
    assert_same(dict(model.state_dict()), safetensors.load_file(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="does not say which network"):
        checkpoint.load_model(tmp_path / "m.safetensors")
    engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), model=model, folder=tmp_path / "own")
    with pytest.raises(ValueError, match="a Dropping of your own"):
        checkpoint.load_model(tmp_path / "own")


# --- evaluation


def trained() -> runs.Run:
    return engine.train(TrainConfig(**TINY | {"method": "standard"}), splits=splits())


def test_evaluation_counts_what_stays_right() -> None:
    run = trained()
    images = run.splits.test
    result = evaluate(run.model, images, EPS, steps=3)
    x, y = images.images.float() / 255, images.labels
    model = run.model.eval()
    clean = model(x).argmax(1) == y
    fgsm = clean & (model(FGSM(EPS)(model, x, y)).argmax(1) == y)
    assert (result.clean, result.fgsm) == (clean.float().mean().item(), fgsm.double().mean().item())
    assert result.pgd <= result.clean and result.pgd_step_size == 2.5 * EPS / 3 and result.images == 40
    weak, strong = (evaluate(model, images, 0.4, step_size=s).pgd for s in (1e-6, 0.1))
    assert strong < weak


def test_evaluation_does_not_depend_on_the_batch_and_leaves_the_model_alone() -> None:
    run = trained()
    run.model.train()
    run.model.bn1.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in run.model.modules()]
    before, random = state(run), torch.get_rng_state()
    lines: list[str] = []
    small = evaluate(run.model, run.splits.test, EPS, size=30, batch_size=7, restarts=2, say=lines.append)
    large = evaluate(run.model, run.splits.test, EPS, size=30, batch_size=30, restarts=2)
    assert (small.clean, small.fgsm, small.pgd) == (large.clean, large.fgsm, large.pgd)
    assert [module.training for module in run.model.modules()] == modes
    assert_same(state(run), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert "30 images" in lines[0] and "0.1 (l_inf)" in lines[0] and lines[1].strip().endswith("s in all")
    assert small.to_dict()["eps_255"] == "25.5/255" and json.loads(json.dumps(small.to_dict()))["images"] == 30


def test_noise_goes_by_the_number_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained()
    seen: list[Tensor] = []
    monkeypatch.setattr(evaluation, "predict", lambda model, x: seen.append(x) or predict(model, x))
    for batch_size in (40, 7):  # the third of each three is PGD's; a step of nothing leaves its random start
        evaluate(run.model, run.splits.test, EPS, batch_size=batch_size, steps=1, step_size=1e-30)
    assert torch.equal(seen[2], torch.cat(seen[5::3])) and len(seen[2]) == 40
    assert (seen[2] - seen[0]).abs().max() > EPS / 2


class Odd(nn.Module):
    """Class 0 for flat images and class 1 for any other: an attack turns a wrong answer into a right one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        rough = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))) * 100 + (x * torch.linspace(-1, 1, 8)).sum((1, 2, 3)) * 1e-3
        return self.scale * torch.stack([torch.full_like(rough, 0.5), rough], 1)


def test_an_attack_cannot_make_an_image_right() -> None:
    images = Images(torch.full((10, 1, 8, 8), 128, dtype=torch.uint8), torch.ones(10, dtype=torch.int64))
    model = Odd()
    assert (model(PGD(EPS, steps=2)(model, images.images / 255, images.labels)).argmax(1) == 1).any()
    result = evaluate(model, images, EPS, steps=2)
    assert (result.clean, result.fgsm, result.pgd) == (0, 0, 0)


# --- configuration


def test_numbers_as_people_write_them() -> None:
    assert TrainConfig(eps="8/255").eps == 8 / 255  # type: ignore[arg-type]
    for eps in (8, "8", 1.0):
        with pytest.raises(
            ValueError, match="config: eps must be a number > 0 and < 1, got .*write 8/255 instead of 8"
        ):
            TrainConfig(eps=eps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps must be a number .* got 'eight'"):
        TrainConfig(eps="eight")  # type: ignore[arg-type]


def test_integers_keep_all_their_digits() -> None:
    for seed in (2**53 + 1, 2**63 - 1):
        assert TrainConfig(seed=seed).seed == TrainConfig(seed=str(seed)).seed == seed
    assert TrainConfig(seed="1e3").seed == TrainConfig(seed=1e3).seed == 1000
    for seed in (2**63, 1e300, 10**400, 0.5, "0.5", "1" * 5000, True, float("nan")):
        with pytest.raises(ValueError, match="seed must be an integer >= 0, got "):
            TrainConfig(seed=seed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"optimizer": "lion"}, "optimizer must be one of 'sgd', 'adam', got 'lion'"),
        ({"method": "atals"}, "nearest is 'atlas'"),
        ({"hyper": {"raduis": 1}}, "nearest is 'radius'"),
        ({"hyper": {"radius": -1}}, "radius must be a number > 0"),
        ({"hyper": {"adv.steps": 3}}, "'adv.steps' is for 'adv', which is neither method nor in beside"),
        ({"beside": ["adv", "nothing"]}, "no method 'nothing'"),
        ({"beside": ["adv"], "hyper": {"adv.steps": 0}}, "adv: steps must be an integer >= 1"),
        ({"beside": "adv"}, "beside must be a list of texts"),
        ({"epoch": 3}, "no setting 'epoch'; the nearest is 'epochs'"),
        ({"foo": 3}, "no setting 'foo'$"),
        (
            {"beside": ["all", "standard"]},
            "beside: all means every method and stands alone, got \\('all', 'standard'\\)",
        ),
        ({"precision": "bf16"}, "no setting 'precision'; the nearest is 'train_precision'"),
    ],
)
def test_wrong_settings_are_refused_at_construction(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_help_and_editors_see_the_settings() -> None:
    parameters = inspect.signature(TrainConfig).parameters
    assert list(parameters) == [f.name for f in dataclasses.fields(TrainConfig)]
    assert parameters["momentum"].default == 0.9


def test_retired_settings_are_dropped_and_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RETIRED, "momentous", "nothing came of it")
    config = TrainConfig(lr=0.1)
    (tmp_path / "c.json").write_text(json.dumps(to_dict(config) | {"momentous": 3}))
    for made in (
        lambda: TrainConfig(lr=0.1, momentous=True),  # type: ignore[call-arg]
        lambda: dataclasses.replace(config, momentous=None),  # type: ignore[call-arg]
        lambda: from_dict(to_dict(config) | {"momentous": False}),
        lambda: from_file(tmp_path / "c.json"),
    ):
        with pytest.warns(UserWarning, match="momentous no longer exists and is ignored: nothing came of it") as told:
            assert made() == config
        assert len(told) == 1
    with pytest.warns(UserWarning, match="fold_batchnorm no longer exists"):
        assert from_dict(to_dict(config) | {"fold_batchnorm": False}) == config
    with pytest.raises(TypeError, match="momentary"):
        TrainConfig(momentary=True)  # type: ignore[call-arg]


def test_hyper_parameters_reach_their_method() -> None:
    config = TrainConfig(method="atlas", beside=("adv",), hyper={"steps": 2, "adv.steps": 7, "atlas.radius": 0.3})
    assert config.hyper_of("atlas") == {"steps": 2, "radius": 0.3}
    assert config.hyper_of("adv") == {"steps": 7}


def test_json_files_and_dicts_say_the_same(tmp_path: Path) -> None:
    config = TrainConfig(method="adv", hyper={"steps": 3}, eps=0.1, beside=("standard",))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    (tmp_path / "c.json").write_text(json.dumps({"method": "adv", "eps": "8/255", "hyper": {"steps": 3}}))
    assert from_file(tmp_path / "c.json") == TrainConfig(method="adv", eps=8 / 255, hyper={"steps": 3})
    for text, message in (("{", "is not JSON"), ("[1]", "must hold one JSON object"), ('{"mehtod": 1}', "'method'")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            from_file(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match="no.json does not exist"):
        from_file(tmp_path / "no.json")


@pytest.mark.parametrize("name", names())
def test_defaults_are_filled_in_and_never_override(name: str) -> None:
    data = dataclasses.replace(splits(channels=3 if get(name).mean else 1), name=name, eps=0.17)
    config = resolved(TrainConfig(dataset=name, epochs=77), data)
    may_be_none = {"attack_precision", "data_dir", "train_size", "width", "threads", "eval_size", "out_dir", "resume"}
    may_be_none |= {"init", "extra_data", "protocol", "val_step_size", "image_size", "stream", "crop", "workers"}
    may_be_none |= set() if get(name).mean else {"mean", "std"}  # grey digits are used as they are
    assert {f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None} <= may_be_none
    assert config.epochs == 77 and config.eps == 0.17 and config.lr == get(name).lr
    assert resolved(config, data) == config
    assert resolved(TrainConfig(method="standard"), dataclasses.replace(splits(), name="digits")).beside == (
        "one_step_adv",
    )


def test_shares_of_eps_are_for_one_step_methods_and_never_override() -> None:
    data = dataclasses.replace(splits(), name="mnist", eps=0.3)

    def atlas(**settings: Any) -> dict[str, Any]:
        config = resolved(TrainConfig(dataset="mnist", **settings), data)
        assert resolved(config, data) == config
        return config.hyper_of("atlas")

    assert atlas() == pytest.approx({"step_size": 0.2, "radius": 0.3})
    assert atlas(eps=0.15, hyper={"radius": 0.01}) == pytest.approx({"step_size": 0.1, "radius": 0.01})
    assert atlas(hyper={"steps": 10}) == {"steps": 10}
    assert atlas(method="standard", beside=("atlas",)) == pytest.approx({"step_size": 0.2, "radius": 0.3})
    assert atlas(method="standard") == {}


# --- reports


def test_csv_columns_come_from_the_rows(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": 0.123456789, "probe": None, "local": 2.0}, {"epoch": 2, "loss": 0.5, "local": 1.0}]
    report.write_csv(tmp_path / "log.csv", rows)
    lines = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [(line["epoch"], line["loss"], line["probe"], line["local"]) for line in lines] == [
        ("1", "0.123457", "", "2.0"),
        ("2", "0.5", "", "1.0"),
    ]


def test_curves_need_matplotlib_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    history = [{"epoch": 1, "loss": 1.0, "clean": 0.5, "probe": None}, {"epoch": 2, "loss": 0.5, "clean": 0.75}]
    assert report.write_curves(tmp_path / "c.png", {"standard": history})
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert not report.write_curves(tmp_path / "d.png", {"standard": history}) and not (tmp_path / "d.png").exists()


def test_tensorboard_events_are_written_on_request(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    engine.train(TrainConfig(**TINY | {"tensorboard": True, "epochs": 2}), splits=splits(), folder=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8]


def test_progress_lines(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "epoch": 2,
        "epochs": 9,
        "step": 7,
        "loss": 1.5,
        "adv": 0.25,
        "probe": None,
        "images_per_s": 1234.5,
        "eta": 3725,
    }
    assert progress.describe(row) == ("epoch 2/9  step 7  1,234 images/s  ETA 1:02:05", "loss 1.500  adv 25.0 %")
    display = progress.make("plain")
    display.start("title", 63)
    display.epoch(row)  # within two seconds of the last line
    display.epoch(row | {"epoch": 9})
    assert [line.split("  1,")[0].strip() for line in capsys.readouterr().out.splitlines()] == [
        "title",
        "epoch 9/9  step 7",
    ]
    with pytest.raises(ValueError, match="progress must be"):
        progress.make("bars")


@pytest.mark.parametrize(
    ("method", "hyper", "attacks"), [("adv", {"steps": 3}, 3), ("one_step_adv", {}, 1), ("standard", {}, 0)]
)
def test_a_look_at_a_step_tells_its_attack(method: str, hyper: dict[str, Any], attacks: int) -> None:
    """Of the forwards of a step; those of the probe and of evaluation are of no step."""
    seen: list[str | None] = []
    run = engine.train(
        TrainConfig(**TINY | {"method": method, "hyper": hyper, "epochs": 1}),
        splits=splits(),
        on_start=lambda run, step: run.model.register_forward_hook(lambda *_: seen.append(part_of(sys._getframe()))),
    )
    assert (seen.count("attack"), seen.count("rest")) == (attacks * run.step, run.step)
    assert (None in seen) == (method != "standard")


def test_the_share_of_the_attack_is_that_of_the_looks() -> None:
    share = AttackShare()
    assert share.share is None
    share._looks, share._in_attack = 80, 20
    assert share.share == 0.25
    row = {"epoch": 1, "epochs": 1, "step": 1, "loss": 1.0, "images_per_s": 1.0, "eta": 0, "attack": share.share}
    assert progress.describe(row)[1] == "loss 1.000  attack 25 % of the step"
    before = threading.active_count()
    display = progress.make("plain")
    display.start("title", 1)
    assert threading.active_count() == before + 1
    display.stop()
    assert threading.active_count() == before


def test_the_live_bar_runs() -> None:
    pytest.importorskip("rich")
    run = engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), display=progress.make("live"))
    assert run.epoch == 1


@pytest.mark.parametrize(
    ("method", "hyper", "missing"),
    [("adr", {}, "no features and no head"), ("yopo", {"first_layer": "conf"}, "no module; the nearest is 'conv'")],
)
def test_a_network_that_lacks_what_the_method_needs_is_refused_before_anything_is_written(
    tmp_path: Path, method: str, hyper: dict[str, Any], missing: str
) -> None:
    config = TrainConfig(**TINY | {"method": method, "hyper": hyper})
    with pytest.raises(ValueError, match=missing):
        engine.train(config, splits=splits(), model=dropping(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    config = TrainConfig(**TINY | {"epochs": 1, "method": "standard"})
    engine.train(config, splits=splits(), folder=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run: go on with it"):
        engine.train(config, splits=splits(), folder=tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_folder_may_be_given_as_text(tmp_path: Path) -> None:
    engine.train(
        TrainConfig(**TINY | {"epochs": 1, "method": "standard"}), splits=splits(), folder=str(tmp_path / "run")
    )
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": TINY}, "config must be a TrainConfig, got {"),
        ({"splits": splits().train}, "splits must be a DataSplits .*, got Images"),
        ({"model": Dropping}, "model must be a torch.nn.Module, got .*Dropping.*; give an instance"),
        ({"model": dropping}, "model must be a torch.nn.Module, got .*dropping.*; give an instance"),
        ({"model": "small_cnn"}, "model must be a torch.nn.Module, got 'small_cnn'; a name goes into config.model"),
        ({"splits": splits(channels=3), "model": dropping()}, r"model Dropping, given images \[2, 3, 8, 8\] .* fails"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"config": TrainConfig(**TINY), "splits": splits()} | arguments
    with pytest.raises(ValueError, match=message):
        engine.train(**given, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
