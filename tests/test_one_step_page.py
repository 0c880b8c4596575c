"""docs/one_step.md holds what is counted, what is published, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import one_step_page as page
from atlas_train import methods
from test_train_passes import PASSES


def table(text: str, name: str) -> dict[str, list[str]]:
    """The rows of a table of the page, by method."""
    inside = text.split(f"<!-- begin: {name} -->")[1].split("<!-- end -->")[0].strip()
    return {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in inside.splitlines()[2:]}


def test_the_page_is_as_its_methods_and_results_make_it() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert len(page.BLOCK.findall(text)) == text.count("<!-- begin") == text.count("<!-- end") == 4
    assert page.filled(text) == text, "run python benchmarks/one_step_page.py"


def test_passes_are_those_that_the_methods_are_to_make() -> None:
    passes = table(page.PAGE.read_text(encoding="utf-8"), "passes")
    assert len(passes) == len(page.rows()) >= 6
    for row in page.rows().values():
        if (expected := PASSES.get(row.method)) and not row.hyper:
            assert str(round(expected[1])) in passes[row.title][2].split(" or "), row.title
    assert passes["N-FGSM"] == ["`--method n_fgsm`", "6", "5"]


def test_published_figures_are_means_of_three_seeds_of_one_commit() -> None:
    text = (page.ROOT / "benchmarks" / "one_step_published.json").read_text(encoding="utf-8")
    assert "b99c0de60e57128254234f2d79719b74792a4037" in json.loads(text)["source"]
    for known in page.PUBLISHED.values():
        assert all(data["aa_lowest"] <= data["aa"] for data in known.values())
    assert set(page.PUBLISHED) <= set(page.ROWS)
    shown = table(page.PAGE.read_text(encoding="utf-8"), "accuracy")
    assert shown["PGD-10"] == ["82.36", "54.17", "50.49", "50.32", "-", "26.90", "19.77", "117.1"]


def test_results_of_seeds_are_shown_once_they_are_there(tmp_path: Path) -> None:
    figures = {"clean": {"mean": 0.8, "deviation": 0.001}, "autoattack": {"mean": 0.4777, "deviation": 0.0031}}
    last = {name: {"mean": 0.1, "deviation": None} for name in figures}
    (tmp_path / "fastat-n_fgsm.json").write_text(json.dumps({"methods": {"n_fgsm": last | {"best": figures}}}))
    (tmp_path / "fastat-fgsm_rs.json").write_text(json.dumps({"methods": {"one_step_adv": last}}))
    cells = {line[0]: line[5] for line in page.accuracy_table(tmp_path)}
    assert (cells["N-FGSM"], cells["FGSM-RS"], cells["PGD-10"]) == ("47.77 ± 0.31", "10.00", "-")


@pytest.mark.parametrize(
    ("collapses", "probe", "outcome"),
    [([], 0.2, "survives"), ([], 0.1, "collapses"), ([[3, "a sign"], [7, "a sign"]], 0.2, "collapses in epoch 3, 7")],
)
def test_a_run_survives_without_a_warning_and_where_its_own_attack_is_not_the_only_one(
    tmp_path: Path, collapses: list[object], probe: float, outcome: str
) -> None:
    found = {"clean": 0.4, "pgd": 0.2, "autoattack": {"accuracy": 0.19}, "collapses": collapses}
    (tmp_path / "collapse-n_fgsm.json").write_text(json.dumps({"methods": {"n_fgsm": found}}))
    (tmp_path / "collapse-n_fgsm.csv").write_text(f"epoch,adv,probe\n1,0.9,0.9\n2,0.3,{probe}\n")
    _, line = page.collapse_table(tmp_path)
    assert line == ["N-FGSM", "40.0", "20.0", "19.0", "30.0", f"{100 * probe:.1f}", outcome]


def test_what_is_kept_is_scaled_to_the_images_of_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keeping(methods.OneStepADV):
        def before_step(self, model, batch, key, state):  # type: ignore[no-untyped-def]
            state.memory.setdefault("store", torch.zeros(state.size, 3, 32, 32))
            state.memory.setdefault("one", torch.zeros(10, 4))
            state.memory.setdefault("number", torch.zeros(()))

    monkeypatch.setattr(methods, "build", lambda *how: Keeping(8 / 255))
    assert page.kept(page.ROWS["fgsm_rs"]) == 49_000 * 3 * 32 * 32 * 4 + 160 + 4
    assert [page.size(n) for n in (0, 12, 1200, 602_112_000, 1_204_224_000)] == [
        "-",
        "12 B",
        "1.2 kB",
        "602 MB",
        "1.2 GB",
    ]


def test_a_method_that_is_not_there_has_no_row() -> None:
    assert not page.Row("?", "no_such_method").is_there and not page.Row("?", "adv", {"no_such": 1}).is_there
    assert set(page.rows()) == {name for name, row in page.ROWS.items() if row.is_there}


def test_memory_of_a_step_is_measured_for_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "WIDTH", 1)
    monkeypatch.setattr(page, "BATCH", 2)
    monkeypatch.setattr(page, "ROWS", {name: page.ROWS[name] for name in ("fgsm_rs", "atlas")})
    page.measure_memory(tmp_path / page.MEMORY)
    made = json.loads((tmp_path / page.MEMORY).read_text())
    assert list(made["bytes"]) == ["standard", "fgsm_rs", "atlas"] and made["width"] == 1
    assert 0 < made["bytes"]["standard"] <= made["bytes"]["fgsm_rs"] < made["bytes"]["atlas"]
