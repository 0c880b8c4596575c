"""Networks by import path: built, trained, resumed and evaluated, and never from a checkpoint's word alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from atlas_train import checkpoint, cli, models
from atlas_train.config import TrainConfig

CODE = """
import helper
from torch import nn

VALUE = 3
open("ran", "a").write("x")

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, width=4):
        super().__init__(nn.Flatten(), nn.Linear(64 * in_channels, width), nn.ReLU(), nn.Linear(width, num_classes))

def make(*, num_classes, in_channels):
    return helper.twice(Net(num_classes, in_channels))

def nothing(num_classes, in_channels):
    return None

def greedy(num_classes, in_channels, depth):
    return Net(num_classes, in_channels)

def grey(num_classes):
    return Net(num_classes, 1)

def like_torchvision(*, weights=None, progress=True, **kwargs):
    return grey(**kwargs)

def failing(num_classes, in_channels):
    raise KeyError("a\\nb")

class Fails(Net):
    def forward(self, x):
        return super().forward(x, 1)

class FailsInTraining(Net):
    def forward(self, x):
        return super().forward(x) + (None if self.training else 0)

class Few(Net):
    def forward(self, x):
        return super().forward(x)[:, :4]

class One(Net):
    def forward(self, x):
        return super().forward(x)[:, :1]

class Spatial(Net):
    def forward(self, x):
        return super().forward(x)[..., None]
"""
SIZES = {"num_classes": 3, "in_channels": 2}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file, a helper beside it, and a package in the current folder."""
    monkeypatch.chdir(tmp_path)
    modules, path = dict(sys.modules), list(sys.path)
    for folder in ("nets", "mypackage"):
        Path(folder).mkdir()
    Path("nets/my_net.py").write_text(CODE)
    Path("nets/helper.py").write_text("def twice(net): return net\n")
    Path("mypackage/__init__.py").write_text("")
    Path("mypackage/net.py").write_text(CODE.replace("helper", "mypackage.helper"))
    Path("mypackage/helper.py").write_text("def twice(net): return net\n")
    Path("mypackage/broken.py").write_text("import a_module_that_is_not_there\n")
    yield
    assert sys.path == path
    for name in set(sys.modules) - set(modules):
        if name.startswith(("mypackage", "_atlas_model", "helper")):
            del sys.modules[name]


@pytest.mark.parametrize("path", ["nets/my_net.py:Net", "nets/my_net.py:make", "mypackage.net:Net"])
def test_a_class_or_a_function_in_a_file_or_a_module(path: str) -> None:
    model = models.network(path, **SIZES)
    assert model(torch.rand(5, 2, 8, 8)).shape == (5, 3)


