"""The rules that see a collapse, replayed on the numbers of recorded runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels import PGD
from atlas_train import engine, watch
from atlas_train.config import TrainConfig
from atlas_train.data import DataSplits, Images
from tiny_runs import EPS, TINY, splits

HISTORIES = Path(__file__).parent / "histories"
ROBUST = {"adv": 0.5, "probe": 0.5, "val_pgd": 0.45, "val_clean": 0.8}


def recorded(name: str) -> list[dict[str, Any]]:
    with (HISTORIES / name).open() as file:
        return [{k: float(v) for k, v in row.items()} | {"epoch": int(row["epoch"])} for row in csv.DictReader(file)]


def test_the_collapse_of_a_recorded_run_is_seen_as_it_begins() -> None:
    ((epoch, sign),) = watch.collapses(recorded("atlas-collapses.csv"))
    assert epoch == 29 and sign.endswith("is 41 %, but 63 % under the method's own attack")


def test_a_recorded_run_that_hides_from_short_attacks_is_seen() -> None:
    """PGD-5 has 11 to 23 % in all of its epochs, and PGD-10 with steps of eps / 4 has 16 % at first, then 3 %."""
    history = recorded("atlas-hides.csv")
    hides = "the network hides from short attacks: on"
    seen = [
        (3, f"{hides} training images its accuracy is 13 % after 5 steps of PGD, 7 % after 10"),
        (6, f"{hides} validation images its accuracy is 16 % after 5 steps of PGD, 8 % after 10"),
    ]
    assert list(watch.collapses(history)) == seen
    of_validation = [{name: value for name, value in row.items() if name != "probe_10"} for row in history]
    assert list(watch.collapses(of_validation)) == seen[1:]
    assert not list(watch.collapses([{**row, "probe_10": None, "val_pgd_5": None} for row in history]))


def test_a_recorded_collapse_to_its_own_attack_is_named_so() -> None:
    signs = dict(watch.collapses(recorded("one-step-adv-collapses.csv")))
    assert signs[4] == (
        "the network learned its own attack: on training images its accuracy is 12 % after 5 steps of PGD, 4 % after "
        "10, but 25 % under the method's own attack"
    )


def test_where_five_steps_are_few_a_network_that_learns_does_not_hide() -> None:
    """On MNIST at eps 0.3; a third and more of what is right after five steps is lost to ten, in epochs 3 and 4."""
    history = recorded("mnist-few-steps.csv")
    assert [row["epoch"] for row in history if row["probe_10"] < (1 - watch.HIDDEN) * row["probe"]] == [3, 4]
    assert len(history) == 8 and not list(watch.collapses(history))
    hides = (
        "the network hides from short attacks: on training images its accuracy is 85 % after 5 steps of PGD, 5 % after"
    )
    assert list(watch.collapses(recorded("mnist-adv-2-hides.csv"))) == [(4, f"{hides} 10")]


@pytest.mark.parametrize(
    ("after_ten", "sign"),
    [([0.4, 0.31], False), ([0.31, 0.31], False), ([0.46, 0.31], False), ([0.48, 0.31], True), ([0.2, 0.24], True)],
)
def test_many_lost_are_no_sign_while_accuracy_holds(after_ten: list[float], sign: bool) -> None:
    """Of 50 % after five steps 31 % are left, a little less than two thirds, or 24 %, less than half."""
    before, now = ({**ROBUST, "val_pgd_5": 0.5, "val_pgd": value} for value in after_ten)
    assert (watch.collapse(now, [before]) is not None) == sign


def test_a_recorded_run_that_stays_robust_gives_no_alarm() -> None:
    history = recorded("atlas-stays-robust.csv")
    assert len(history) == 12 and not list(watch.collapses(history))
    assert not list(watch.collapses(recorded("atlas-collapses.csv")[:28]))
    assert not list(watch.collapses(recorded("adv-stays-robust.csv")))


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
        ({"val_pgd": 0.1}, "the network learned its own attack: PGD-10 accuracy on the validation images fell"),
        ({"val_pgd_5": 0.42, "val_pgd": 0.27}, "on validation images its accuracy is 42 % after 5 steps of PGD, 27 %"),
        ({"val_pgd_5": 0.4, "val_pgd": 0.28}, None),
        ({"probe": 0.12, "probe_10": 0.06, "adv": 0.2}, "network hides from short attacks: on training images its"),
        ({"probe": 0.1, "probe_10": 0.06, "adv": 0.1, "val_pgd": 0.4}, "fell from 50 % to 10 %"),  # few are lost
        ({"probe": 0.45, "probe_10": 0.2, "eps": 0.01}, None),
    ],
)
def test_the_signs_of_a_collapse(row: dict[str, Any], sign: str | None) -> None:
    found = watch.collapse(ROBUST | row, [ROBUST] * 2)
    assert found is None if sign is None else found is not None and sign in found


def test_a_fall_under_every_attack_names_no_collapse() -> None:
    assert watch.collapse(ROBUST | {"val_pgd": 0.1, "adv": 0.1, "probe": 0.4}, [ROBUST]) == (
        "PGD-10 accuracy on the validation images fell from 45 % to 10 %"
    )


def test_a_leap_after_the_first_epoch_says_nothing() -> None:
    leap = ROBUST | {"adv": 0.7, "probe": 0.4, "val_pgd": 0.4}
    assert watch.collapse(leap, [ROBUST]) is None and watch.collapse(leap, [ROBUST] * 2)


def test_a_collapse_is_told_once_and_a_second_one_again() -> None:
    low = ROBUST | {"probe": 0.05, "adv": 0.1}
    history = [{**row, "epoch": n} for n, row in enumerate([ROBUST, low, low, ROBUST, ROBUST, low], 1)]
    assert [epoch for epoch, _ in watch.collapses(history)] == [2, 6]


class Stairs(nn.Module):
    """Right while one of six pixels is dark: the darkest alone has a gradient, so a step of an attack lifts one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, x: Tensor) -> Tensor:
        light = (x.flatten(1).amin(1) - 0.5 - 0.3 * EPS) * self.scale
        return torch.stack([-light, light], 1)


