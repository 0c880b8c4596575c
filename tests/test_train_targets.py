"""`atlas evaluate` with attacks by name: of a run, a state dict or a factory; and the files that it leaves."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from atlas_kernels.attacks import ensemble, saved
from atlas_train import checkpoint, cli, engine, models, stored, targets
from atlas_train.config import TrainConfig
from atlas_train.evaluate import evaluate
from atlas_train.flags import declared, parse
from atlas_train.report import robustness_figure, write_robustness
from atlas_train.robustness import signs
from atlas_train.robustness.export import export_state_dict
from atlas_train.robustness.named import named
from atlas_train.robustness.report import RECORD
from tiny_runs import TINY, same, splits, weights

CODE = """
import torch
from atlas_train.data import DataSplits
from tiny_runs import splits as bars
from atlas_train import models

def colour():
    return bars(channels=3)

def network(num_classes, in_channels):
    net = models.build("digits_net", num_classes=num_classes, in_channels=in_channels, width=4, normalize=False)
    net.load_state_dict(torch.load("bare.pt"))
    return net
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(CODE)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "standard"
    engine.train(TrainConfig(**TINY | {"method": "standard", "epochs": 2}), splits=splits(), folder=folder)
    return folder


BARS = ["--dataset", "own.py:bars"]
QUICK = ["--attacks", "fgsm", "pgd-2", "--device", "cpu"]


