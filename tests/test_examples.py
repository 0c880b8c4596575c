"""The examples run as they lie there, and what they print is what they promise."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import runpy
import socket
import sys
import types
from pathlib import Path

import pytest
import torch

from atlas_train import cli, data

EXAMPLES = Path(__file__).resolve().parents[1] / "python" / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example as a script; gives clean and robust accuracy in percent, by the name in front of them."""

    def run(name: str, *flags: str) -> dict[str, tuple[float, float]]:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = re.findall(r"^(\w+): clean ([\d.]+)%, PGD-20 ([\d.]+)%", capsys.readouterr().out, flags=re.MULTILINE)
        assert printed
        return {name: (float(clean), float(robust)) for name, clean, robust in printed}

    return run


def test_plain_training(example):
    found = example("plain_training.py", "--epochs", "2")
    assert list(found) == ["standard", "atlas"]
    assert found["standard"][0] > 90 and found["atlas"][0] > 70
    assert found["atlas"][1] > found["standard"][1] + 15


def test_own_model(example):
    found = {
        **example("own_model.py", "--epochs", "2", "--method", "standard"),
        **example("own_model.py", "--epochs", "2", "--method", "atlas"),
    }
    assert found["standard"][0] > 90 and found["atlas"][0] > 70
    assert found["atlas"][1] > found["standard"][1] + 15


def test_own_model_by_its_import_path(tmp_path, capsys):
    """The command line of the script's text."""
    path = f"{EXAMPLES / 'own_model.py'}:Net"
    settings = ["--epochs", "1", "--beside", "none", "--eval-size", "50", "--out-dir", str(tmp_path / "run")]
    assert cli.main(["train", "--model", path, *settings]) == 0
    assert re.search(r"^atlas +\d", capsys.readouterr().out, flags=re.MULTILINE)


def test_trades_before(example):
    clean, robust = example("trades_before.py", "--epochs", "2")["trades"]
    assert clean > 60 and robust > 10


def test_trades_after_is_trades_before(example):
    """The same algorithm from the same seed: only rounding tells the two apart."""
    before, after = (example(f"trades_{when}.py", "--epochs", "1")["trades"] for when in ("before", "after"))
    assert before == pytest.approx(after, abs=3)


def test_trades_after_differs_by_an_import():
    before, after = ((EXAMPLES / f"trades_{when}.py").read_text().split('"""', 2)[2] for when in ("before", "after"))
    function = re.search(r"\ndef trades_loss\(.*?\n\n(?=\n)", before, flags=re.DOTALL)
    assert function
    rest = before.replace(function[0], "")
    changes = [
        line for line in difflib.ndiff(rest.split("\n"), after.split("\n")) if line[0] in "+-" and line[2:].strip()
    ]
    assert changes == ["+ from atlas_kernels.compat.trades import trades_loss"]


def test_own_data(tmp_path, monkeypatch, capsys):
    """As its docstring says: declared whole, or asked for what is missing."""
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    path = f"{EXAMPLES / 'own_data.py'}:PHOTOS"
    quick = ("--epochs", "1", "--train-size", "640", "--eval-size", "100", "--method", "atlas")
    assert cli.main(["train", "--dataset", path, *quick]) == 0
    clean, robust = re.search(
        r"^atlas +([\d.]+) % .*? % +([\d.]+) %", capsys.readouterr().out, flags=re.MULTILINE
    ).groups()
    assert float(clean) > 80 and float(robust) > 70
    assert cli.main(["evaluate", "runs/photos-1/atlas", "--dataset", path, "--size", "20"]) == 0
    photos = data.load(path)
    measured, declared = photos.train.mean_std(), (photos.declared.mean, photos.declared.std)
    assert [round(value, 4) for row in measured for value in row] == [value for row in declared for value in row]
    assert cli.main(["train", "--dataset", path.replace("PHOTOS", "images"), "--model", "digits_net", *quick]) == 2
    assert "no batch_size, lr of its own" in capsys.readouterr().err


def test_trainer(example, tmp_path, capsys):
    found = example("trainer.py", "--epochs", "2", "--folder", str(tmp_path / "run"))
    assert found["atlas"][0] > 70 and (tmp_path / "run" / "last.pt").exists()


def test_tracking(example, monkeypatch):
    """With a stand-in that takes what both trackers take."""
    told = []
    module = types.ModuleType("trackio")
    module.init = lambda *, project, name, config: told.append((project, name, config["epochs"]))
    module.log, module.finish = told.append, lambda: told.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", module)
    example("tracking.py", "--epochs", "2")
    begin, first, second, end, last = told
    assert begin == ("atlas", "atlas-digits-seed0", 2) and (first["epoch"], second["epoch"]) == (1, 2)
    assert first["loss"] > second["loss"] > 0 and end == {"finished": True} and last == "finished"


@pytest.mark.parametrize("flags", [(), ("--accumulate", "2", "--precision", "bf16")])
def test_plain_ddp_alone(flags, example):
    clean, robust = example("plain_ddp.py", "--epochs", "2", *flags)["ddp"]
    assert clean > 60 and robust > 20


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_plain_ddp_with_two_processes(monkeypatch, tmp_path):
    """As torchrun starts them, but forked: rank 0 prints what both have trained."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(sys, "argv", ["plain_ddp.py", "--epochs", "2", "--accumulate", "2"])
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    children = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            os.environ["RANK"] = str(rank)
            with open(tmp_path / str(rank), "w") as file, contextlib.redirect_stdout(file):
                code = 1
                with contextlib.suppress(BaseException):
                    runpy.run_path(str(EXAMPLES / "plain_ddp.py"), run_name="__main__")
                    code = 0
            os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    (clean,) = re.findall(r"^ddp: clean ([\d.]+)%", (tmp_path / "0").read_text(), flags=re.MULTILINE)
    assert float(clean) > 50 and not (tmp_path / "1").read_text()


def test_fabric(example, monkeypatch):
    """With Lightning where it is installed, else with a stand-in of the calls that the example makes."""
    if importlib.util.find_spec("lightning") is None:
        module = types.ModuleType("lightning.fabric")
        module.Fabric = _Fabric
        monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, "lightning.fabric", module)
    clean, robust = example("fabric.py", "--epochs", "2")["fabric"]
    assert clean > 60 and robust > 20


class _Fabric:
    """One process on a CPU."""

    is_global_zero, device = True, torch.device("cpu")

    def __init__(self, precision):
        self.launch = self.autocast = contextlib.nullcontext
        self.seed_everything = torch.manual_seed
        self.setup_dataloaders = lambda loader: loader
        self.backward = torch.Tensor.backward

    def setup(self, module, optimizer):
        wrapped = torch.nn.Sequential()
        wrapped.module, wrapped.forward = module, module.forward
        return wrapped, optimizer
