"""How declared settings are written in text."""

from __future__ import annotations

import math

import pytest
import torch

from atlas_train.options import fraction, number, radius


@pytest.mark.parametrize(
    "value, text",
    [
        (8 / 255, "8/255"), (torch.tensor(8 / 255).item(), "8/255"), (128 / 255, "128/255"), (254 / 255, "254/255"),
        (0.3, "0.3"), (torch.tensor(0.3).item(), "0.3"), (51 / 255, "0.2"), (0.345, "0.345"), (0.031, "0.031"),
        (0.5, "0.5"), (1.0, "1"), (2.0, "2"), (12.0, "12"), (1536.0, "1536"), (math.sqrt(768) / 2, "13.8564"),
        (0.5 / 255, "0.5/255"), (0.25 / 255, "0.25/255"), (100 / 255, "100/255"), (0.0375, "0.0375"),
        (2.5 * 0.3 / 20, "0.0375"), (20 / 7 / 255, "0.0112045"), (0.0, "0"),
    ],
)  # fmt: skip
def test_a_radius_is_written_as_one_writes_it(value: float, text: str) -> None:
    assert fraction(value) == text and number(text) == pytest.approx(value, rel=1e-5)
    assert [radius(value, norm) for norm in ("linf", "l2", "l1")] == [f"{text} (l_inf)", f"{text} (l2)", f"{text} (l1)"]
