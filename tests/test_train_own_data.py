"""Data of one's own: by import path, never run on a file's word alone; and what is not known of them is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_train import checkpoint, cli, data, engine, methods
from atlas_train.compare import compare, settings_of
from atlas_train.config import TrainConfig, resolved
from atlas_train.data import DataSplits, Images, OfEps
from atlas_train.stored import evaluate_checkpoint, resume, resume_compare
from tiny_runs import EPS, TINY, same, splits, weights

CODE = """
from tiny_runs import EPS, splits
from atlas_train.data import Dataset, DataSplits

VALUE = 3
SHIFT = 0
open("ran", "a").write("x")

def images(n=64, shift=None):
    made = splits(n, channels=3)
    made.test.images[:] += SHIFT if shift is None else shift
    return made

def load(data_dir, download):
    made = images()
    return made.train, made.test

BARS = Dataset(
    name="coloured bars", load=load, num_classes=4, eps=EPS, model="digits_net", mean=(0.27, 0.27, 0.27),
    std=(0.28, 0.28, 0.28), epochs=2, batch_size=16, optimizer="adam", lr=5e-3,
    methods={"adv": {"steps": 2}},
)

def shifted():
    return images(shift=9)

def told(data_dir, download=False):
    return DataSplits(f"{data_dir}, {download}", *load(None, False), 4, EPS)

def function_of_a_declaration():
    return BARS

def nothing():
    return None

def failing():
    raise KeyError("a\\nb")

def bad():
    return DataSplits("bad", *load(None, False), 3, EPS)

ONE = Dataset(name="one", load=lambda data_dir, download: splits().train, num_classes=4, eps=EPS)
"""
PATH = "sets/own.py:BARS"
QUICK = ["--width", "2", "--probe-size", "0", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    Path("sets").mkdir()
    Path("sets/own.py").write_text(CODE)
    Path("mydata.py").write_text(CODE)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("_atlas_dataset", "mydata")):
            del sys.modules[name]


def ran() -> int:
    return len(Path("ran").read_text()) if Path("ran").exists() else 0


def change() -> None:
    """The file gives other data from now on."""
    Path("sets/own.py").write_text(CODE.replace("SHIFT = 0", "SHIFT = 1"))


# --- found and called


@pytest.mark.parametrize("path", [PATH, "mydata:BARS", "sets/own.py:images"])
def test_a_declared_set_or_a_function_in_a_file_or_a_module(path: str) -> None:
    made = data.load(path)
    assert made.loader == path and torch.equal(made.train.images, splits(channels=3).train.images)
    assert (made.declared is not None) == path.endswith("BARS")


def test_folder_and_download_go_to_the_factory_only_if_they_are_given() -> None:
    assert data.load("sets/own.py:told", "folder").name == "folder, False"
    assert data.load("sets/own.py:told", "folder", True).name == "folder, True"
    assert data.load(PATH, "folder", True).name == "coloured bars"
    with pytest.raises(ValueError, match="own.py:images' is called with data_dir='x', and it does not take that"):
        data.load("sets/own.py:images", "x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sets/other.py:BARS", "dataset 'sets/other.py:BARS': there is no file .*other.py"),
        ("my_dat:BARS", "no module 'my_dat', neither installed nor in this folder"),
        ("sets/own.py:BAR", "has no 'BAR'; the nearest is 'BARS'"),
        ("sets/own.py:VALUE", "must be a class or a function, got int"),
        ("sets/own.py:nothing", "with no arguments, and must give DataSplits .atlas_train.data., got NoneType$"),
        ("sets/own.py:function_of_a_declaration", "must give DataSplits .*got Dataset; name the Dataset itself"),
        ("sets/own.py:told", "missing a required argument: 'data_dir'"),
        ("sets/own.py:failing", r"and it fails: KeyError: 'a\\nb'"),
        ("sets/own.py:bad", r"and it fails: ValueError: bad: labels of the train split must be in 0..2, got 0..3"),
        ("sets/own.py:ONE", "data set one: load must give two Images, for training and for test, got Images"),
        ("sets/own.py:", "must be package.module:factory or path/to/file.py:factory"),
        ("sets/own.py", "for data of your own write sets/own.py:factory"),
        ("own", "no data set 'own'.*for data of your own write package.module:factory"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_path_is_said(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(path)


# --- trained on, resumed, evaluated


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``atlas ...``; gives what it printed, or the one line of its error where that is what is expected."""
    pytest.importorskip("tyro")

    def run(*argv: str, status: int = 0) -> str:
        capsys.readouterr()
        assert cli.main(list(argv)) == status
        printed = capsys.readouterr()
        assert not status or printed.err.count("\n") == 1
        return printed.err if status else printed.out

    return run