def test_width_goes_to_the_factory_only_if_it_is_given() -> None:
    assert models.network("nets/my_net.py:Net", **SIZES, width=7)[1].out_features == 7
    assert models.network("nets/my_net.py:Net", **SIZES)[1].out_features == 4
    with pytest.raises(
        ValueError, match="called with num_classes=3, in_channels=2, width=7, and it does not take that"
    ):
        models.network("nets/my_net.py:make", **SIZES, width=7)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nets/other.py:Net", "there is no file .*other.py"),
        ("my_packag.net:Net", "no module 'my_packag', neither installed nor in this folder"),
        ("mypackage.nett:Net", "no module 'mypackage.nett'"),
        ("nets/my_net.py:Nett", "has no 'Nett'; the nearest is 'Net'"),
        ("nets/my_net.py:VALUE", "must be a class or a function, got int"),
        ("nets/my_net.py:nothing", "must give a torch.nn.Module, got NoneType"),
        ("nets/my_net.py:greedy", "missing a required argument: 'depth'"),
        ("nets/my_net.py:failing", r"in_channels=2, and it fails: KeyError: 'a\\nb'"),
        ("nets/my_net.py:", "must be package.module:factory"),
        (":Net", "must be package.module:factory"),
        ("digits-net", "nothing known as 'digits-net'"),
    ],
)
def test_what_is_wrong_with_a_path_is_said(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.network(path, **SIZES)


@pytest.mark.parametrize("factory", ["grey", "like_torchvision"])
def test_a_factory_that_takes_no_in_channels_is_called_without(factory: str) -> None:
    assert models.network(f"nets/my_net.py:{factory}", num_classes=3, in_channels=1)[1].in_features == 64


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "grey3",
            "given images [2, 1, 8, 8] in [0, 1], fails: RuntimeError: mat1 and mat2 shapes cannot",
        ),
        (
            "Fails",
            "given images [2, 1, 8, 8] in [0, 1], fails: TypeError: Sequential.forward() takes 2 positional "
            "arguments but 3 were given\n",
        ),
        ("conv3", "channels instead; a factory that takes in_channels is told how many the images have\n"),
        (
            "lazy",
            "1.weight is not initialised yet: run the model once, on images [2, 1, 8, 8], in the factory, before it "
            "returns the model\n",
        ),
        ("Few", "given images [2, 1, 8, 8] in [0, 1], gives 4 logits, fewer than the data set's 10 classes"),
        (
            "One",
            "given images [2, 1, 8, 8] in [0, 1], gives logits [2, 1], and a label needs two classes or more: stack",
        ),
        ("Spatial", "given images [2, 1, 8, 8] in [0, 1], must give logits [2, 10], got [2, 10, 1]"),
        ("FailsInTraining", "atlas: TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType' (/"),
    ],
)
def test_what_a_network_cannot_do_is_one_line(
    factory: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    with open("nets/my_net.py", "a") as file:
        file.write("\ndef grey3(num_classes):\n    return Net(num_classes, 3)\n")
        file.write("\ndef conv3(num_classes):\n    return nn.Conv2d(3, num_classes, 3)\n")
        file.write("\ndef lazy(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n")
    train = ["train", "--method", "standard", "--beside", "none", "--epochs", "1", "--train-size", "64"]
    train += ["--model", f"nets/my_net.py:{factory}", "--out-dir", "run"]
    assert cli.main(train) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    if factory == "FailsInTraining":
        assert "nets/my_net.py:" in error and "in forward)" in error and "ATLAS_DEBUG=1" in error
    else:
        assert f"model nets/my_net.py:{factory}" in error and not Path("run").exists()
    monkeypatch.setenv("ATLAS_DEBUG", "1")
    assert cli.main([*train[:-1], "again"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_in_the_code_is_its_own() -> None:
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        models.network("mypackage.broken:Net", **SIZES)


def ran() -> int:
    return len(Path("ran").read_text()) if Path("ran").exists() else 0


def test_code_named_in_a_checkpoint_is_run_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    path = "nets/my_net.py:Net"
    quick = ["--epochs", "1", "--train-size", "64", "--eval-size", "20", "--probe-size", "0", "--width", "5"]
    train = ["train", "--method", "standard", "--beside", "none", "--out-dir", "run", *quick]
    assert cli.main([*train, "--model", path]) == 0
    assert checkpoint.load("run/standard")["arch"]["name"] == path and ran() == 1
    capsys.readouterr()
    for command in (["evaluate", "run/standard"], ["train", "--resume", "run/standard", "--epochs", "2"]):
        assert cli.main(command) == 2
        assert f"code that a file names is not run unasked: if you trust it, say so with --model {path}" in (
            capsys.readouterr().err
        )
    assert ran() == 1
    assert cli.main(["evaluate", "run/standard", "--size", "20", "--model", path]) == 0
    assert cli.main(["train", "--resume", "run/standard", "--epochs", "2", "--model", path]) == 0
    assert "epoch 2/2" in capsys.readouterr().out and ran() == 3


def test_neither_part_of_a_checkpoint_can_smuggle_a_path_in(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    config = {"model": "nets/my_net.py:Net", "method": "standard"}
    arch = {"name": "digits_net", "by_name": True, "num_classes": 10, "in_channels": 1, "width": None}
    state = {"model": {}, "config": config, "arch": arch}
    checkpoint.save(Path("a.pt"), state)
    assert cli.main(["train", "--resume", "a.pt"]) == 2 and "not run unasked" in capsys.readouterr().err
    checkpoint.save(Path("b.pt"), state | {"arch": arch | {"name": config["model"]}})
    with pytest.raises(ValueError, match="not run unasked"):
        checkpoint.load_model("b.pt")
    assert ran() == 0


def test_a_network_of_ones_own_loads_with_its_import_path() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
    arch = {"name": "Sequential", "by_name": False, "num_classes": 10, "in_channels": 1, "width": None}
    checkpoint.save(Path("c.pt"), {"model": own.state_dict(), "config": {"method": "adv"}, "arch": arch})
    with pytest.raises(ValueError, match="a Sequential of your own: .*--model package.module:factory"):
        checkpoint.load_model("c.pt")
    loaded, _ = checkpoint.load_model("c.pt", "mypackage.net:Net")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), own(x))
    with pytest.raises(ValueError, match="do not fit a DigitsNet"):
        checkpoint.load_model("c.pt", "digits_net")


def test_an_import_path_is_a_setting() -> None:
    assert TrainConfig(model="a.b:c").model == "a.b:c" and not models.is_import_path("digits_net")
