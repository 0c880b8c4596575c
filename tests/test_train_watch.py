"""The rules that see a collapse, replayed on the numbers of recorded runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from atlas_train import watch

HISTORIES = Path(__file__).parent / "histories"
ROBUST = {"adv": 0.5, "probe": 0.5, "val_pgd": 0.45, "val_clean": 0.8}


def recorded(name: str) -> list[dict[str, Any]]:
    with (HISTORIES / name).open() as file:
        return [{k: float(v) for k, v in row.items()} | {"epoch": int(row["epoch"])} for row in csv.DictReader(file)]


def test_the_collapse_of_a_recorded_run_is_seen_as_it_begins() -> None:
    ((epoch, sign),) = watch.collapses(recorded("atlas-collapses.csv"))
    assert epoch == 29 and sign.endswith("is 41 %, but 63 % under the method's own attack")


def test_a_recorded_run_that_stays_robust_gives_no_alarm() -> None:
    history = recorded("atlas-stays-robust.csv")
    assert len(history) == 12 and not list(watch.collapses(history))
    assert not list(watch.collapses(recorded("atlas-collapses.csv")[:28]))


@pytest.mark.parametrize(
    ("row", "sign"),
    [
        ({}, None),
        ({"adv": 0.56, "probe": 0.41}, None),  # validation says that all is well
        ({"adv": 0.56, "probe": 0.41, "val_pgd": 0.4}, "but 56 % under the method's own attack"),
        ({"adv": 0.56, "probe": 0.41, "val_pgd": None}, "but 56 % under the method's own attack"),
        ({"adv": 0.54, "probe": 0.41, "val_pgd": 0.4}, None),
        ({"adv": 0.56, "probe": 0.43, "val_pgd": 0.4}, None),
        ({"val_pgd": 0.2}, "PGD-10 accuracy on the validation images fell from 45 % to 20 %"),
        ({"val_clean": 0.1}, "clean accuracy on the validation images fell from 80 % to 10 %"),
        ({"probe": 0.1}, "PGD-5 accuracy on the same training images fell from 50 % to 10 %"),
        ({"segment": 0.01}, "right at one-step adversaries and wrong a quarter of the way to them"),
        ({"segment": -0.01}, None),
        ({"adv": 0.95, "probe": 0.41, "eps": 0.01}, None),  # eps still grows
    ],
)
def test_the_signs_of_a_collapse(row: dict[str, Any], sign: str | None) -> None:
    found = watch.collapse(ROBUST | row, [ROBUST] * 2)
    assert found is None if sign is None else found is not None and sign in found


def test_a_leap_after_the_first_epoch_says_nothing() -> None:
    leap = ROBUST | {"adv": 0.7, "probe": 0.4, "val_pgd": 0.4}
    assert watch.collapse(leap, [ROBUST]) is None and watch.collapse(leap, [ROBUST] * 2)


def test_a_collapse_is_told_once_and_a_second_one_again() -> None:
    low = ROBUST | {"probe": 0.05, "adv": 0.1}
    history = [{**row, "epoch": n} for n, row in enumerate([ROBUST, low, low, ROBUST, ROBUST, low], 1)]
    assert [epoch for epoch, _ in watch.collapses(history)] == [2, 6]