def test_a_run_at_several_radii_and_every_file(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    files = ["--json", "e.json", "--per-sample", "e.csv", "--curve", "e.png", "--export-state-dict", "e.pt"]
    asked = [*QUICK, "--eps", "0.05", "51/255", "--per-class", *files]
    assert cli.main(["evaluate", str(run_folder), *BARS, *asked]) == 0
    text = capsys.readouterr().out
    assert "evaluating 40 images at eps 0.05 (l_inf), 0.2 (l_inf): clean, FGSM, PGD-2" in text
    assert "wrote e.json: the record and all figures\n" in text and "wrote e.pt: the weights" in text
    assert text.count("class, eps ") == 2 and text.count("(l_inf)  ") >= 2
    written = json.loads(Path("e.json").read_text())
    assert list(written)[: len(RECORD)] == list(RECORD)
    assert (written["dataset"], written["architecture"], written["eps"]) == ("bars", "digits_net", "0.05")
    own = written["evaluation"]
    assert [(a["attack"], a["eps"]) for a in own["attacks"]][1:3] == [("fgsm", 0.05), ("pgd-2", 0.05)]
    network, _ = checkpoint.load_model(run_folder)
    assert own["weights"] == checkpoint.fingerprint(network) and own["data"]["test"]["images"] == 40
    assert own["target"] == "standard" and own["environment"]["threads"] == 1
    report = evaluate(network, splits().test, (0.05, 0.2), attacks=("fgsm", "pgd-2"))
    assert [a["accuracy"] for a in own["attacks"]] == [o.accuracy for o in report.outcomes]
    assert Path("e.csv").read_text() == report.samples_csv()
    assert Path("e.png").read_bytes().startswith(b"\x89PNG")
    assert same(torch.load("e.pt")["state_dict"], weights(network))
    write_robustness(Path("e.pdf"), report.curves(), "linf")
    assert Path("e.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "radii, norm, label",
    [
        ((4 / 255, 8 / 255), "linf", "eps / 255 (l_inf)"),
        ((0.3, 0.4), "linf", "eps (l_inf)"),
        ((8 / 255, 0.5), "l2", "eps (l2)"),
    ],
)
def test_the_curve_has_the_unit_of_its_radii(radii: tuple[float, ...], norm: Any, label: str) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = robustness_figure({"FGSM": [(0.0, 1.0), *((eps, 0.5) for eps in radii)]}, norm).axes
    scale = 255 if "255" in label else 1
    assert axes.get_xlabel() == label and axes.lines[0].get_xdata()[1] == pytest.approx(scale * radii[0])


def test_a_folder_means_its_last_epoch(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    opened = stored.opened

    def with_a_best(*args: Any, **how: Any) -> Any:
        network, description, *rest = opened(*args, **how)
        return network, description | {"epoch": 2, "best": 1}, *rest

    monkeypatch.setattr(stored, "opened", with_a_best)
    (run_folder / "best.pt").touch()
    told = f"evaluating the last epoch, 2; the best one, 1, is in {run_folder}/best.pt\n"
    for target, expected in ((run_folder, True), (run_folder / "last.pt", False)):
        assert cli.main(["evaluate", str(target), *BARS, *QUICK, "--json", "e.json"]) == 0
        assert (told in capsys.readouterr().out) is expected
        assert json.loads(Path("e.json").read_text())["evaluation"]["epoch"] == 2
    (run_folder / "best.pt").unlink()


def test_without_attacks_it_is_what_it_was(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    plain = ["evaluate", str(run_folder), *BARS, "--device", "cpu", "--json", "e.json"]
    assert cli.main([*plain, "--eps", "0.05", "--steps", "3"]) == 0
    assert "method" in capsys.readouterr().out and json.loads(Path("e.json").read_text())["pgd_steps"] == 3
    assert cli.main([*plain, "--eps", "0.05", "--steps", "3", "--restarts", "2", "--table", "latex"]) == 0
    assert r"\begin{tabular}" in capsys.readouterr().out
    assert json.loads(Path("e.json").read_text())["evaluation"]["attacks"][2]["attack"] == "pgd-3-2"


def test_a_state_dict_says_neither_network_nor_images(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    network, _ = checkpoint.load_model(run_folder)
    wanted = evaluate(network, splits().test, 0.2, attacks=("fgsm", "pgd-2"))
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights(network).items()}}, "w.pth")

    def said(*flags: str) -> str:
        status = cli.main(["evaluate", "w.pth", *QUICK, "--eps", "0.2", *flags])
        shown = capsys.readouterr()
        return shown.err if status else shown.out

    assert "dataset: w.pth does not say which images it is for: name them" in said("--model", "digits_net")
    assert "model: w.pth is a state dict, which does not say of which network: name it" in said(*BARS)
    other = said(*BARS, "--model", "digits_net", "--width", "5")
    assert "holds the weights of another network than DigitsNet" in other and "another width" not in other
    assert "; 5 more shapes differ. If it is of another width, say it (--width)" in said(*BARS, "--model", "digits_net")
    out = said(*BARS, "--model", "digits_net", "--width", "4", "--json", "e.json")
    assert f"{wanted.outcome('pgd-2').percent}" in out
    assert json.loads(Path("e.json").read_text())["evaluation"]["attacks"][2]["accuracy"] == wanted.accuracy("pgd-2")
    Path("w.pth").write_bytes(b"damaged")
    assert "state dict w.pth cannot be read as weights" in said(*BARS, "--model", "digits_net")


@pytest.fixture
def colours() -> dict[str, Any]:
    """A network for colour images without its normalisation, in files with and without it."""
    torch.manual_seed(0)
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 0.25)
    net = models.build("digits_net", num_classes=4, in_channels=3, width=4, normalize=(mean, std)).eval()
    bare = {name: value for name, value in weights(net).items() if not name.startswith("normalize.")}
    torch.save(bare, "bare.pt")
    torch.save({**bare, "mu": net.normalize.mean, "sigma": net.normalize.std}, "whole.pt")  # type: ignore[union-attr]
    return {"mean": mean, "std": std, "net": net}