def test_a_run_goes_on_and_is_evaluated_where_its_code_is_named_and_gives_the_same(commands: Any) -> None:
    commands("train", "--dataset", PATH, "--method", "standard", "--out-dir", "run", *QUICK)
    state = checkpoint.load("run/standard")
    assert (state["data"]["name"], state["data"]["loader"]) == ("coloured bars", PATH)
    assert (state["config"]["dataset"], state["config"]["mean"]) == ("coloured bars", [0.27, 0.27, 0.27])
    assert state["epoch"] == 2 and ran() == 1
    evaluate, resumed = ("evaluate", "run/standard"), ("train", "--resume", "run/standard", "--epochs", "3")
    for command in (evaluate, resumed):
        error = commands(*command, status=2)
        assert f"not run unasked: if you trust it, say so with --dataset {PATH}" in error and ran() == 1
    again = (*evaluate, "--dataset", str(Path(PATH).resolve()))
    assert "note" not in commands(*again)
    assert "epoch 3/3" in commands(*resumed, "--dataset", PATH) and ran() == 3

    change()
    before = Path("run/standard/last.pt").read_bytes()
    for command in (again, (*resumed[:-1], "4", "--dataset", PATH)):
        error = commands(*command, status=2)
        assert "was made on other data" in error and f"put the code at {PATH} back as it was" in error
    assert Path("run/standard/last.pt").read_bytes() == before
    assert "note: not the data that" in commands(*again, "--other-data")
    assert "note: not the data that" in commands(*evaluate, "--dataset", "sets/own.py:shifted")


def test_a_comparison_goes_on_with_its_code(commands: Any) -> None:
    flags = ("--dataset", PATH, "--method", "standard", "--epochs", "1", *QUICK)
    commands("train", *flags, "--beside", "one_step_adv", "--out-dir", "both")
    assert "not run unasked" in commands("train", "--resume", "both", status=2)
    text = commands("train", "--resume", "both", "--dataset", PATH, "--beside", "adv")
    rows = text[text.index("method ") :].splitlines()
    assert [row.split()[0] for row in rows[2:5]] == ["one_step_adv", "adv", "standard"]
    assert checkpoint.load("both/adv")["hyper"]["steps"] == 2  # as the data set declares
    assert resume("both/adv", dataset=PATH, epochs=2).epoch == 2
    with pytest.raises(ValueError, match="not run unasked"):
        resume("both/adv", epochs=3)
    with pytest.raises(ValueError, match="not run unasked"):
        resume_compare("both")


def test_a_run_made_in_python_is_evaluated_by_code_that_gives_its_data(commands: Any) -> None:
    own = replace(data.load(PATH), loader=None)
    engine.train(TrainConfig(**TINY | {"method": "standard"}), splits=own, folder="run")
    assert "give them by code, --dataset package.module:factory" in commands("evaluate", "run", status=2)
    assert "note" not in commands("evaluate", "run", "--dataset", PATH)
    assert "epoch 5/5" in commands("train", "--resume", "run", "--dataset", PATH, "--epochs", "5")
    state = checkpoint.load("run")
    del state["data"]  # as a version wrote it that kept no record
    checkpoint.save(Path("run/last.pt"), state)
    assert "nothing tells whether" in commands("train", "--resume", "run", "--dataset", PATH, "--epochs", "6")


def test_no_part_of_a_file_can_smuggle_a_path_in(commands: Any) -> None:
    engine.train(TrainConfig(**TINY | {"method": "standard", "epochs": 1}), splits=splits(), folder="run")
    state = checkpoint.load("run")
    for part, key in (("config", "dataset"), ("data", "loader")):
        checkpoint.save(Path("run/last.pt"), state | {part: state[part] | {key: PATH}})
        for command in (("train", "--resume", "run"), ("evaluate", "run")):
            assert "atlas: run" in commands(*command, status=2)
        for call in (resume, resume_compare, evaluate_checkpoint):
            with pytest.raises(ValueError, match="not run unasked|data of your own"):
                call("run")
    Path("comparison").mkdir()
    Path("comparison/config.json").write_text(f'{{"dataset": "{PATH}", "beside": ["adv"]}}')
    assert "not run unasked" in commands("train", "--resume", "comparison", status=2)
    assert ran() == 0