@pytest.mark.parametrize(
    ("settings", "telling"),
    [
        ({"probe_size": 64, "val_size": 64}, ["val_pgd_5", "probe"]),
        ({"probe_size": 59, "val_size": 59}, []),
        ({"probe_size": 64, "norm": "l2"}, ["probe"]),
        ({"probe_size": 64, "norm": "l1"}, []),
        ({"probe_size": 64, "val_size": 64, "val_step_size": 0.01}, ["probe"]),
    ],
)
def test_what_tells_whether_a_network_hides(settings: dict[str, Any], telling: list[str]) -> None:
    run = engine.prepare(TrainConfig("adv", **TINY | settings), splits(160), None, None)
    assert [early for early, _ in watch.telling(run)] == telling


@pytest.mark.parametrize(
    ("looks", "images"), [({"probe_size": 64}, "training"), ({"probe_size": 0, "val_size": 64}, "validation")]
)
def test_a_network_that_few_steps_cannot_attack_and_many_can_is_seen(looks: dict[str, int], images: str) -> None:
    few = Images(torch.full((128, 1, 2, 3), 128, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64))
    x, model = few.images / 255, Stairs()
    few_steps, many_steps = (
        PGD(EPS, EPS / 4, steps)(model, x, few.labels, key=torch.tensor([1, 0])) for steps in (5, 40)
    )
    assert (model(few_steps).argmax(1) == 0).float().mean() > 0.9 and (model(many_steps).argmax(1) == 1).all()
    settings = TINY | looks | {"lr": 1e-9, "on_collapse": "stop", "method": "adv", "hyper": {"steps": 2}, "epochs": 3}
    run = engine.train(TrainConfig(**settings), splits=DataSplits("grey", few, few, 2, EPS), model=model)
    first, row = run.history
    assert run.ended == "training collapsed in epoch 2" and watch.collapse(row, []) is None
    assert watch.collapse(row, [first]) == (
        f"the network hides from short attacks: on {images} images its accuracy is "
        f"{100 * row.get('val_pgd_5', row['probe']):.0f} % after 5 steps of PGD, "
        f"{100 * row.get('val_pgd', row.get('probe_10')):.0f} % after 10"
    )