def test_a_normalisation_is_given_apart_or_the_files_own(colours: dict[str, Any]) -> None:
    apart = {"mean": colours["mean"], "std": colours["std"]}
    ours: dict[str, Any] = {"model": "digits_net", "width": 4}
    for target, how in (("bare.pt", {**ours, **apart}), ("whole.pt", ours), ("own.py:network", apart)):
        report, found = targets.evaluate_target(
            target, ["fgsm", "pgd-2"], eps=(0.02,), splits=splits(channels=3), device="cpu", say=str, **how
        )
        wanted = evaluate(colours["net"], splits(channels=3).test, 0.02, attacks=("fgsm", "pgd-2"))
        assert all(torch.equal(a.right, b.right) for a, b in zip(report.outcomes, wanted.outcomes, strict=True)), target
        export_state_dict(found.network, Path("e.pt"), found.mean, found.std)
        assert same(torch.load("e.pt")["state_dict"], torch.load("whole.pt")), target
    bare = targets.opened("bare.pt", splits=splits(channels=3), mean=(), std=(), **ours)
    assert bare.network.normalize is None and bare.mean is None
    for target, how, text in (
        ("bare.pt", ours, "mean and std: bare.pt holds none, and colour images are usually normalised"),
        ("bare.pt", {**ours, "mean": (0.5,) * 3}, "mean and std go together"),
        ("whole.pt", {**ours, "mean": (0.5,) * 3, "std": (1.0,) * 3}, "whole.pt holds its own"),
        ("own.py", {}, "own.py is code: say which factory of it gives the network, own.py:NAME"),
        ("own.py:network", {"model": "digits_net"}, "is a factory, which gives the network itself"),
        ("own.py:missing", {}, "has no 'missing'"),
    ):
        with pytest.raises(ValueError, match=text):
            targets.opened(target, splits=splits(channels=3), **how)
    for mean, std, got in (((0.5,) * 3, (1.0,) * 3, "3"), ((0.5,), (1.0,) * 2, "1 and 2"), ((), (1.0,), "0 and 1")):
        with pytest.raises(ValueError, match=f"mean and std must have a number for each of 1 channels, got {got}:"):
            targets.opened("bare.pt", splits=splits(), mean=mean, std=std, **ours)