# --- what a data set says, and what it does not


OWN: dict[str, Any] = {"method": "standard", "model": "digits_net", "device": "cpu"}


@pytest.mark.parametrize(
    ("channels", "given", "missing"),
    [
        (1, {}, "epochs, batch_size, lr"),
        (1, {"lr": 0.1}, "epochs, batch_size"),
        (3, {"epochs": 1, "lr": 0.1}, "batch_size"),
        (1, {"epochs": 1, "lr": 0.1, "batch_size": 8}, ""),
        (3, {"epochs": 1, "lr": 0.1, "batch_size": 8}, ""),
    ],
)
def test_what_nothing_says_is_asked_for(channels: int, given: dict[str, Any], missing: str) -> None:
    own = splits(channels=channels)
    if not missing:
        config = resolved(TrainConfig(**OWN | given), own)
        assert (config.optimizer, config.weight_decay, config.cyclic_peak) == ("sgd", 0.0, 0.5)
        return
    with pytest.raises(ValueError, match=f"the data set 'bars' has no {missing} of its own: set them") as caught:
        resolved(TrainConfig(**OWN | given), own)
    assert f"--{missing.split(', ')[0].replace('_', '-')}" in str(caught.value)


def test_mean_and_std_of_colour_images_are_measured_where_nothing_says_them() -> None:
    given: dict[str, Any] = {"epochs": 1, "lr": 0.1, "batch_size": 8}
    own = splits(channels=3)
    config = resolved(TrainConfig(**OWN | given), own)
    measured = torch.tensor([config.mean, config.std], dtype=torch.float64)
    pixels = own.train.images.double() / 255
    expected = torch.stack([pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)])
    assert (measured - expected).abs().max() <= 0.5001e-4
    assert resolved(config, own).mean == config.mean
    assert resolved(TrainConfig(**OWN | given | {"mean": (), "std": ()}), own).mean == ()  # as they are
    assert resolved(TrainConfig(**OWN | given), splits()).mean is None  # grey ones are not normalised
    black = replace(
        own, train=Images(own.train.images * torch.tensor([1, 0, 1]).byte()[:, None, None], own.train.labels)
    )
    assert resolved(TrainConfig(**OWN | given), black).std[1] == 1


def test_a_network_of_ones_own_needs_no_mean_and_is_not_told_one() -> None:
    given: dict[str, Any] = {"epochs": 1, "lr": 0.1, "batch_size": 8}
    assert resolved(TrainConfig(**OWN | given | {"model": None}), splits(channels=3), own_model=True).mean is None
    declared = data.load(PATH)
    assert resolved(TrainConfig(model="nets.py:Net"), declared).mean is None
    with pytest.raises(ValueError, match="mean and std are built into networks of ours alone"):
        resolved(TrainConfig(model="nets.py:Net", mean=(0.5,) * 3, std=(0.5,) * 3), declared)


def test_mean_and_std_are_for_images_of_as_many_channels() -> None:
    assert resolved(TrainConfig(), replace(splits(), name="cifar10")).mean is None  # a grey copy
    assert resolved(TrainConfig(), replace(splits(channels=3), name="cifar10")).mean == data.get("cifar10").mean
    with pytest.raises(
        ValueError, match="data set coloured bars: mean must be a number for each of the images' 3 chan"
    ):
        replace(data.load(PATH).declared, mean=(0.5,), std=(0.5,))()


def test_mean_and_std_belong_together() -> None:
    wrong: tuple[dict[str, Any], ...] = ({"mean": (0.5,)}, {"std": (0.5,)}, {"mean": (0.5, 0.5, 0.5), "std": (0.5,)})
    for given in (*wrong, {"mean": (), "std": (0.5,)}):  # both empty: the images are used as they are
        with pytest.raises(ValueError, match="mean and std must be as many numbers"):
            TrainConfig(**given)
    with pytest.raises(ValueError, match="std must be a list of numbers > 0, got"):
        TrainConfig(mean=(0.5,), std=(0.0,))
    with pytest.raises(ValueError, match="got 2 means, expected one for each of 3 channels"):
        engine.train(TrainConfig(**TINY | {"mean": (0.5,) * 2, "std": (0.5,) * 2}), splits=splits(channels=3))


