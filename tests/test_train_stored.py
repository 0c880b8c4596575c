"""Runs in their folders: what data they were made on, how they stop, go on and are evaluated, and what they leave."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.environment import is_stream
from atlas_train import answers, checkpoint, cli, data, engine, folders, methods, models, writing
from atlas_train import compare as comparing
from atlas_train.compare import compare
from atlas_train.config import TrainConfig, from_file, recorded, resolved
from atlas_train.data import DataSplits, Images, identity
from atlas_train.interrupts import Terminated
from atlas_train.passes import passes_per_step
from atlas_train.results import commit
from atlas_train.stored import evaluate_checkpoint, resume, resume_compare
from tiny_runs import TINY, Lines, same, splits, weights

QUICK = ["--epochs", "1", "--train-size", "64", "--width", "2", "--eval-size", "20", "--probe-size", "0"]
STANDARD: dict[str, Any] = TINY | {"method": "standard", "epochs": 2}


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """A shell may start what runs in the background with signals ignored, and a run leaves them so."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def relabelled(part: str) -> DataSplits:
    """The data of ``splits``, but for one label."""
    images = getattr(splits(), part)
    labels = images.labels.clone()
    labels[3] = (labels[3] + 1) % 4
    return replace(splits(), **{part: Images(images.images, labels)})


def old_version(folder: Path) -> None:
    """The checkpoint as the version before wrote it, which recorded no data."""
    state = checkpoint.load(folder)
    for key in ("data", "hyper", "changes", "versions"):
        del state[key]
    state["config"] |= {"data_dir": None, "out_dir": None, "resume": None}
    checkpoint.save(folder / "last.pt", state)


# --- the data of a run


def test_a_fingerprint_is_that_of_pixels_and_labels_alone() -> None:
    images = splits(channels=3).train
    own = identity.fingerprint(images)
    assert len(own) == 64 and own == identity.fingerprint(Images(images.images.clone(), images.labels.clone()))
    turned = images.images.contiguous(memory_format=torch.channels_last)
    assert own == identity.fingerprint(Images(turned, images.labels))
    assert own != identity.fingerprint(Images(images.images.flip(0), images.labels))
    assert own != identity.fingerprint(Images(images.images, images.labels.flip(0)))
    assert own != identity.fingerprint(Images(images.images.view(64, 3, 4, 16), images.labels))


def test_large_sets_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = identity.fingerprint(splits().train)
    monkeypatch.setattr(identity, "_CHUNK", 200)  # three images
    assert identity.fingerprint(splits().train) == own


