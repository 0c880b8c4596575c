"""Nothing that a run writes says where on whose machine it was: folders, the host, the user."""

from __future__ import annotations

import re
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas_train import checkpoint, cli, engine, stored
from atlas_train.config import TrainConfig
from atlas_train.report import TensorBoard
from tiny_runs import TINY, splits

SECRET = "home-of-somebody"
NETWORK = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))
"""
DATA = """
from dataclasses import replace
from tiny_runs import splits

def load(data_dir):
    return splits()
"""


def told_by(folder: Path, *words: str) -> list[str]:
    """The files in whose name or bytes one of the words is, and the word."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    return [
        f"{path.relative_to(folder)}: {word}"
        for path in files
        for word in words
        if word in str(path.relative_to(folder)) or word.encode() in path.read_bytes()
    ]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code, data and weights, of a user on a machine, both of whom have names."""
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "somebody")
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-somebody")
    home = tmp_path / SECRET
    home.mkdir()
    monkeypatch.setenv("ATLAS_DATA", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "net.py").write_text(NETWORK)
    (home / "data.py").write_text(DATA)
    (home / "settings.json").write_text(f'{{"data_dir": "{home}", "epochs": 1}}')
    images, labels = splits().train.images[:8], splits().train.labels[:8]
    np.savez(home / "more.npz", image=images.permute(0, 2, 3, 1).numpy(), label=labels.numpy())
    return home


def test_files_name_no_folder_no_host_and_no_user(home: Path, tmp_path: Path) -> None:
    out, code = tmp_path / "out", ["--dataset", f"{home}/data.py:load", f"--data-dir={home}"]
    code.append(f"--model={home}/net.py:make")
    given = ["--method=standard", "--beside=one_step_adv", "--batch-size=16", "--optimizer=adam", "--lr=0.01"]
    given += ["--weight-decay=0", "--cyclic-peak=0.4", "--device=cpu", "--threads=1", "--val-size=8", "--averaging=swa"]
    given += ["--config", str(home / "settings.json"), "--extra-data", str(home / "more.npz")]
    given += ["--tensorboard"] if find_spec("tensorboard") else []
    assert cli.main(["train", *given, *code, "--out-dir", str(home / "first")]) == 0
    init = ["--init", str(home / "first" / "standard")]
    assert cli.main(["train", *given, *code, "--out-dir", str(home / "out"), *init]) == 0
    shutil.move(home / "out", out)
    again = ["--resume", str(out), "--epochs", "2", "--extra-data", str(home / "more.npz")]
    assert cli.main(["train", *again, *code]) == 0
    assert cli.main(["evaluate", str(out / "standard"), *code, "--json", str(out / "evaluated.json")]) == 0
    assert told_by(out, SECRET, str(tmp_path), "somebody") == []
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert kinds >= {".pt", ".json", ".md", ".csv", Path(checkpoint.export_name()).suffix}
    state = checkpoint.load(out / "standard")
    assert state["arch"]["name"] == "net.py:make" and state["data"]["loader"] == "data.py:load", "what it was, they say"


def test_a_run_of_a_version_that_kept_folders_passes_none_on(home: Path, tmp_path: Path) -> None:
    engine.train(TrainConfig("standard", **TINY | {"epochs": 1}), splits=splits(), folder=tmp_path / "old")
    state = checkpoint.load(tmp_path / "old")
    state["config"] |= {"data_dir": str(home), "out_dir": str(home), "resume": str(home)}
    torch.save(state, tmp_path / "old" / "last.pt")
    assert told_by(tmp_path / "old", SECRET) == [f"last.pt: {SECRET}"]
    stored.resume(tmp_path / "old", splits=splits(), epochs=2)
    assert told_by(tmp_path / "old", SECRET) == []


def test_events_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for step in (1, 2):
        board = TensorBoard(tmp_path)
        board.write({"epoch": step, "step": step, "loss": 0.5, "probe": None})
        board.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all(re.fullmatch(r"events\.out\.tfevents\.\d{10}\.\d{6}", name) for name in names)