def test_defaults_that_cannot_be_are_the_data_sets_fault() -> None:
    own = data.load(PATH)
    for fault, message in (
        ({"lr": -1.0}, "data set coloured bars: lr must be a number > 0"),
        ({"optimizer": "lion"}, "data set coloured bars: optimizer must be one of"),
        ({"std": None}, "data set coloured bars: mean and std must be as many"),
        ({"methods": {"trade": {"beta": 1}}}, "no method 'trade'; the nearest is 'trades'"),
        ({"methods": {"trades": {"betta": 1}}}, "trades has no hyper-parameter 'betta'; the nearest is 'beta'"),
        ({"methods": {"mart": {"steps": -3}}}, "mart: steps must be an integer >= 1"),
        ({"like": "cifra10"}, "data set coloured bars: like: no data set 'cifra10'; the nearest is 'cifar10'"),
        ({"methods": [("adv", {"steps": 2})]}, "methods must be hyper-parameters by method and name, got"),
        ({"methods": {"adv": 2}}, "methods must be hyper-parameters by method and name, got"),
        ({"mean": 0.5, "std": 0.5}, "data set coloured bars: mean must be a list of numbers, got 0.5"),
        ({"methods": {"adv": {"step": 1}}}, "adv has no hyper-parameter 'step'"),
    ):
        with pytest.raises(ValueError, match=message):
            resolved(TrainConfig(method="adv"), replace(own, declared=replace(own.declared, **fault)))


def test_who_wins_among_hyper_parameters() -> None:
    """The user, then the data set, then the method for that data set, then the method."""
    name = "cifar10"
    declared = replace(data.get(name), methods={"TRADES": {"beta": 2.0, "step_size": OfEps(0.5)}})
    own = replace(splits(), name=name, declared=declared)

    def trades(**hyper: Any) -> dict[str, Any]:
        return resolved(TrainConfig(method="trades", hyper=hyper), own).hyper_of("trades")

    assert methods.TRADES.defaults[name]["steps"] == trades()["steps"] == 10
    assert (trades()["beta"], trades()["step_size"]) == (2.0, 0.5 * EPS)
    assert trades(beta=6.0)["beta"] == 6.0
    assert resolved(TrainConfig(method="gairat"), replace(splits(), name="mnist")).hyper_of("gairat")["steps"] == 40


@pytest.mark.parametrize("hyper", [{"segment_weight": 0.5}, {"keep": "all", "iterates": "all", "steps": 2}])
def test_what_only_the_default_form_of_a_data_set_has_may_be_set_alone(hyper: dict[str, Any]) -> None:
    config = resolved(TrainConfig(dataset="cifar10", hyper=hyper), replace(splits(channels=3), name="cifar10"))
    method = config.build_method()
    assert isinstance(method, methods.ATLAS) and method.local == "start"
    assert all(getattr(method, name) == value for name, value in hyper.items())
    for other in ({"dataset": "digits"}, {"norm": "l2"}, {"hyper": {**hyper, "local": "worst"}}):
        with pytest.raises(ValueError, match="choose local='start'"):
            TrainConfig(**{"dataset": "cifar10", "hyper": hyper} | other)


@pytest.mark.parametrize("other", [{"local": "worst"}, {"start_noise": "wide"}, {"wide_start": 2.0}, {"norm": "l2"}])
def test_a_form_that_was_chosen_keeps_its_own_defaults(other: dict[str, Any]) -> None:
    """ATLAS on CIFAR-10: what makes up its form there goes together."""
    name, norm = "cifar10", other.get("norm", "linf")
    form = methods.ATLAS.defaults[name]

    def used(**hyper: Any) -> Any:
        config = TrainConfig(method="atlas", dataset=name, hyper=hyper, norm=norm)
        return resolved(config, replace(splits(), name=name)).build_method().in_use()

    plain = {key: value for key, value in other.items() if key != "norm"}
    assert used(**plain) == methods.build("atlas", resolved_eps(name, norm), plain, norm=norm).in_use()
    if norm == "linf":
        assert form.items() <= used().items() and used(local_weight=0.5) == used() | {"local_weight": 0.5}
        assert used(keep="first") == used() | {"keep": "first"}
        assert used(local="start") == used(start_noise="pgi") == used()


def resolved_eps(name: str, norm: Any) -> float:
    eps = resolved(TrainConfig(norm=norm), replace(splits(), name=name)).eps
    assert eps
    return eps