def test_a_run_on_data_of_ones_own_is_recorded_as_such(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    engine.train(TrainConfig(**STANDARD), splits=splits(), folder=tmp_path)
    state = checkpoint.load(tmp_path)
    assert state["config"]["dataset"] == "bars" and state["data"] == identity.record(splits())
    assert state["data"]["loader"] is None and state["data"]["train"]["images"] == 64
    _, description = checkpoint.load_network(tmp_path / "model.safetensors")
    assert description["data"] == state["data"]


@pytest.mark.parametrize("command", [["evaluate"], ["train", "--epochs", "4", "--resume"]])
@pytest.mark.parametrize("name", ["bars", "digits"])
def test_no_command_takes_other_data_for_ones_own(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    engine.train(TrainConfig(**STANDARD), splits=replace(splits(), name=name), folder=tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert cli.main([*command, str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    function = "evaluate_checkpoint" if command == ["evaluate"] else "resume"
    assert f"data of your own, {name}" in error and f"atlas_train.stored.{function}('{tmp_path / 'run'}'" in error
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_run_goes_on_with_its_own_data_only(part: str, tmp_path: Path) -> None:
    engine.train(TrainConfig(**STANDARD), splits=splits(), folder=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="was made on other data.*splits=") as caught:
        engine.train(TrainConfig(**STANDARD | {"epochs": 3, "resume": str(tmp_path)}), splits=relabelled(part))
    assert identity.fingerprint(getattr(splits(), part))[:12] in str(caught.value)
    with pytest.raises(ValueError, match="was made on other data"):
        resume(tmp_path, splits=replace(splits(), num_classes=5), epochs=3)
    assert (tmp_path / "last.pt").read_bytes() == before and [p.name for p in tmp_path.glob(".*")] == []
    renamed = replace(splits(), name="another name for the same")
    assert resume(tmp_path, splits=renamed, epochs=3).epoch == 3


def test_a_data_set_with_a_name_is_loaded_again_and_checked(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    assert digits.loader == "digits"
    few = replace(digits, train=digits.train.subset(64))  # named so still, and not what the name stands for
    config = TrainConfig(**STANDARD | {"eps": 0.2, "epochs": 1})
    engine.train(config, splits=few, folder=tmp_path / "few")
    (result,) = evaluate_checkpoint(tmp_path / "few", size=20, steps=1, say=lambda text: None).values()
    assert result.evaluation.images == 20  # the test images are those of the name
    with pytest.raises(ValueError, match="was made on other data"):
        resume(tmp_path / "few", epochs=2)
    assert resume(tmp_path / "few", epochs=2, splits=few).epoch == 2


def test_evaluation_is_that_of_the_run_on_its_own_data(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = STANDARD | {"eval_size": 30, "channels_last": True, "out_dir": str(out), "beside": ()}
    (after,) = compare(TrainConfig(**settings), splits=splits(), show="silent", say=lambda text: None).values()
    run = out / "standard"
    lines: list[str] = []
    (again,) = evaluate_checkpoint(run, splits=splits(), device="cpu", say=lines.append).values()
    assert replace(again.evaluation, seconds=0) == replace(after.evaluation, seconds=0)
    assert again.evaluation.images == 30 and not any("note" in line for line in lines)
    assert again.data == identity.record(splits(), ("test",))
    evaluate_checkpoint(run, splits=relabelled("train"), say=lines.append)  # the test images are the same
    with pytest.raises(ValueError, match="was made on other data.*other_data=True"):
        evaluate_checkpoint(run, splits=relabelled("test"), say=lines.append)
    evaluate_checkpoint(run, splits=relabelled("test"), other_data=True, say=lines.append)
    assert f"note: not the data that {run} was made on" in lines
    with pytest.raises(ValueError, match="knows 4 classes, and the data have 5"):
        evaluate_checkpoint(run, splits=replace(splits(), num_classes=5), other_data=True)
    # the folder of one run
    (only,) = evaluate_checkpoint(out, splits=splits(), device="cpu", say=lines.append).values()
    assert only.evaluation.clean == again.evaluation.clean


def test_checkpoints_of_the_version_before_go_on_with_a_note(tmp_path: Path) -> None:
    whole = engine.train(TrainConfig(**STANDARD | {"epochs": 4}), splits=splits())
    lines = Lines()
    config = TrainConfig(**STANDARD | {"epochs": 4})
    engine.train(config, splits=splits(), folder=tmp_path, on_epoch=lambda row: row["epoch"] == 2)
    old_version(tmp_path)
    again = resume(tmp_path, splits=splits(), display=lines)
    assert same(weights(again.model), weights(whole.model))
    assert "kept no record of its images: it says bars, and nothing tells" in lines.said[0]
    assert lines.said[1:] == ["resumed after epoch 2 of 4"]
    old_version(tmp_path)
    said: list[str] = []
    evaluate_checkpoint(tmp_path, splits=splits(), steps=1, say=said.append)
    assert "kept no record of its images" in said[0]
    for given in (replace(splits(), name="digits", loader="digits"), splits(channels=3)):
        with pytest.raises(ValueError, match="was made on bars: 4 classes, 1 channels; you gave"):
            resume(tmp_path, splits=given, epochs=5)


def test_numbers_of_numpy_leave_files_that_can_be_read(tmp_path: Path) -> None:
    own = replace(splits(), num_classes=np.int64(4), eps=np.float64(0.1))
    engine.train(TrainConfig(**STANDARD), splits=own, model=net(), folder=tmp_path / "own")
    assert checkpoint.load(tmp_path / "own")["arch"]["num_classes"] == 4
    own = replace(splits(), eps=np.float64(0.1))
    config = TrainConfig(**TINY | {"epochs": 1, "hyper": {"radius": np.float64(0.25)}, "out_dir": str(tmp_path)})
    compare(config, splits=own, show="silent", say=lambda text: None)
    for file in ("", "last.pt", checkpoint.export_name()):
        if not file.endswith(".pt") or file == "last.pt":
            checkpoint.load_model(tmp_path / "atlas" / file)
    assert json.loads((tmp_path / "atlas" / "results.json").read_text())["methods"]["atlas"]["hyper"]["radius"] == 0.25
    assert resume(tmp_path / "atlas", splits=own, epochs=2).epoch == 2


# --- the network of a run


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def test_a_network_and_data_of_ones_own_need_no_name_and_come_back(tmp_path: Path) -> None:
    settings = {name: value for name, value in STANDARD.items() if name not in ("model", "width")}
    whole = engine.train(TrainConfig(**settings | {"epochs": 4}), splits=splits(), model=net())
    config = TrainConfig(**settings | {"epochs": 4})
    engine.train(config, splits=splits(), model=net(), folder=tmp_path, on_epoch=lambda row: row["epoch"] == 2)
    assert checkpoint.load(tmp_path)["config"]["model"] is None
    with pytest.raises(ValueError, match="holds a Sequential of your own: give it from Python"):
        resume(tmp_path, splits=splits())
    with pytest.raises(ValueError, match="a Sequential of your own"):
        evaluate_checkpoint(tmp_path, splits=splits())
    again = resume(tmp_path, splits=splits(), model=net())
    assert same(weights(again.model), weights(whole.model))
    (result,) = evaluate_checkpoint(tmp_path, splits=splits(), model=net(), say=lambda text: None).values()
    assert result.evaluation.clean > 0.8
    with pytest.raises(ValueError, match="'bars' has no network of its own: give train a network"):
        engine.train(TrainConfig(**settings), splits=splits())


def test_a_network_of_ones_own_goes_on_from_the_import_path_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\nclass {0}(nn.Sequential):\n    def __init__(self, num_classes=10, in_channels=1):\n"
    code += "        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n"
    Path("nets.py").write_text(code.format("Mine") + code.format("Other"))
    mine = models.network("nets.py:Mine", num_classes=10, in_channels=1)
    config = TrainConfig("standard", epochs=1, train_size=64, probe_size=0, beside=(), eval_size=20)
    engine.train(config, model=mine, folder=Path("run/standard"))
    again = ["train", "--resume", "run", "--epochs", "2"]
    for given, message in (([], "holds a Mine of your own"), (["--model", "nets.py:Other"], "another model name")):
        assert cli.main([*again, *given]) == 2
        assert message in capsys.readouterr().err
    assert resume("run", model="nets.py:Mine", epochs=1).epoch == 1
    assert cli.main([*again, "--model", str(tmp_path / "nets.py:Mine")]) == 0
    assert checkpoint.load("run")["arch"]["name"] == "nets.py:Mine"  # and not where it lies


class Odd(nn.Module):
    """A network whose state_dict is unusual: ``kind`` says how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.linear, self.kind = nn.Linear(64, 64), nn.Linear(64, 4), kind
        if kind == "tied":
            self.second = self.first
        elif kind == "view":
            self.register_buffer("whole", torch.arange(10.0))
            self.register_buffer("part", self.get_buffer("whole")[::2])
        elif kind == "complex":
            self.phase = nn.Parameter(torch.ones(64, dtype=torch.cfloat))
        elif kind == "expanded":
            self.register_buffer("same", torch.zeros(1).expand(8))
        elif kind == "sparse":
            self.register_buffer("rare", torch.eye(3).to_sparse())
        elif kind == "complex128":
            self.register_buffer("wide", torch.zeros(3, dtype=torch.complex128))
        elif kind == "nan":
            self.register_buffer("unset", torch.full((3,), torch.nan))
        elif kind == "frozen":
            self.requires_grad_(False)
        elif kind == "lock":
            self.lock = threading.Lock()

    def get_extra_state(self) -> Any:
        return {"own": {"seen": 1}, "code": {"call": checkpoint.save}}.get(self.kind, {})

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        x = (x * self.phase).real if self.kind == "complex" else x
        return self.linear(self.second(x) if self.kind == "tied" else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["tied", "view", "own", "complex"])
def test_a_network_with_an_unusual_state_goes_on_and_is_exported(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    settings = {"splits": splits(), "folder": tmp_path}
    whole = engine.train(TrainConfig(**STANDARD | {"epochs": 2}), splits=splits(), model=Odd(kind))
    display = Lines()
    config = TrainConfig(**STANDARD | {"epochs": 2})
    engine.train(config, **settings, model=Odd(kind), display=display, on_epoch=lambda row: True)
    assert display.said == ["model.safetensors will hold tensors alone, without _extra_state"]
    again = resume(tmp_path, splits=splits(), model=Odd(kind))
    network, _ = checkpoint.load_model(tmp_path / "model.safetensors", Odd(kind))
    assert same(tensors(again.model), tensors(whole.model)) and same(tensors(network), tensors(whole.model))


def test_a_network_that_cannot_be_copied_has_no_count_of_passes() -> None:
    assert passes_per_step(engine.train(TrainConfig(**STANDARD), splits=splits(), model=Odd("lock"))) is None


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("expanded", {}, "same of the network cannot be kept in a checkpoint .*share memory"),
        ("sparse", {}, "rare of the network .*it is not a dense tensor"),
        ("complex128", {}, "wide of the network .*complex128"),
        ("nan", {}, "unset of the network .*it holds NaN"),
        ("frozen", {}, "model Odd has no parameter that requires grad"),
        ("code", {}, "_extra_state of the network cannot be kept in a checkpoint"),
        ("lock", {"averaging": "ema"}, "averaging 'ema' needs a copy of the network, .*cannot pickle.*'none'"),
    ],
)
def test_a_network_that_cannot_be_kept_is_refused_before_the_first_step(
    kind: str, changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(engine, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        engine.train(TrainConfig(**STANDARD | changed), splits=splits(), model=Odd(kind), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Scaled(nn.Module):
    """A network with a constant that no state_dict holds, and a buffer that every forward moves."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean, self.linear = mean, nn.Linear(64, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.linear(x.flatten(1) - self.mean)  # type: ignore[no-any-return]


def test_a_network_with_other_constants_is_not_taken_for_the_one_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")

    def scaled(mean: float) -> Scaled:
        torch.manual_seed(3)
        return Scaled(mean)

    engine.train(TrainConfig(**STANDARD), splits=splits(), model=scaled(0.3), folder=tmp_path)
    seen = engine.train(TrainConfig(**STANDARD), splits=splits(), model=scaled(0.3)).model.state_dict()["seen"]
    assert checkpoint.load(tmp_path)["model"]["seen"] == seen  # looked at, and left as it was
    for file in ("last.pt", "model.safetensors"):
        checkpoint.load_model(tmp_path / file, scaled(0.3))
        with pytest.raises(ValueError, match="another Scaled: its weights fit this one, and the same images get other"):
            checkpoint.load_model(tmp_path / file, scaled(0.0))
    with pytest.raises(ValueError, match="another Scaled"):
        resume(tmp_path, splits=splits(), model=scaled(0.0), epochs=3)
    assert resume(tmp_path, splits=splits(), model=scaled(0.3), epochs=3).epoch == 3
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    noisy.forward = lambda x: x.flatten(1)[:, :4] + torch.rand(4)  # type: ignore[method-assign]
    state = torch.get_rng_state()
    assert answers.answers(noisy, (1, 8, 8)) is None and torch.equal(torch.get_rng_state(), state)


# --- what may change


def test_what_a_resumed_run_changes_is_applied_told_and_recorded(tmp_path: Path) -> None:
    settings = STANDARD | {"optimizer": "sgd", "lr": 0.01}
    engine.train(TrainConfig(**settings), splits=splits(), folder=tmp_path)
    lines = Lines()
    run = resume(tmp_path, splits=splits(), display=lines, epochs=4, weight_decay=0.1, momentum=0.5)
    assert lines.said[0] == (
        "resumed after epoch 2 with epochs 4 (before: 2), momentum 0.5 (before: 0.9), weight_decay 0.1 (before: 0.0)"
    )
    assert re.fullmatch(
        r"schedules are stretched over 4 epochs, of which 2 are done: the cyclic learning rate goes on at 0\.00\d+, "
        r"after 0\.0\d+",
        lines.said[1],
    )
    (group,) = run.optimizer.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.1, 0.5)
    changed = {"epochs": [2, 4], "momentum": [0.9, 0.5], "weight_decay": [0.0, 0.1]}
    assert checkpoint.load(tmp_path)["changes"] == run.changes == [{"epoch": 2, "changed": changed}]
    quiet = Lines()
    resume(tmp_path, splits=splits(), display=quiet)
    assert quiet.said == ["resumed after epoch 4 of 4"]
    state = checkpoint.load(tmp_path)
    state["versions"]["torch"] = "2.9"
    checkpoint.save(tmp_path / "last.pt", state)
    resume(tmp_path, splits=splits(), display=quiet)
    assert quiet.said[1:] == [f"resumed after epoch 4 with torch {torch.__version__} (before: 2.9)"]


def test_a_default_that_changes_between_versions_does_not_change_a_run(tmp_path: Path) -> None:
    engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), folder=tmp_path)
    state = checkpoint.load(tmp_path)
    assert state["hyper"]["radius"] == TINY["eps"] / 2  # what None stood for
    state["hyper"]["radius"] = 0.03
    checkpoint.save(tmp_path / "last.pt", state)
    with pytest.raises(ValueError, match="hyper-parameters: it has {'radius': 0.03}, you gave {'radius': 0.05}"):
        resume(tmp_path, splits=splits(), epochs=2)


# --- comparisons


def test_a_comparison_goes_on_as_a_whole(tmp_path: Path) -> None:
    def config(out: str, **more: Any) -> TrainConfig:
        return TrainConfig(**TINY | {"epochs": 2, "beside": ("standard", "one_step_adv"), "out_dir": out} | more)

    def quiet(config: TrainConfig, **more: Any) -> comparing.Results:
        return compare(config, splits=splits(), show="silent", **{"say": lambda text: None} | more)

    whole = quiet(config(str(tmp_path / "whole")))
    root = tmp_path / "stopped"
    said: list[str] = []
    rate = engine.Run.rate

    def stopped(run: engine.Run, update: int) -> float:
        if run.config.method == "standard" and run.step == 6:  # in the second epoch of the second
            raise KeyboardInterrupt
        return rate(run, update)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.Run, "rate", stopped)
        quiet(config(str(root)), say=said.append)
    call = (
        said[-1].split("to go on from the last checkpoint: atlas_train.stored.")[1].removesuffix(", with the same data")
    )
    assert call == f"resume_compare('{root}', splits=...)"
    assert sorted(p.name for p in root.iterdir()) == ["atlas", "config.json", "standard"]
    with pytest.raises(FileExistsError, match="already holds a run of atlas"):
        quiet(config(str(root)))
    with pytest.raises(FileExistsError, match="already holds a comparison: go on with it"):
        quiet(config(str(root), method="adv", beside=("trades",)))
    with pytest.raises(ValueError, match="compares atlas with others, you gave method adv"):
        quiet(config(str(root), method="adv", resume=str(root)))
    settings = (root / "config.json").read_text()
    with pytest.raises(ValueError, match="another batch_size"):
        quiet(config(str(root), batch_size=8, resume=str(root)))
    assert (root / "config.json").read_text() == settings

    said.clear()
    again = eval(call.replace("...)", "splits(), show='silent', say=said.append)"))
    assert list(again) == list(whole) == ["standard", "one_step_adv", "atlas"]
    for name, result in whole.items():
        assert replace(again[name].evaluation, seconds=0) == replace(result.evaluation, seconds=0)
        assert same(*(checkpoint.load(folder / name)["model"] for folder in (root, tmp_path / "whole")))
    assert said[0] == f"atlas: evaluated before, in {root / 'atlas' / 'evaluation.json'}"
    assert list(json.loads((root / "results.json").read_text())["methods"]) == list(whole)


def test_methods_are_added_to_what_is_there(tmp_path: Path) -> None:
    def quiet(**more: Any) -> comparing.Results:
        config = TrainConfig(**TINY | {"epochs": 1} | more)
        return compare(config, splits=splits(), show="silent", say=lambda text: None)

    quiet(out_dir=str(tmp_path / "out"))
    first = (tmp_path / "out" / "atlas" / "last.pt").read_bytes()
    assert list(quiet(resume=str(tmp_path / "out" / "atlas"), beside=("standard",))) == ["standard", "atlas"]
    assert list(quiet(resume=str(tmp_path / "out"), beside=("standard", "adv"))) == ["standard", "adv", "atlas"]
    assert (tmp_path / "out" / "atlas" / "last.pt").read_bytes()[:2] == first[:2]
    out = str(tmp_path / "out")
    assert list(quiet(resume=out, beside=("n_fgsm",))) == ["standard", "adv", "n_fgsm", "atlas"]
    assert from_file(tmp_path / "out" / "config.json").beside == ("standard", "adv", "n_fgsm")
    engine.train(TrainConfig(**TINY | {"epochs": 1}), splits=splits(), folder=tmp_path / "alone")
    with pytest.raises(ValueError, match="beside: .*alone lies alone"):
        quiet(resume=str(tmp_path / "alone"), beside=("standard",))


def test_a_lone_run_goes_on_although_its_defaults_name_methods_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    config = TrainConfig("adv", epochs=1, train_size=64, width=2, probe_size=0, eval_size=20)
    engine.train(config, folder=tmp_path / "alone")
    again = ["train", "--resume", str(tmp_path / "alone"), "--epochs", "2"]
    assert cli.main([*again, "--beside", "standard"]) == 2
    assert "lies alone" in capsys.readouterr().err
    assert cli.main(again) == 0
    assert checkpoint.load(tmp_path / "alone")["epoch"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


@pytest.mark.parametrize("settings", [{}, {"method": "trades"}, {"beside": None}])
def test_a_comparison_whose_settings_name_nothing_beside_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = TrainConfig(settings.get("method", "atlas"), resume=str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json does not say which methods lie beside (atlas|trades): edited"):
        compare(config, splits=splits())


def test_the_command_line_goes_on_with_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    save, written = engine.save, []

    def stopped(run: Any) -> None:
        save(run)
        written.append(run.config.method)
        if len(written) == 3:  # the second of three is about to begin
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save", stopped)
        assert cli.main(["train", *QUICK]) == 130
    out, error = capsys.readouterr()
    assert "stopped; to go on from the last checkpoint: atlas train --resume runs/digits-1\n" in out
    assert error == "\natlas: stopped\n" and "FOLDER" not in out
    assert cli.main(["train", "--resume", "runs/digits-1"]) == 0
    rows = capsys.readouterr().out.split("method ")[1].splitlines()
    assert [row.split()[0] for row in rows[2:5]] == ["standard", "one_step_adv", "atlas"]
    results = json.loads(Path("runs/digits-1/results.json").read_text())
    assert results["command"] == "atlas train --resume runs/digits-1"
    assert results["config"]["beside"] == ["standard", "one_step_adv"] and results["config"]["train_size"] == 64
    assert cli.main(["train", "--resume", "runs/digits-1", "--beside", "standard", "n_fgsm"]) == 0
    for file in ("results.json", "config.json"):
        written = json.loads(Path("runs/digits-1", file).read_text())
        assert written.get("config", written)["beside"] == ["standard", "one_step_adv", "n_fgsm"]
    rows = capsys.readouterr().out.split("method ")[1].splitlines()
    assert [row.split()[0] for row in rows[2:6]] == ["standard", "one_step_adv", "n_fgsm", "atlas"]


def test_the_command_line_names_what_goes_on_with_a_comparison_on_data_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    out = tmp_path / "out"
    config = TrainConfig(**TINY | {"epochs": 1, "method": "standard", "beside": ("n_fgsm",), "out_dir": str(out)})
    compare(config, splits=splits(), show="silent", say=lambda text: None)
    assert cli.main(["train", "--resume", str(out)]) == 2
    assert f"atlas_train.stored.resume_compare({str(out)!r}, splits=...)" in capsys.readouterr().err
    quiet: dict[str, Any] = {"splits": splits(), "show": "silent", "say": lambda text: None}
    assert list(resume_compare(out, epochs=2, **quiet)) == ["n_fgsm", "standard"]
    assert list(resume_compare(out / "n_fgsm", epochs=3, **quiet)) == ["n_fgsm"]
    assert checkpoint.load(out / "n_fgsm")["epoch"] == 3 and checkpoint.load(out / "standard")["epoch"] == 2


# --- stops and failures


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_in_the_middle_of_a_write_leaves_the_file_from_before(
    sent: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    write, written = torch.save, []

    def half(content: Any, path: Path) -> None:
        written.append(path)
        write(content, path)
        if len(written) == 2:  # the first is that of the beginning
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            signal.raise_signal(sent)

    before = signal.getsignal(sent)
    monkeypatch.setattr(torch, "save", half)
    assert cli.main(["train", *QUICK, "--method", "standard", "--beside", "none"]) == status
    assert signal.getsignal(sent) is before
    assert "to go on from the last checkpoint: atlas train --resume runs/digits-1/standard" in capsys.readouterr().out
    assert sorted(p.name for p in Path("runs/digits-1/standard").iterdir()) == ["last.pt", "log.csv"]
    assert checkpoint.load("runs/digits-1")["epoch"] == 0


def test_a_run_from_python_that_is_told_to_end_leaves_with_the_usual_status(tmp_path: Path) -> None:
    def end(row: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated) as caught:
        engine.train(TrainConfig(**STANDARD), splits=splits(), folder=tmp_path / "run", on_epoch=end)
    assert isinstance(caught.value, SystemExit) and caught.value.code == 143
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.pt", "log.csv"]
    handler = signal.signal(signal.SIGTERM, seen := lambda number, frame: None)
    engine.train(TrainConfig(**STANDARD), splits=splits(), on_epoch=end)  # who handles it himself goes on doing so
    assert signal.signal(signal.SIGTERM, handler) is seen


@pytest.mark.parametrize("beside", [(), ("adv",)])
def test_a_run_that_fails_at_its_first_step_leaves_no_folder(beside: tuple[str, ...], tmp_path: Path) -> None:
    out = str(tmp_path / "deep" / "out")
    config = TrainConfig(**STANDARD | {"beside": beside, "out_dir": out, "tensorboard": True})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match="no such step"):
        patch.setattr(methods.Standard, "objective", lambda *args: (_ for _ in ()).throw(TypeError("no such step")))
        compare(config, splits=splits(), show="silent", say=lambda text: None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match="no such step"):
        patch.setattr(methods.Standard, "objective", lambda *args: (_ for _ in ()).throw(TypeError("no such step")))
        engine.train(TrainConfig(**STANDARD), splits=splits(), folder=tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []
    engine.train(TrainConfig(**STANDARD), splits=splits(), folder=tmp_path / "there")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match="no such step"):
        patch.setattr(methods.Standard, "objective", lambda *args: (_ for _ in ()).throw(TypeError("no such step")))
        resume(tmp_path / "there", splits=splits(), epochs=3)
    assert checkpoint.load(tmp_path / "there")["epoch"] == 2


@pytest.mark.parametrize("full", [False, True])
def test_what_cannot_be_written_is_named_and_the_checkpoint_from_before_stays(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    if full:  # the same errors, of a disk
        monkeypatch.setattr(writing, "_is_too_large", lambda *args: False)
    path, big = tmp_path / "last.pt", nn.Linear(500, 500)
    checkpoint.save(path, {"model": {"w": torch.ones(2)}})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        for name, write in {
            "last.pt": lambda path: checkpoint.save(path, {"model": big.state_dict()}),
            "model.safetensors": lambda path: checkpoint.export_state_dict(big, path),
            "log.csv": lambda path: writing.write_text(path, "x" * 300_000),
        }.items():
            why = r"its disk takes no more \([\d,.]+ MB free\)" if full else r"it is larger .* \(ulimit -f\)"
            message = rf"{tmp_path / name} could not be written: {why}.*try again$"
            with pytest.raises(OSError, match=message):
                write(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert torch.equal(checkpoint.load(tmp_path)["model"]["w"], torch.ones(2))


def test_a_disk_that_is_too_small_is_known_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checkpoint is written beside the one that is there, and best.pt may be a third."""
    config = TrainConfig(**TINY | {"epochs": 1, "val_size": 8})
    run = engine.train(config, splits=splits(), folder=tmp_path / "there")
    size = (tmp_path / "there" / "last.pt").stat().st_size
    monkeypatch.setattr("atlas_train.engine.fit", lambda *args: pytest.fail("it trains"))
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((size // 4, False), (3 * size, True)):
        monkeypatch.setattr("atlas_train.saving.shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        how: dict[str, Any] = {"splits": splits(), "folder": tmp_path / "new"}
        error, message = (pytest.fail.Exception, "it trains") if fits else (OSError, "MB free, and this run writes")
        with pytest.raises(error, match=message):
            engine.train(config, **how)
        assert (tmp_path / "new" / "last.pt").exists() == fits
    assert run.epoch == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_only_read_is_named_with_the_remedy(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No permission bits, which root passes over."""

    def refused(*args: Any, **how: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    if there:
        (tmp_path / "run").mkdir()
    monkeypatch.setattr("atlas_train.folders.os.open" if there else "pathlib.Path.mkdir", refused)
    with pytest.raises(PermissionError, match=r"run cannot be written to \(Read-only file system\): choose another"):
        engine.train(TrainConfig(**TINY), splits=splits(), folder=tmp_path / "run")


# --- one run at a time


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    seen: list[str] = []

    def second(row: dict[str, Any]) -> None:
        def run() -> None:
            for more in ({}, {"resume": str(tmp_path)}):
                try:
                    engine.train(TrainConfig(**STANDARD | more), splits=splits(), folder=tmp_path)
                except FileExistsError as error:
                    seen.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    engine.train(TrainConfig(**STANDARD | {"epochs": 1}), splits=splits(), folder=tmp_path, on_epoch=second)
    host = folders.socket.gethostname()
    assert len(seen) == 2
    assert all(f"another run is writing to {tmp_path}: process {os.getpid()} on {host}" in text for text in seen)
    assert not (tmp_path / ".lock").exists()
    assert resume(tmp_path, splits=splits(), epochs=2).epoch == 2


def test_a_comparison_does_not_begin_beside_a_run_in_one_of_its_folders(tmp_path: Path) -> None:
    config = TrainConfig(**STANDARD | {"epochs": 1, "out_dir": str(tmp_path), "beside": ("adv",)})
    compare(config, splits=splits(), show="silent", say=lambda text: None)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    refused: list[str] = []

    def run() -> None:
        with pytest.raises(FileExistsError) as caught:
            compare(replace(config, resume=str(tmp_path), epochs=2), splits=splits(), show="silent")
        refused.append(str(caught.value))

    with folders.locked(tmp_path / "adv"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert f"another run is writing to {tmp_path / 'adv'}" in refused[0]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {path for path in files if path.is_file() and files[path] != after[path]} == set()


def test_the_lock_of_a_killed_run_is_not_in_force_and_its_leftovers_go(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from atlas_train.folders import locked
folder = Path({str(tmp_path)!r})
with locked(folder):
    (folder / f".last.pt.{{os.getpid()}}.tmp").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    others = tmp_path / f".last.pt.{os.getppid()}.tmp"  # of a process that runs
    others.touch()
    assert (tmp_path / ".lock").exists() and len(list(tmp_path.glob(".last.pt.*"))) == 2
    with folders.locked(tmp_path):
        assert list(tmp_path.glob(".last.pt.*")) == [others]
    assert not (tmp_path / ".lock").exists()


def test_folders_are_numbered_and_never_shared(tmp_path: Path) -> None:
    with folders.numbered(tmp_path, "a/../b c") as first, folders.numbered(tmp_path, "a/../b c") as second:
        assert (first, second) == (tmp_path / "a_.._b_c-1", tmp_path / "a_.._b_c-2")
    (tmp_path / "lost").symlink_to("nothing")  # a link, in which no folder can ever be made
    with pytest.raises(NotADirectoryError, match="lost is a link to nothing"), folders.numbered(tmp_path / "lost", "x"):
        pass
    with pytest.raises(KeyError), folders.numbered(tmp_path / "new", "x"):
        raise KeyError
    assert not (tmp_path / "new").exists()


# --- what results hold


def test_results_hold_what_was_used_and_no_place(tmp_path: Path) -> None:
    home = tmp_path / "jane"
    config = TrainConfig(**TINY | {"epochs": 1, "beside": ("adv",), "out_dir": str(home / "out"), "awp": 0.01,
                                   "data_dir": str(home / "data")})  # fmt: skip
    command = ["atlas", "train", "--data-dir", str(home / "data"), f"--out-dir={home}/out", "--eps", "8/255", "../x y"]
    compare(config, splits=splits(), show="silent", say=lambda text: None, command=command)
    written = json.loads((home / "out" / "results.json").read_text())
    assert written["command"] == "atlas train --data-dir DATA-DIR --out-dir=OUT-DIR --eps 8/255 'x y'"
    own = written["methods"]["atlas+awp"]["hyper"]
    assert own == methods.ATLAS(TINY["eps"]).in_use()
    assert own["step_size"] == 1.25 * TINY["eps"] and own["radius"] == TINY["eps"] / 2 and own["local_weight"] == 1.0
    assert written["config"]["hyper"] == {f"atlas.{key}": value for key, value in own.items()} | {
        f"adv.{key}": value for key, value in written["methods"]["adv"]["hyper"].items()
    }
    assert written["config"]["awp"] == 0.01 and written["data"] == identity.record(splits())
    assert written["network"]["name"] == "digits_net" and written["network"]["parameters"] > 0
    made = written["environment"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["date"]) and made["commit"] == commit()
    assert {"atlas-kernels", "torch", "python", "numpy", "device", "platform"} <= set(made)
    for path in (path for path in home.rglob("*") if path.is_file()):
        assert b"jane" not in path.read_bytes(), path
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(), path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_commit_is_that_of_the_source_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = commit()
    assert before is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", before)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert commit() == before
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert commit() is None


def test_recorded_settings_name_no_folder() -> None:
    config = TrainConfig(model="/home/jane/nets.py:Net", data_dir="/home/jane", out_dir="x", resume="y")
    assert recorded(config)["model"] == "nets.py:Net" and not {"data_dir", "out_dir", "resume"} & set(recorded(config))
    assert recorded(replace(config, model="../nets.py:Net"))["model"] == "nets.py:Net"
    assert recorded(replace(config, model="nets/my.py:Net"))["model"] == "nets/my.py:Net"
    assert resolved(TrainConfig(dataset="digits", **TINY), splits()).dataset == "bars"


def test_what_is_given_is_what_is_evaluated(tmp_path: Path) -> None:
    """0 is no default, and what cannot be is named before anything runs."""
    engine.train(TrainConfig(**STANDARD | {"epochs": 1}), splits=splits(), folder=tmp_path)

    def evaluated(**how: Any) -> Any:
        (found,) = evaluate_checkpoint(tmp_path, splits=splits(), say=str, **{"size": 20, "steps": 1} | how).values()
        return found.evaluation

    at_zero = evaluated(eps=0.0)
    assert at_zero.eps == 0 and at_zero.clean == at_zero.fgsm == at_zero.pgd
    for how in ({"size": 0}, {"size": 2.5}, {"steps": 0}, {"threads": 0}, {"threads": 10**6}, {"seed": -1},
                {"seed": 2**64}, {"autoattack": -1}, {"eps": "8/255"}, {"eps": -0.1}):  # fmt: skip
        (name,) = how
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            evaluated(**how)
    assert cli.main(["evaluate", str(tmp_path)]) == 2, "its data are one's own"
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path), "--threads", "1000000"])


def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    """So do /dev/null and standard output, which a file was renamed over."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writing.write_json(pipe, {"clean": 1.0})
    assert json.loads(os.read(reader, 1000)) == {"clean": 1.0} and pipe.is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert is_stream("/dev/null") and is_stream("/dev/stdout") and not is_stream(tmp_path / "none")


def test_a_comparison_without_test_images_does_not_begin(tmp_path: Path) -> None:
    empty = replace(splits(), test=splits(4, 0).test)
    with pytest.raises(ValueError, match="bars has no test images"):
        compare(TrainConfig(**STANDARD, out_dir=str(tmp_path / "new")), splits=empty, show="silent", say=str)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_run_where_gradients_are_off(around: Any) -> None:
    with around():
        found = engine.train(TrainConfig(**STANDARD | {"epochs": 1}), splits=splits())
    assert same(weights(found.model), weights(engine.train(found.config, splits=splits()).model))
