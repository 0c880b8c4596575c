"""`atlas export` and `atlas push`: a network as a folder for others, here and on a Hub; a download runs no code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import atlas_train
from atlas_train import checkpoint, cli, hub
from atlas_train.compare import compare
from atlas_train.comparison import compared
from atlas_train.config import TrainConfig
from atlas_train.sharing import export, load_model, push
from atlas_train.stored import evaluate_checkpoint
from atlas_train.targets import evaluate_target
from tiny_runs import TINY, same, splits, weights

pytest.importorskip("tyro")
pytest.importorskip("safetensors")
CODE = """
from pathlib import Path
from atlas_train import models
Path(__file__).with_name("ran").touch()
def net(num_classes, in_channels, width=4):
    return models.build("digits_net", num_classes=num_classes, in_channels=in_channels, width=width)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    settings = TINY | {"epochs": 2, "train_size": 32, "out_dir": str(root / "run")}
    compare(TrainConfig(**settings), splits=splits(), show="silent", say=lambda text: None, command=("atlas", "train"))
    return root / "run" / "atlas"


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of the Hub, behind the functions of huggingface_hub that are called."""
    root, module = tmp_path / "hub", ModuleType("huggingface_hub")

    def copied(source: Path, target: Path, patterns: list[str]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for path in {path for pattern in patterns for path in source.glob(pattern)}:
            shutil.copy(path, target)

    class HfApi:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub.invalid/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str):
            copied(Path(folder_path), root / repo_id, allow_patterns)

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (root / repo_id).is_dir():
            raise RuntimeError(f"404: {repo_id}")
        target = tmp_path / "cache" / repo_id.replace("/", "--") / (revision or "main")
        copied(root / repo_id, target, allow_patterns)
        return str(target)

    module.HfApi, module.snapshot_download = HfApi, snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return root


def test_an_exported_folder_is_read_as_the_run_is(run: Path) -> None:
    folder = export(run, "mine")
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "evaluation.json",
        "README.md",
    }
    network, config = load_model(folder)
    assert same(weights(network), weights(checkpoint.load_model(run)[0])) and config["method"] == "atlas"
    assert atlas_train.load_model is load_model
    how: dict[str, Any] = {"splits": splits(), "size": 20, "say": lambda text: None, "steps": 2}
    found, own = evaluate_checkpoint(folder, **how)["atlas"], evaluate_checkpoint(run, **how)["atlas"]
    assert (found.evaluation.clean, found.evaluation.pgd) == (own.evaluation.clean, own.evaluation.pgd)
    (line,) = compared([folder]).lines
    stored = json.loads((run / "evaluation.json").read_text())
    assert line.accuracies["PGD-20", 40] == stored["pgd"]
    values = json.loads((folder / "config.json").read_text())
    assert values["kind"] == "atlas-kernels network" and values["config"]["eps"] == 0.1
    assert values["weights_sha256"] == checkpoint.fingerprint(network)
    assert str(run.resolve()) not in json.dumps(values)


def test_the_card_has_the_figures_and_where_they_are_from(run: Path) -> None:
    stored = json.loads((run / "evaluation.json").read_text())
    how: dict[str, Any] = {"size": 12, "splits": splits(), "eps": (0.05,), "say": lambda text: None}
    found, _ = evaluate_target(str(run), ("pgd-2",), **how)
    (run / "more.json").write_text(json.dumps(found.to_dict()))
    text = (export(run) / "README.md").read_text()
    assert f"| PGD-20 | 0.1 (l_inf) | 40 | {100 * stored['pgd']:.1f} % | evaluation.json |" in text
    assert f"| PGD-2 | 0.05 (l_inf) | 12 | {100 * found.accuracy('pgd-2'):.1f} % | more.json |" in text
    for told in (
        "bars",
        "| threat model | 0.1 (l_inf) |",
        "`atlas train`",
        "local_weight 1",
        "AutoAttack (standard)",
    ):
        assert told in text
    assert text.startswith("---\nlibrary_name: atlas-kernels\n") and "# license: not stated yet" in text
    assert "Not stated yet: whoever publishes this network states it" in text


def test_the_best_epoch_is_exported_with_its_own_figures(run: Path) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    for value in state["model"].values():
        if value.is_floating_point():
            value.mul_(0.5)
    state |= {"epoch": 1, "step": state["step"] // 2, "history": state["history"][:1], "best": 1}
    checkpoint.save(run / "best.pt", state)
    values = json.loads((run / "evaluation.json").read_text())
    best = {key: values[key] for key in values if key not in ("of", "training_seconds")} | {"clean": 0.125, "epoch": 1}
    (run / "evaluation.json").write_text(json.dumps(values | {"best": best}))
    folder = export(run / "best.pt")
    assert folder == run / "export-best" and "| none | 0 | 40 | 12.5 % |" in (folder / "README.md").read_text()
    assert same(weights(load_model(folder)[0]), weights(checkpoint.load_model(run / "best.pt")[0]))
    assert [record.path for record in compared(["."]).records.values()] == [run]  # the export is not a run beside it


def test_what_is_of_other_weights_is_not_in_the_card(run: Path) -> None:
    """Figures of epoch 2 say nothing of a checkpoint of epoch 1."""
    values = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(values | {"epoch": 1}))
    text = (export(run) / "README.md").read_text()
    assert "None: these weights were not evaluated" in text and "PGD-20" not in text


def test_a_folder_is_written_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("full").mkdir()
    Path("full/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="full is there already: choose another folder"):
        export(run, "full")
    monkeypatch.setattr("atlas_train.sharing.card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, "new")
    assert sorted(path.name for path in Path().iterdir()) == ["full", "run"]


def test_export_says_what_is_next(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "run", "--out", "mine"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "state the licence in mine/README.md" in last and "atlas push mine ORG/NAME" in last
    assert cli.main(["export", "nowhere"]) == 2 and "no checkpoint nowhere" in capsys.readouterr().err


def test_no_run_goes_on_from_an_exported_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, "mine")
    assert cli.main(["train", "--resume", "mine"]) == 2
    assert "mine/model.safetensors holds weights alone, and no run goes on from them" in capsys.readouterr().err


def test_a_network_goes_to_the_hub_and_back(
    run: Path, endpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(run, "mine")
    (folder / "private.txt").write_text("not for others")
    (folder / "own.py").write_text(CODE)
    assert cli.main(["push", "mine", "org/name"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "states no licence" in out[0] and out[-1].endswith("atlas evaluate hf:org/name")
    names = {path.name for path in (endpoint / "org/name").iterdir()}
    assert names == {"model.safetensors", "config.json", "evaluation.json", "README.md"}
    assert same(weights(load_model("hf:org/name")[0]), weights(load_model(folder)[0]))
    monkeypatch.setattr("atlas_train.data.load", lambda *args: splits())
    quick = ("--size", "20", "--steps", "2", "--dataset", "digits", "--other-data", "--device", "cpu")
    assert cli.main(["evaluate", "hf:org/name", *quick]) == 0
    assert "20 test images" in capsys.readouterr().out
    asked = ("--attacks", "pgd-2", "--json", "e.json")
    assert cli.main(["evaluate", "hf:org/name@v1", *quick[:2], *quick[4:], *asked]) == 0
    assert json.loads(Path("e.json").read_text())["evaluation"]["target"] == "hf:org/name@v1"
    card = (folder / "README.md").read_text().replace("# license: not stated yet", "license: mit #")
    (folder / "README.md").write_text(card)
    assert cli.main(["push", "mine", "org/name", "--code"]) == 0 and "no licence" not in capsys.readouterr().out
    assert (endpoint / "org/name/own.py").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_download_runs_only_where_it_is_trusted(
    trust: bool, run: Path, endpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is code that lies here run because a file names it."""
    state = torch.load(run / "last.pt", weights_only=True)
    state["arch"] |= {"name": "own.py:net"}
    checkpoint.save(run / "last.pt", state)
    (run / "evaluation.json").unlink()
    folder = export(run, "mine")
    (folder / "own.py").write_text(CODE)
    push(folder, "org/name", code=True)
    Path("own.py").write_text(CODE)
    cache = Path("cache/org--name/main")
    if trust:
        network, _ = load_model("hf:org/name", trust=True)
        assert same(weights(network), weights(load_model(folder, trust=True)[0])) and (cache / "ran").exists()
    else:
        with pytest.raises(
            ValueError, match="names code of your own, own.py:net, and code that a file names is not run"
        ):
            load_model("hf:org/name")
        assert cli.main(["evaluate", "hf:org/name", "--attacks", "fgsm"]) == 2
        assert "--trust" in capsys.readouterr().err and not (cache / "own.py").exists()
    assert not Path("ran").exists()


def test_code_outside_of_a_trusted_folder_is_not_taken(run: Path) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    state["arch"] |= {"name": "../own.py:net"}
    checkpoint.save(run / "last.pt", state)
    Path("own.py").write_text(CODE)
    with pytest.raises(FileNotFoundError, match="holds no own.py"):
        load_model(run, trust=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("hf:org", ValueError, "is called org/name, got org"),
        ("hf:org/name/more", ValueError, "is called org/name"),
        ("hf:../name", ValueError, "is called org/name"),
        ("hf:org/nothing", OSError, "hf:org/nothing could not be downloaded: RuntimeError: 404"),
    ],
)
def test_a_name_that_leads_nowhere_is_said(name: str, error: type, message: str, endpoint: Path) -> None:
    with pytest.raises(error, match=message):
        load_model(name)


def test_without_huggingface_hub_the_remedy_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["evaluate", "hf:org/name"]) == 2 and "pip install huggingface_hub" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"run holds no config.json, README.md: make it with atlas export"):
        push(run, "org/name")
    assert hub.is_on_hub("hf:a/b") and not hub.is_on_hub("path/to.py:factory")