def test_a_run_of_before_goes_on_with_the_form_of_its_defaults(tmp_path: Path) -> None:
    """On a data set that has had a default form since, for example."""
    engine.train(TrainConfig(**TINY | {"method": "atlas"}), splits=splits(), folder=tmp_path)
    state = checkpoint.load(tmp_path)
    assert "local" not in state["config"]["hyper"] and state["hyper"]["local"] == "neighbours"
    hyper = settings_of(tmp_path).hyper
    assert {key: hyper[key] for key in methods.ATLAS.form_options} == {
        "local": "neighbours", "start_noise": "uniform", "wide_start": 0.0
    }  # fmt: skip


def test_a_run_and_a_comparison_of_before_are_resumed_with_their_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TINY | {"method": "atlas", "epochs": 1, "beside": ("standard",), "out_dir": str(tmp_path), "eval_size": 8}
    compare(TrainConfig(**tiny), splits=splits(), say=str)
    monkeypatch.setattr(methods.ATLAS, "defaults", {"bars": methods.ATLAS.defaults["cifar10"]})
    resume_compare(tmp_path, splits=splits(), say=str, epochs=2)
    assert resume(tmp_path / "atlas", splits=splits(), epochs=3).config.hyper["local"] == "neighbours"


def test_a_declared_set_fills_in_all_that_is_needed() -> None:
    for name in data.names():
        known = data.get(name)
        few = Images(torch.zeros(4, len(known.mean or (0,)), 8, 8, dtype=torch.uint8), torch.zeros(4).long())
        config = resolved(TrainConfig(), DataSplits(name, few, few, known.num_classes, known.eps))
        assert known.settings.keys() <= vars(config).keys()
        assert None not in (config.model, config.epochs, config.batch_size, config.lr, config.optimizer)


def test_mean_and_std_go_into_the_network_and_the_checkpoint() -> None:
    settings = TINY | {"method": "standard", "epochs": 1, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    run = engine.train(TrainConfig(**settings), splits=splits(channels=3), folder="run")
    kept = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert checkpoint.mean_std(run.model.state_dict()) == kept
    network, config = checkpoint.load_model("run")
    assert checkpoint.mean_std(network.state_dict()) == kept and config["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="cannot be resumed with another mean and std"):
        resume("run", splits=splits(channels=3), epochs=2, mean=(0.1, 0.2, 0.4))
    assert resume("run", splits=splits(channels=3), epochs=2).config.mean == (0.1, 0.2, 0.3)


def without_mean_and_std(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as the version before wrote them, which gave any colours the mean and std of CIFAR-10."""
    return {name: value for name, value in values.items() if name not in ("mean", "std")}


def test_runs_of_the_version_before_go_on_with_the_mean_and_std_of_their_weights() -> None:
    cifar10, own = data.get("cifar10"), splits(channels=3)
    config = TrainConfig(**TINY | {"method": "standard", "mean": cifar10.mean, "std": cifar10.std})
    whole = engine.train(config, splits=own)
    engine.train(config, splits=own, folder="old", on_epoch=lambda row: row["epoch"] == 2)
    state = checkpoint.load("old")
    checkpoint.save(Path("old/last.pt"), state | {"config": without_mean_and_std(state["config"])})
    evaluate_checkpoint("old", splits=own, steps=1, say=lambda text: None)
    again = resume("old", splits=own)
    assert same(weights(again.model), weights(whole.model)) and again.changes == []
    assert (again.config.mean, again.config.std) == (cifar10.mean, cifar10.std)


def test_a_method_added_to_a_comparison_of_the_version_before_is_trained_as_the_others() -> None:
    given = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "out_dir": "old", "epochs": 1, "beside": ("adv",)}
    quiet: dict[str, Any] = {"splits": splits(channels=3), "show": "silent", "say": lambda text: None}
    compare(TrainConfig(**TINY | {"method": "standard"} | given), **quiet)
    for name in ("standard", "adv"):
        state = checkpoint.load(f"old/{name}")
        config = without_mean_and_std(state["config"])
        checkpoint.save(Path(f"old/{name}/last.pt"), state | {"config": config})
    Path("old/config.json").write_text(json.dumps(config | {"method": "standard", "beside": ["adv"]}))
    resume_compare("old", beside=("one_step_adv",), **quiet)
    network, config = checkpoint.load_model("old/one_step_adv")
    assert checkpoint.mean_std(network.state_dict()) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
