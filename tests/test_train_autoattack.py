"""AutoAttack's column: what is passed on, what is put back, and how it is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from atlas_train import cli, engine
from atlas_train.autoattack import AutoAttacked, InRows, autoattack
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.data import Images
from atlas_train.evaluate import Evaluation, evaluate
from atlas_train.results import Result, table
from atlas_train.run import Run
from tiny_runs import EPS, TINY, same, splits, weights


def trained() -> Run:
    return engine.train(TrainConfig(**TINY | {"method": "standard"}), splits=splits())


class Fake:
    """Stands in for pyautoattack.AutoAttack: fools every second image, and leaves traces."""

    seen: dict[str, Any] = {}

    def __init__(self, model: Any, **how: Any) -> None:
        self.model, self.apgd, self.apgd_targeted, self.fab = model, *(SimpleNamespace() for _ in range(3))
        Fake.seen = {"how": how, "attack": self}

    def run_standard_evaluation(self, x: Any, y: Any, *, batch_size: int) -> Any:
        torch.manual_seed(99)
        training = any(module.training for module in self.model.modules())
        Fake.seen |= {"x": x, "batch_size": batch_size, "training": training}
        Fake.seen["trainable"] = any(p.requires_grad for p in self.model.parameters())
        return x, torch.where(torch.arange(len(y), device=y.device) % 2 == 0, y, y + 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    module = ModuleType("pyautoattack")
    module.AutoAttack = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyautoattack", module)
    return Fake.seen


def test_logits_of_a_wrong_shape_are_refused(fake: dict[str, Any]) -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1), torch.nn.Flatten(0))
    with pytest.raises(TypeError, match=r"model must return logits \[1, classes\], got shape \[1\]"):
        autoattack(flat, splits().test, EPS, 20)


def test_what_the_package_is_told_and_what_it_may_not_change(fake: dict[str, Any]) -> None:
    run = trained()
    run.model.train()
    random, before = torch.get_rng_state(), weights(run.model)
    lines: list[str] = []
    found = autoattack(run.model, splits().test, EPS, 20, batch_size=7, seed=3, say=lines.append)
    assert (found.accuracy, found.images, found.version) == (0.5, 20, "standard")
    seen = Fake.seen
    assert seen["how"] == {"version": "standard", "eps": EPS, "norm": "Linf", "seed": 3, "device": torch.device("cpu")}
    assert seen["attack"].fab.n_target_classes == seen["attack"].apgd_targeted.n_target_classes == 3  # of 4 classes
    assert seen["batch_size"] == 7 and len(seen["x"]) == 20 and not seen["training"] and not seen["trainable"]
    assert torch.equal(torch.get_rng_state(), random) and same(weights(run.model), before) and run.model.training
    assert all(p.requires_grad for p in run.model.parameters())
    assert "20 images at eps 25.5/255" in lines[0]
    autoattack(run.model, splits().test, EPS, 20, version="apgd")
    assert (Fake.seen["how"]["version"], Fake.seen["how"]["attacks"]) == ("custom", ["apgd-ce", "apgd-t"])


@pytest.mark.parametrize(("norm", "name", "text"), [("l2", "L2", "51/255 (l2)"), ("l1", "L1", "0.2 (l1)")])
def test_the_norm_is_passed_on_with_what_the_package_does_in_it(
    norm: Any, name: str, text: str, fake: dict[str, Any]
) -> None:
    lines: list[str] = []
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20))
    autoattack(wide, splits().test, 0.2, 20, norm=norm, version="apgd", say=lines.append)
    attack = Fake.seen["attack"]
    assert Fake.seen["how"]["norm"] == name and f"at eps {text}" in lines[0]
    assert vars(attack.apgd) == ({"use_largereps": True} if norm == "l1" else {})
    assert attack.apgd_targeted.n_target_classes == (5 if norm == "l1" else 9) and attack.fab.n_target_classes == 9


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.8), ("l1", 5.0)])
def test_the_package_is_stronger_than_pgd_in_every_norm(norm: Any, eps: float) -> None:
    pytest.importorskip("pyautoattack")
    run = trained()
    found = autoattack(run.model, splits().test, eps, 4, norm=norm, version="apgd")
    ours = evaluate(run.model, splits().test, eps, norm=norm, size=4)
    assert found.accuracy <= ours.pgd + 1e-9 and ours.pgd < ours.clean


def test_what_says_nothing_is_right_for_no_label(fake: dict[str, Any]) -> None:
    model = trained().model
    model.register_forward_hook(lambda module, args, z: z * float("nan"))
    assert autoattack(model, splits().test, EPS, 20).accuracy == 0


@pytest.mark.parametrize(
    "classes, version, attacks, instead",
    [
        (2, "apgd", ["apgd-ce"], "without apgd-t"),
        (2, "standard", ["apgd-ce", "fab-t", "square"], "without apgd-t"),
        (3, "apgd", ["apgd-ce", "apgd-dlr"], "apgd-dlr for apgd-t"),
        (3, "standard", ["apgd-ce", "apgd-dlr", "fab-t", "square"], "apgd-dlr for apgd-t"),
    ],
)
def test_few_classes(fake: dict[str, Any], classes: int, version: Any, attacks: list[str], instead: str) -> None:
    """The DLR loss takes three classes, targeted four."""
    model, test = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)), splits().test
    with pytest.warns(UserWarning, match=f"on {classes} classes runs {instead}: the DLR loss takes three"):
        found = autoattack(model, test, EPS, 12, version=version)
    assert (Fake.seen["how"]["version"], Fake.seen["how"]["attacks"]) == ("custom", attacks)
    assert found.instead == instead and Fake.seen["attack"].fab.n_target_classes == classes - 1
    attacked = Result(Evaluation(0.5, 0.25, 0.125, 100, EPS, 20, EPS, 1, 1.0, "cpu"), autoattack=found)
    assert f"{'AA' if version == 'standard' else 'APGD'}, {instead} (12 images)" in table({"adv": attacked})
    with pytest.raises(ValueError, match="has 1 class, so there is no other to reach"):
        autoattack(torch.nn.Sequential(model, torch.nn.Linear(classes, 1)), test, EPS, 4)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.filterwarnings("ignore:AutoAttack on")
def test_the_package_itself_attacks_few_classes(classes: int) -> None:
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    test = splits().test
    few = Images(test.images, test.labels % classes)
    assert autoattack(model, few, 0.9, 8).accuracy == 0


def test_the_package_does_not_call_the_models_own_train(fake: dict[str, Any]) -> None:
    class Merging(torch.nn.Linear):
        def train(self, mode: bool = True) -> Any:
            pytest.fail("train() was called")

    inner = InRows(torch.nn.Sequential(Merging(4, 2)))
    assert not inner.eval().training and inner.model.training


def test_the_package_gets_contiguous_gradients_of_a_channels_last_network() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    (as_it_comes,) = torch.autograd.grad(model(x).sum(), x)
    (grad,) = torch.autograd.grad(InRows(model)(x).sum(), x)
    assert grad.is_contiguous() and not as_it_comes.is_contiguous() and torch.equal(grad, as_it_comes)


def test_the_column() -> None:
    evaluation = Evaluation(0.5, 0.25, 0.125, 100, EPS, 20, EPS, 1, 1.0, "cpu")
    attacked = Result(evaluation, autoattack=AutoAttacked(0.1, 2000, "standard", 3.0))
    lines = table({"adv": attacked, "other": Result(evaluation)}).splitlines()
    assert lines[0].endswith("PGD-20  AA (2,000 images)") and lines[2].endswith("10.0 %")
    attacked = Result(evaluation, autoattack=AutoAttacked(0.1, 20, "apgd", 3.0))
    assert table({"adv": attacked}).splitlines()[0].endswith("APGD (20 images)")


def test_train_and_evaluate_show_it(fake: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    quick = "--epochs 1 --train-size 64 --width 2 --eval-size 50 --probe-size 0 --method standard --beside none"
    assert cli.main(["train", *quick.split(), "--out-dir", str(tmp_path), "--autoattack", "10"]) == 0
    assert "AA (10 images)" in capsys.readouterr().out
    written = json.loads((tmp_path / "standard" / "results.json").read_text())["methods"]["standard"]
    assert written["autoattack"]["accuracy"] == 0.5 and written["autoattack"]["images"] == 10
    asked = ["--autoattack", "6", "--autoattack-version", "apgd", "--size", "20", "--json", str(tmp_path / "e.json")]
    assert cli.main(["evaluate", str(tmp_path / "standard"), *asked]) == 0
    assert "APGD (6 images)" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["autoattack"]["version"] == "apgd"


def test_a_missing_package_is_named_before_anything_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match="pip install --no-deps pyautoattack"):
        compare(TrainConfig(**TINY | {"autoattack": 5, "out_dir": str(tmp_path / "run")}), splits=splits())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["apgd", "standard"])
def test_autoattack_itself_is_stronger_than_pgd(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack")
    run, random = trained(), torch.get_rng_state()
    eps, size = 0.25, 12
    if version == "standard":  # Square's 5000 queries are all that takes time, and none where APGD has fooled all
        eps = 0.9
    found = autoattack(run.model, splits().test, eps, size, version=version)
    pgd = evaluate(run.model, splits().test, eps, size=size)
    assert found.accuracy <= pgd.pgd + 1e-9 and found.images == size
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in run.model.parameters())
    clean = autoattack(run.model, splits().test, 1e-6, 4, version="apgd").accuracy
    assert clean == evaluate(run.model, splits().test, 1e-6, size=4).clean
