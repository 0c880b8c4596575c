"""AutoAttack's column: what is passed on, what goes on after a stop, and how it is shown."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_kernels.attacks import AutoAttackRecord, AutoAttackResult
from atlas_train import autoattack as module
from atlas_train import cli, engine
from atlas_train.autoattack import AutoAttacked, autoattack, verdicts
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
    """Stands in for AutoAttack: fools every second image."""

    seen: list[dict[str, Any]] = []
    stop = False
    parts = {"clean": 1.0, "apgd-ce": 0.8, "square": 0.5}

    def __init__(self, eps: float, **how: Any) -> None:
        self.how = {"eps": eps, **how}

    def searches(self, classes: int) -> tuple[dict[str, str], tuple[str, ...]]:
        return dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), f"of {self.how}"), ()

    def run(self, model: Any, x: Tensor, y: Tensor, **how: Any) -> AutoAttackResult:
        Fake.seen.append({**self.how, **how, "x": x})
        if how.get("state_path"):
            Path(how["state_path"]).write_text("half")
        if Fake.stop:
            raise KeyboardInterrupt
        warnings.warn("the gradient of 3 images is 0", stacklevel=2)
        warnings.warn("something else", stacklevel=2)
        correct = torch.arange(len(y)) % 2 == 0
        record = AutoAttackRecord(
            version=self.how["version"], norm=self.how["norm"], eps=self.how["eps"], seed=0, samples=len(y),
            search_precision="fp32", batch_size=5, parts={"apgd-ce": "", "square": ""}, accuracy=Fake.parts, instead=(),
            notes=("the gradient of 3 images is 0",), largest_norm=0.05, nan_adversaries=0, least=0.0, most=1.0,
            nan_logits=2, unconfirmed=0, forwards={}, backwards={}, seconds=3.0,
        )  # fmt: skip
        return AutoAttackResult(correct, correct.long(), x, record)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    Fake.seen, Fake.stop = [], False
    monkeypatch.setattr(module, "AutoAttack", Fake)
    return Fake.seen


@pytest.mark.filterwarnings("ignore")
def test_what_the_attack_is_told(fake: list[dict[str, Any]], tmp_path: Path) -> None:
    run, lines = trained(), []  # type: tuple[Run, list[str]]
    how: dict[str, Any] = {"norm": "l2", "batch_size": 7, "seed": 3, "say": lines.append, "state": tmp_path / "s"}
    found = autoattack(run.model, splits().test, EPS, 20, version="plus", search_precision="bf16", **how)
    assert (found.accuracy, found.images, found.version, found.seed, found.instead) == (0.5, 20, "plus", 3, None)
    (seen,) = Fake.seen
    assert (seen["eps"], seen["norm"], seen["version"], seen["seed"], seen["batch_size"]) == (EPS, "l2", "plus", 3, 7)
    assert (seen["search_precision"], seen["state_path"]) == ("bf16", tmp_path / "s")
    assert seen["ids"].tolist() == list(range(20)) and seen["x"].dtype == torch.float32 and seen["x"].max() <= 1
    assert lines == ["AutoAttack (plus) on 20 images at eps 0.1 (l2)"]
    right, instead = verdicts(run.model, splits().test, EPS)
    assert right.sum() == 20 and instead is None and Fake.seen[1]["version"] == "standard"


def test_a_report_has_its_parts_and_a_state_for_each(fake: list[dict[str, Any]], tmp_path: Path) -> None:
    run, state = trained(), tmp_path / "s"
    with pytest.warns(UserWarning, match="something else") as told:
        report = evaluate(
            run.model, splits().test, (EPS, 0.2), attacks=("apgd", "square", "autoattack"), state=state, seed=3
        )
    assert not [w for w in told if "gradient of 3 images" in str(w.message)], "a note of the record, and no warning"
    assert [seen["version"] for seen in fake] == 2 * ["apgd", "custom", "standard"]
    assert [seen["eps"] for seen in fake] == 3 * [EPS] + 3 * [0.2] and fake[1]["parts"].keys() == {"square"}
    paths = [Path(seen["state_path"]).name for seen in fake]
    assert len(set(paths)) == 6 and paths[:2] == ["s.apgd-0.1", "s.square-0.1"]
    outcome = report.outcome("autoattack")
    assert (outcome.accuracy, outcome.nan, outcome.distance, outcome.parts) == (0.5, 2, 0.05, Fake.parts)
    assert "black box stronger than white box" in {s.sign for s in report.signs if s.attack == "autoattack"}
    written = report.to_dict()
    assert written["autoattack_acc"] == "50.00" and "upper bounds" not in report.table()
    whole = written["evaluation"]["attacks"][3]
    assert whole["notes"] == ("the gradient of 3 images is 0",)
    assert whole["after_each_part"] == Fake.parts and json.dumps(written)
    evaluate(run.model, splits().test, EPS, attacks="autoattack", state=state, autoattack_version="rand")
    assert fake[-1]["state_path"] == state and fake[-1]["version"] == "rand"


def test_it_is_as_strong_as_pgd_in_every_norm() -> None:
    run, random, before = trained(), torch.get_rng_state(), None
    before = weights(run.model)
    for norm, eps in (("linf", 0.25), ("l2", 0.8), ("l1", 5.0)):
        found = autoattack(run.model, splits().test, eps, 8, norm=norm, version="apgd")  # type: ignore[arg-type]
        ours = evaluate(run.model, splits().test, eps, norm=norm, size=8)
        assert found.accuracy <= ours.pgd + 1e-9 and ours.pgd < ours.clean, norm
    assert torch.equal(torch.get_rng_state(), random) and same(weights(run.model), before)
    clean = autoattack(run.model, splits().test, 1e-6, 4, version="apgd").accuracy
    assert clean == evaluate(run.model, splits().test, 1e-6, size=4).clean


def test_logits_of_a_wrong_shape_are_refused() -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1), torch.nn.Flatten(0))
    with pytest.raises(TypeError, match=r"model must return logits \[20, classes\], got shape \[20\]"):
        autoattack(flat, splits().test, EPS, 20)


def test_what_says_nothing_is_right_for_no_label() -> None:
    model = trained().model
    model.register_forward_hook(lambda module, args, z: z * math.nan)
    assert autoattack(model, splits().test, EPS, 20).accuracy == 0
    report = evaluate(model, splits().test, EPS, attacks="autoattack")
    assert report.accuracy("autoattack") == 0 and report.outcome("autoattack").nan == 40


@pytest.mark.parametrize("classes, missing", [(2, "apgd-t"), (3, "apgd-t")])
def test_few_classes(classes: int, missing: str) -> None:
    """The DLR loss takes three classes, targeted four."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    test = splits().test
    few = Images(test.images, test.labels % classes)
    with pytest.warns(UserWarning, match=f"no {missing}"):
        found = autoattack(model, few, 0.9, 8, version="apgd")
    assert found.accuracy == 0 and found.instead and missing in found.instead
    attacked = Result(Evaluation(0.5, 0.25, 0.125, 100, EPS, 20, EPS, 1, 1.0, "cpu"), autoattack=found)
    assert f"APGD, {found.instead} (8 images)" in table({"adv": attacked})
    with pytest.raises(ValueError, match="1 class, so there is no other to reach"):
        autoattack(torch.nn.Sequential(model, torch.nn.Linear(classes, 1)), test, EPS, 4)