def test_a_stop_says_how_to_go_on(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro")
    command = ["evaluate", str(run_folder), *BARS, "--device", "cpu", "--attacks", "pgd-2", "apgd-ce"]
    assert cli.main([*command, "--per-sample", "whole.csv"]) == 0
    assert "wrote whole.csv: right or wrong, image by image\nnext: for a figure" in capsys.readouterr().out
    calls, forward = [0], ensemble.Counted.forward

    def stops(self: ensemble.Counted, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(ensemble.Counted, "forward", stops)
    assert cli.main([*command, "--state", "e.state"]) == 130
    where = "where the attack stands is in e.state: the same command goes on from there"
    assert capsys.readouterr().err.split("\n") == ["", where, "", "atlas: stopped", ""]
    held = torch.load("e.state", weights_only=True)
    held["state"]["seconds"] += 1000
    saved.save(Path("e.state"), held["whose"], held["state"])
    assert cli.main([*command, "--state", "e.state", "--per-sample", "again.csv", "--json", "e.json"]) == 0
    out = capsys.readouterr().out
    own = json.loads(Path("e.json").read_text())["evaluation"]
    assert own["attacks"][2]["seconds"] > 1000 and 1000 < own["seconds"] < 1100, "of all sessions"
    assert re.search(r"; seed 0; 10\d\d s on cpu", out)
    assert "going on from e.state" in out and "e.state may be removed: the attacks are done" in out
    assert Path("again.csv").read_text() == Path("whole.csv").read_text()
    calls[0] = 0
    assert cli.main(command) == 130
    assert "nothing is kept of it; with --state FILE the same command would go on" in capsys.readouterr().err

    def at_once(*args: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(targets, "evaluate_target", at_once)
    assert cli.main([*command, "--state", "new.state"]) == 130
    assert "nothing is kept of it: it was stopped before an attack wrote new.state\n" in capsys.readouterr().err


def test_that_nothing_is_normalised_can_be_said_in_flags() -> None:
    pytest.importorskip("tyro")
    wanted = declared(cli.EvaluateConfig, {})
    said = parse(wanted, "evaluate", "", ["--mean", "none", "--std", "none"])
    assert said.mean == said.std == ()
    left = parse(wanted, "evaluate", "", [])
    assert left.mean is left.std is None


def test_what_a_report_cannot_have_is_said(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    for flags, text in (
        (["--attacks", "pdg-20"], "attacks: nothing known as 'pdg-20'"),
        (["--attacks", "pgd-20", "--steps", "5"], "--steps is for evaluations without --attacks"),
        (["--attacks", "pgd-20", "--autoattack", "5"], "--autoattack is for evaluations without --attacks"),
        (["--attacks", "pgd-20", "--mean", "0.5", "--std", "1"], "is a run and says its mean, std and width itself"),
        (["--attacks", "pgd-20", "--state", "s"], "--state is looked at by autoattack, apgd, apgd-ce, apgd-t, fab-t, "
         "square alone, and none of them is run: add one to --attacks, or leave --state out"),
        (["--state", "s"], "--state is looked at by"),
        (["--attacks", "fgsm", "--search-precision", "bf16"], "--search-precision is looked at by"),
        (["--attacks", "apgd", "--autoattack-version", "rand"], "--autoattack-version is looked at by autoattack"),
        (["--attacks", "fgsm", "mifgsm-2", "--step-size", "0.1"], "--step-size is looked at by pgd-20, cw-20 alone"),
        (["--autoattack", "5", "--eps", "0.1", "0.2"], "write --attacks fgsm pgd-20 autoattack --size 5 instead"),
        (["--curve", "."], "--curve . is a folder: name a file"),
        (["--attacks", "fgsm", "--curve", "e.jpg"], "curve e.jpg: a .jpg is not drawn: name it .png, .pdf or .svg"),
        (["--attacks", "clean", "--curve", "e.png"], "--curve is looked at by attacks alone, and none of them is run"),
        (["--attacks", "fgsm", "--json", "own.py/e.json"], "--json own.py/e.json cannot be written, as no file can be"),
        (["--attacks", "fgsm", "--per-sample", "/proc/e.csv"], "--per-sample /proc/e.csv cannot be written"),
        (["--attacks", "apgd", "--state", "none/s"], "atlas: --state none/s: there is no folder none: make it first"),
        (["--attacks", "fgsm", "--norm", "l1"], "eps: bars has no usual radius in l1: give it"),
    ):  # fmt: skip
        assert cli.main(["evaluate", str(run_folder), *BARS, *flags]) == 2
        shown = capsys.readouterr()
        assert text in shown.err and "evaluating" not in shown.out


def loaded_as_at_robustbench(path: str, network: nn.Module) -> nn.Module:
    """What robustbench.utils.load_model does with a file, in the words of its own."""
    checkpoint = torch.load(path, map_location=torch.device("cpu"))
    state = checkpoint["state_dict"]
    for part in ("module.", "model."):
        state = OrderedDict((key[len(part) :] if part in key else key, value) for key, value in state.items())
    network.load_state_dict(state, strict=True)
    return network.eval()


def test_robustbench_reads_the_state_dict() -> None:
    """Its networks call mean and std mu and sigma; the other names of ours are theirs."""

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body = models.build("preact_resnet18", num_classes=10, in_channels=3, width=2, normalize=False)
            for name, child in body.named_children():
                self.add_module(name, child)
            self.body = [body]
            self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
            self.register_buffer("sigma", torch.ones(1, 3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body[0].eval()((x - self.mu) / self.sigma)

    torch.manual_seed(0)
    scale = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    ours = models.build("preact_resnet18", num_classes=10, in_channels=3, width=2, normalize=scale).eval()
    export_state_dict(ours, Path("w.pt"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded_as_at_robustbench("w.pt", Theirs())(x), ours(x))
    with pytest.raises(ValueError, match=r"inner\.model\.weight of the network holds .*RobustBench's loader cuts off"):
        export_state_dict(nn.ModuleDict({"inner": nn.ModuleDict({"model": nn.Linear(2, 2)})}), Path("w.pt"))


def test_the_page_knows_the_flags_and_the_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    seen: list[str] = []
    for module, name in ((targets, "evaluate_target"), (stored, "evaluate_checkpoint")):
        monkeypatch.setattr(module, name, lambda target, *args, **how: seen.append(target) or sys.exit())
    commands = [line.split() for line in text.splitlines() if line.startswith("atlas evaluate ")]
    for command in commands:
        with pytest.raises(SystemExit):
            cli.main(command[1:])
        if "--attacks" in command:
            words = command[command.index("--attacks") + 1 :]
            assert named(list(itertools.takewhile(lambda word: not word.startswith("--"), words)))
    assert seen == [command[2] for command in commands] and len(seen) == 5
    known = {f.name.replace("_", "-") for f in dataclasses.fields(cli.EvaluateConfig)} | {"seeds"}
    assert set(re.findall(r"`--([a-z-]+)", text)) <= known
    table = text[text.index("| sign |") : text.index("No sign is no proof")]
    source = Path(signs.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| ([a-z ]+) \|", table, re.M)) - {"sign"} == set(
        re.findall(r'Sign\(\s*"([a-z ]+)"', source)
    )
