"""Training from given weights: every form they come in, and what does not fit is refused with all differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atlas_train import checkpoint, engine, fine_tuning, models
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from tiny_runs import TINY, Lines, same, splits, weights


def config(**changed: Any) -> TrainConfig:
    return TrainConfig(**TINY | {"method": "standard", "epochs": 1} | changed)


def first_weights(settings: TrainConfig, **more: Any) -> dict[str, torch.Tensor]:
    """Those that a run begins with."""
    return weights(engine.prepare(settings, splits(), more.get("model"), None).model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with an average that differs from the weights."""
    folder = tmp_path_factory.mktemp("runs") / "before"
    engine.train(config(seed=3, averaging="ema", ema_decay=0.8), splits=splits(), folder=folder)
    return folder


def test_every_form_of_weights_is_taken(trained: Path, tmp_path: Path) -> None:
    final = checkpoint.final_weights(checkpoint.load(trained))
    assert not same(final, checkpoint.load(trained)["model"])
    torch.save(final, tmp_path / "bare.pt")
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in final.items()}, "epoch": 3}, tmp_path / "b.pth"
    )
    torch.save({"model": {k: v.double() if v.is_floating_point() else v for k, v in final.items()}}, tmp_path / "c.pt")
    torch.save({f"_orig_mod.module.{name}": value for name, value in final.items()}, tmp_path / "d.pt")
    for path in (trained, trained / "last.pt", trained / checkpoint.export_name(), *sorted(tmp_path.iterdir())):
        assert same(first_weights(config(init=str(path))), final), path
    assert not same(first_weights(config()), final)


def test_a_run_goes_on_from_them_and_resumes_without_them(trained: Path, tmp_path: Path) -> None:
    """cure fine-tunes what standard training made, as published; the file is needed at the beginning alone."""
    source = tmp_path / "weights.pt"
    torch.save(checkpoint.final_weights(checkpoint.load(trained)), source)
    settings, lines = config(method="cure", init=str(source), epochs=2), Lines()
    whole = engine.train(settings, splits=splits(), folder=tmp_path / "whole", display=lines)
    assert lines.said == [f"begins with the weights of {source}"]
    assert not same(weights(whole.model), weights(engine.train(replace(settings, init=None), splits=splits()).model))
    engine.train(settings, splits=splits(), folder=tmp_path / "part", on_epoch=lambda row: True)
    assert checkpoint.load(tmp_path / "part")["config"]["init"] == "weights.pt"  # and not where it lies
    source.unlink()
    resumed = engine.train(replace(settings, resume=str(tmp_path / "part")), splits=splits())
    assert same(weights(resumed.model), weights(whole.model))
    for other in (None, "others.pt"):
        with pytest.raises(
            ValueError, match=f"cannot be resumed with another init: it has 'weights.pt', you gave {other!r}"
        ):
            engine.train(replace(settings, init=other, resume=str(tmp_path / "part")), splits=splits())


def test_all_methods_of_a_comparison_begin_with_them(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    begin = fine_tuning.begin_with
    monkeypatch.setattr("atlas_train.run.begin_with", lambda model, path: (begun.append(path), begin(model, path)))
    settings = config(method="adv", hyper={"steps": 1}, init=str(trained), beside=("standard",), out_dir=str(tmp_path))
    compare(settings, splits=splits(), show="silent", say=lambda text: None)
    assert begun == [str(trained)] * 2


def test_weights_of_another_network_are_refused_with_the_differences(trained: Path, tmp_path: Path) -> None:
    def refused(init: Path, match: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=match):
            first_weights(config(init=str(init), **changed))

    shapes = (
        r"conv1.weight is \[4, 1, 3, 3\] there and \[8, 1, 3, 3\] here; bn1.weight is \[4\] .*; 5 more shapes differ$"
    )
    refused(trained, rf"before holds the weights of another network than DigitsNet: {shapes}", width=8)
    final = checkpoint.final_weights(checkpoint.load(trained))
    names = {name.replace("linear.", "fc9."): value for name, value in final.items()}
    torch.save(names, tmp_path / "names.pt")
    refused(
        tmp_path / "names.pt",
        "it lacks linear.weight, linear.bias; it has fc9.weight, fc9.bias, which the network does not have",
    )
    torch.save(final | {"normalize.mean": torch.full((1, 1, 1, 1), 0.5)}, tmp_path / "scaled.pt")
    refused(tmp_path / "scaled.pt", "normalize.mean is 0.5 there and 0.25 here: set --mean", mean=(0.25,), std=(1.0,))
    refused(tmp_path / "scaled.pt", "it has normalize.mean, which the network does not have")
    refused(trained, r"it lacks normalize.mean \(for weights of images .* --mean to zeros", mean=(0.25,), std=(1.0,))
    assert first_weights(config(init=str(trained), mean=(0.0,), std=(1.0,)))["normalize.std"].item() == 1
    torch.save(final | {"bn1.weight": final["bn1.weight"] * torch.nan}, tmp_path / "nan.pt")
    refused(tmp_path / "nan.pt", "bn1.weight holds NaN or infinity")
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    before = weights(own)
    with pytest.raises(ValueError, match="another network than Sequential: it lacks 1.weight, 1.bias; it has conv1"):
        engine.train(config(init=str(trained), model=None), splits=splits(), model=own)
    assert same(weights(own), before)


def test_what_are_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "numbers.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty").mkdir()
    for name, match in {
        "list.pt": "holds no tensors by name, but list",
        "numbers.pt": "holds what are no tensors: epoch, lr",
        "text.pt": "cannot be read as weights: .*tensors by name are needed",
        "text.safetensors": "cannot be read as safetensors",
    }.items():
        with pytest.raises(ValueError, match=match):
            fine_tuning.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="init: there is no file or folder .*nowhere; name a run's folder"):
        first_weights(config(init=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="no checkpoint .*empty/last.pt"):
        fine_tuning.read(tmp_path / "empty")


def test_what_published_checkpoints_hold_for_nothing_is_left_out(tmp_path: Path) -> None:
    net = models.build("wide_resnet28_10", num_classes=4, in_channels=1, width=4)
    saved = net.state_dict()
    saved |= {key.replace("block1.", "sub_block1."): value for key, value in saved.items() if key.startswith("block1.")}
    torch.save(saved, tmp_path / "published.pt")
    other = models.build("wide_resnet28_10", num_classes=4, in_channels=1, width=4)
    fine_tuning.begin_with(other, tmp_path / "published.pt")
    assert same(weights(other), weights(net))