def test_a_network_without_gradients_is_left_to_square() -> None:
    inner = trained().model

    class Detached(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return inner(x)

    report = evaluate(Detached(), splits().test, 0.9, attacks=("fgsm", "pgd-2", "apgd"), size=8)
    assert [o.attack.name for o in report.outcomes] == ["clean", "square"]
    assert "no gradient" in {sign.sign for sign in report.signs} and "Square" in report.table()
    assert report.accuracy("square") < report.clean


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    run, state = trained(), tmp_path / "s"
    report = evaluate(run.model, splits().test, 0.9, attacks="apgd", state=state, size=8)
    again = evaluate(run.model, splits().test, 0.9, attacks="apgd", state=state, size=8)
    assert torch.equal(report.outcome("apgd").right, again.outcome("apgd").right)
    with pytest.raises(ValueError, match="is of another evaluation: it is of 8 images, here are 9. Name another file"):
        evaluate(run.model, splits().test, 0.9, attacks="apgd", state=state, size=9)
    with torch.no_grad():
        next(run.model.parameters()).mul_(2)
    with pytest.raises(ValueError, match=f"{state} is of another evaluation: its weights are not the ones given"):
        evaluate(run.model, splits().test, 0.9, attacks="apgd", state=state, size=8)


def test_the_column() -> None:
    evaluation = Evaluation(0.5, 0.25, 0.125, 100, EPS, 20, EPS, 1, 1.0, "cpu")
    attacked = Result(evaluation, autoattack=AutoAttacked(0.1, 2000, "standard", 3.0))
    lines = table({"adv": attacked, "other": Result(evaluation)}).splitlines()
    assert lines[0].endswith("PGD-20  AA (2,000 images)") and lines[2].endswith("10.0 %")
    for version, header in (("apgd", "APGD"), ("plus", "AA plus"), ("rand", "AA rand")):
        attacked = Result(evaluation, autoattack=AutoAttacked(0.1, 20, version, 3.0))
        assert table({"adv": attacked}).splitlines()[0].endswith(f"PGD-20  {header} (20 images)")


@pytest.mark.filterwarnings("ignore")
def test_train_and_evaluate_show_it(
    fake: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("sklearn")
    quick = "--epochs 1 --train-size 64 --width 2 --eval-size 50 --probe-size 0 --method standard --beside none"
    assert cli.main(["train", *quick.split(), "--out-dir", str(tmp_path), "--autoattack", "10"]) == 0
    assert "AA (10 images)" in capsys.readouterr().out
    written = json.loads((tmp_path / "standard" / "results.json").read_text())["methods"]["standard"]
    assert written["autoattack"]["accuracy"] == 0.5 and written["autoattack"]["images"] == 10
    asked = ["--autoattack", "6", "--autoattack-version", "apgd", "--size", "20", "--json", str(tmp_path / "e.json")]
    state = str(tmp_path / "s")
    assert cli.main(["evaluate", str(tmp_path / "standard"), *asked, "--state", state]) == 0
    assert "APGD (6 images)" in capsys.readouterr().out and fake[-1]["state_path"] == state
    assert json.loads((tmp_path / "e.json").read_text())["autoattack"]["version"] == "apgd"
    named = ["--attacks", "autoattack", "--size", "6", "--search-precision", "bf16", "--state", state]
    assert cli.main(["evaluate", str(tmp_path / "standard"), *named]) == 0
    assert "AutoAttack" in capsys.readouterr().out and fake[-1]["search_precision"] == "bf16"


@pytest.mark.filterwarnings("ignore")
def test_a_comparison_that_was_stopped_goes_on_in_the_attack(fake: list[dict[str, Any]], tmp_path: Path) -> None:
    settings: dict[str, Any] = TINY | {"method": "standard", "epochs": 1, "autoattack": 5, "eval_size": 8}
    folder = tmp_path / "run"
    Fake.stop = True
    with pytest.raises(KeyboardInterrupt):
        compare(TrainConfig(**settings, out_dir=str(folder)), splits=splits(), show="silent", say=str)
    assert Path(fake[0]["state_path"]).read_text() == "half"
    Fake.stop = False
    resumed = TrainConfig(**settings, resume=str(folder / "standard"))
    compare(resumed, splits=splits(), show="silent", say=str)
    assert fake[0]["state_path"] == fake[1]["state_path"]
    assert not list((folder / "standard").glob("*.state")), "of what is done nothing has to go on"
