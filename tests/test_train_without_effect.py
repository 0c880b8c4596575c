"""Settings that another setting switches off: that they change nothing is true, and it is said."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch

from atlas_train import engine, methods
from atlas_train.config import TrainConfig, resolved
from atlas_train.data import DataSplits, Images
from atlas_train.methods import State
from atlas_train.options import alternatives, hints
from beside_published import EPS, case, ours
from tiny_runs import TINY, Lines, splits

#: What else has to be set for a setting to be allowed there, or to matter without its switch.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("atlas", "segment_objective"): {"local": "start"},
    ("atlas", "iterates"): {"local": "start"},
    ("atlas", "keep"): {"local": "start", "steps": 2},
    ("atlas", "local_ramp_low"): {"local_ramp": 0.5},
    ("fgsm_pgi", "authors_reset"): {"code": "authors"},
}
OFF = [
    (name, setting, {switch: value})
    for name in methods.names()
    for setting, by in methods.get(name).switches.items()
    for switch, values in by
    for value in values
]
OFF += [("atlas", "keep", {"iterates": "first"}), ("fgsm_pgi", "authors_reset", {"reset": 0.7})]
OFF += [("atlas", "bn", {"local": local, "global_term": "none"}) for local in ("none", "margin")]


def two_values(method: Any, setting: str) -> list[Any]:
    kind = alternatives(hints(method)[setting])[0]
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))[:2]
    return {bool: [False, True], int: [1, 3], float: [0.25, 0.75]}[kind]


@pytest.mark.parametrize(("name", "setting", "off"), OFF)
def test_what_is_switched_off_changes_nothing(name: str, setting: str, off: dict[str, Any]) -> None:
    method, seen = methods.get(name), []
    for value in ("first", "all") if setting == "keep" else two_values(method, setting):
        built = methods.build(name, EPS, BESIDE.get((name, setting), {}) | off | {setting: value})
        assert value == "first" or setting in built.without_effect()  # the default of keep, which all comes to
        made = ours(built, case(), State(epoch=1, epochs=2, size=100))
        seen.append([made.loss, *(grad for grads in made.grads for grad in grads)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("atlas", {"radius": 0.02, "global_weight": 2.0, "local_objective": "ce", "count": 2}),
        ("atlas", {"local": "start", "segment_weight": 1.0, "segment_objective": "kl", "global_term": "ce"}),
        ("atlas", {"local": "start", "steps": 2, "iterates": "all", "keep": "all", "local_ramp": 0.5}),
        ("atlas", {"bn": "split"}),
        ("adr", {"form": "trades", "beta": 3.0}),
        ("gairat", {"base": "trades", "beta": 3.0, "lam": 0.0}),
        ("fgsm_pgi", {"code": "authors", "authors_reset": 0.2}),
        ("liet", {"smoothing": 0.0}),
    ],
)
def test_what_is_in_use_is_not_said_to_change_nothing(name: str, hyper: dict[str, Any]) -> None:
    assert not methods.build(name, EPS, hyper).without_effect().keys() & {*hyper, "label_smoothing"}


START = {"local": "start", "start_noise": "pgi"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hyper": {**START, "radius": 0.02}}, "radius=0.02 changes nothing, as local is start"),
        ({"hyper": {**START, "global_weight": 2}}, "global_weight=2 changes nothing, as global_term is none"),
        (
            {"hyper": {**START, "segment_objective": "kl"}},
            "segment_objective=kl changes nothing, as segment_weight is 0",
        ),
        ({"hyper": {**START, "global_weight": 2, "global_term": "kl"}}, None),
        ({"hyper": {"local": "none", "local_weight": 2}}, "local_weight=2 changes nothing, as local is none"),
        ({"hyper": {"radius": 0.02}}, None),
        (
            {"hyper": {**START, "radius": "5/100", "global_weight": "1"}},
            "radius=0.05 changes nothing, as local is start",
        ),
        ({"method": "liet", "label_smoothing": 0.2, "hyper": {"smoothing": 0}}, None),
        (
            {"method": "liet", "label_smoothing": 0.2},
            "label_smoothing=0.2 changes nothing, as liet has a smoothing of its own, 0.4",
        ),
        (
            {"method": "n_fgsm", "hyper": {"bn_compat": True, "attack_mode": "eval"}},
            "bn_compat=True changes nothing, as attack_mode is eval",
        ),
        ({"mix_steps": 5}, "mix_steps=5 changes nothing, as mix_share is 0"),
        ({"momentum": 0.5}, "momentum=0.5 changes nothing, as optimizer is adam"),
    ],
)
def test_a_setting_that_changes_nothing_is_said(settings: dict[str, Any], said: str | None) -> None:
    config = TrainConfig(**TINY | {"method": "atlas"} | settings)
    run, _ = engine.start(config, splits(), None, None)
    assert engine._without_effect(run) == ([f"WARNING: {said}"] if said else [])


def test_a_run_says_what_changes_nothing() -> None:
    lines = Lines()
    config = TrainConfig("atlas", **TINY | {"epochs": 1}, hyper={**START, "radius": 0.02})
    engine.train(config, splits=splits(), display=lines)
    assert "WARNING: radius=0.02 changes nothing, as local is start" in lines.said


def mnist() -> DataSplits:
    few = Images(torch.zeros(200, 1, 28, 28, dtype=torch.uint8), torch.arange(200) % 10)
    return DataSplits("mnist", few, few, 10, 0.3, augment=False)


def hyper_on_mnist(**hyper: Any) -> dict[str, Any]:
    return dict(resolved(TrainConfig("atlas", dataset="mnist", hyper=hyper, val_size=50), mnist()).hyper)


def test_a_default_of_the_data_set_that_changes_nothing_is_not_taken() -> None:
    assert hyper_on_mnist() == pytest.approx({"atlas.step_size": 0.2, "atlas.radius": 0.3})
    assert hyper_on_mnist(local="segment") == {"local": "segment", "atlas.step_size": pytest.approx(0.2)}


def test_a_form_with_a_step_of_its_own_brings_it() -> None:
    for form in ({"start_noise": "wide"}, {"wide_start": 2.0}, START, START | {"start_noise": "liet"}):
        hyper = hyper_on_mnist(**form)
        assert "atlas.step_size" not in hyper
        built = methods.build("atlas", 0.3, {key.removeprefix("atlas."): value for key, value in hyper.items()})
        assert built.in_use()["step_size"] == 0.3
    for form in ({"start_noise": "uniform"}, {"local": "start"}, {"local": "start", "start_noise": "uniform"}):
        assert hyper_on_mnist(**form)["atlas.step_size"] == pytest.approx(0.2)
    assert hyper_on_mnist(start_noise="wide", step_size=0.1)["step_size"] == 0.1
