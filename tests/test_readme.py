"""The code of README and docs/operators.md runs as printed, and the example learns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from atlas_train.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


EXAMPLE, OWN_DATA = snippets("README.md")
EXECUTION, DROP_INS = snippets("docs/operators.md")


def test_drop_ins_are_there():
    names: dict[str, object] = {}
    exec(compile(DROP_INS, "README.md", "exec"), names)
    assert {"trades_loss", "attack_pgd", "torchattacks"} <= set(names)


def test_own_data_are_trained_on_resumed_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8), torch.arange(16) % 4
    names = {"x_train": images, "y_train": labels, "x_test": images.numpy(), "y_test": labels.int().numpy()}
    exec(compile(OWN_DATA, "README.md", "exec"), names)
    assert names["results"]["atlas"].evaluation.images == 16
    assert load("runs/shapes")["epoch"] == 2


def test_example_trains_a_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    y = torch.arange(64) % 2
    x = 0.4 * torch.rand(64, 3, 4, 4) + 0.6 * y.view(-1, 1, 1, 1)
    names = {
        "model": model,
        "loader": [(x, y)] * 60,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
    }
    exec(compile(EXAMPLE, "README.md", "exec"), names)
    assert (model(x).argmax(1) == y).float().mean() > 0.95
    assert names["images"].shape == (3 * 64, 3, 4, 4)
    exec(compile(EXECUTION, "README.md", "exec"), names)
    assert (names["x_adv"] - x).abs().max() > 0.5 * 8 / 255
