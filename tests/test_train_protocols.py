"""--protocol: a recipe as defaults, which single settings override, and what it needs of the trainer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_train import checkpoint, cli, engine, methods, validation
from atlas_train import compare as comparing
from atlas_train.compare import compare
from atlas_train.config import TrainConfig, from_dict, resolved, to_dict
from atlas_train.data import DataSplits, Images
from atlas_train.protocols import HYPER, PROTOCOLS
from atlas_train.run import Run
from atlas_train.stored import evaluate_checkpoint, resume, resume_compare
from tiny_runs import TINY, Lines, same, splits, weights

#: The protocol on a data set that is learnt in a second.
SMALL: dict[str, Any] = {
    "protocol": "fastat", "eps": 0.1, "epochs": 5, "batch_size": 16, "model": "digits_net", "width": 4, "val_size": 16,
    "probe_size": 8, "augment": False, "device": "cpu", "threads": 1, "method": "one_step_adv", "beside": (),
}  # fmt: skip


def cifar() -> DataSplits:
    """A data set of that name, of a few images."""
    images = Images(torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), torch.arange(2000) % 10)
    return DataSplits("cifar10", images, images, 10, 8 / 255)


def trained(config: TrainConfig, **how: Any) -> Run:
    return engine.train(config, splits=splits(), **how)


# --- a table of settings


def test_a_protocol_is_the_default_of_its_settings_and_single_ones_win() -> None:
    config = TrainConfig(protocol="fastat")
    assert {name: getattr(config, name) for name in PROTOCOLS["fastat"]} == PROTOCOLS["fastat"]
    assert config.method == TrainConfig().method and config.beside is None
    own = TrainConfig("adv", {"steps": 1}, protocol="FastAT", epochs=30, ema_warmup=True, momentum_low=0, lr=None)
    assert (own.protocol, own.epochs, own.ema_warmup, own.momentum_low, own.lr) == ("fastat", 30, True, 0, 0.1)
    assert dataclasses.replace(own, epochs=40) == from_dict(to_dict(own) | {"epochs": 40})
    with pytest.raises(ValueError, match="protocol must be one of 'fastat', got 'fastad'"):
        TrainConfig(protocol="fastad")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method"):
        TrainConfig("adv", method="atlas", protocol="fastat")  # type: ignore[misc]


def test_lengths_of_a_protocol_are_not_taken_in_another_norm() -> None:
    with pytest.raises(ValueError, match="eps 8/255 of protocol fastat is of l_inf, and norm is 'l2': give eps too"):
        TrainConfig(protocol="fastat", norm="l2")
    with pytest.raises(ValueError, match="val_step_size 2/255 of protocol fastat is of l_inf"):
        TrainConfig(protocol="fastat", norm="l2", eps=0.5)
    assert TrainConfig(protocol="fastat", norm="l2", eps=0.5, val_step_size=0.1).norm == "l2"


def test_the_command_line_takes_protocol_file_and_flags_in_this_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    seen: list[TrainConfig] = []
    monkeypatch.setattr(comparing, "compare", lambda config, command: seen.append(config))
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"epochs": 30, "lr": 0.2, "method": "adv"}))
    assert cli.main(["train", "--protocol", "fastat", "--method", "one_step_adv", "--ema-warmup"]) == 0
    assert cli.main(["train", "--config", str(file), "--protocol=FastAT", "--lr", "0.3"]) == 0
    assert cli.main(["train", "--protocol", "auto"]) == 0
    assert seen == [
        TrainConfig("one_step_adv", protocol="fastat", ema_warmup=True),
        TrainConfig("adv", protocol="fastat", epochs=30, lr=0.3),
        TrainConfig(),
    ]
    with pytest.raises(SystemExit):
        cli.main(["train", "--protocol", "fastat", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "epochs 100, batch_size 128, optimizer sgd, lr 0.1, schedule one_cycle, schedule_step epoch" in text
    assert "mean none, std none" in text and "(default: one_cycle)" in text and "(default: 0.9995)" in text


def test_a_method_has_its_own_settings_in_a_protocol_beside_others_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LIET's smoothing is its own, 0.6 there, and the run's 0.4 must not come on top; GAT's code is the benchmark's."""
    smoothings = {}
    for main, beside in (("liet", ("adv", "gat")), ("adv", ("liet", "gat"))):
        config = resolved(TrainConfig(**SMALL | {"method": main, "beside": beside}), splits())
        for name in (main, *beside):
            own = comparing._own(config, name, tmp_path)
            smoothings[name] = own.label_smoothing
            built = own.build_method()
            if name == "liet":
                assert built.in_use()["smoothing"] == (0.6 if own.eps <= 8 / 255 else 0.4)
            if name == "gat":
                assert built.in_use()["code"] == "fastat"
        assert smoothings == {"liet": 0.0, "adv": 0.4, "gat": 0.4}
    given = TrainConfig("liet", protocol="fastat", label_smoothing=0.2)
    assert given.label_smoothing == comparing._own(resolved(given, cifar()), "adv", tmp_path).label_smoothing == 0.2
    assert (
        resolved(TrainConfig("gat", {"code": "authors"}, protocol="fastat"), cifar()).hyper_of("gat")["code"]
        == "authors"
    )
    at_8 = resolved(TrainConfig("liet", protocol="fastat"), cifar()).build_method()
    assert at_8.in_use()["smoothing"] == 0.6 and at_8.label_smoothing == 0
    for name in HYPER["fastat"].keys() & set(methods.names()):
        built = resolved(TrainConfig(name, protocol="fastat"), cifar()).build_method()
        assert built.in_use()["code"] == "fastat" != methods.build(name, 8 / 255).in_use()["code"]
    seen: list[TrainConfig] = []
    monkeypatch.setattr(comparing, "compare", lambda config, command: seen.append(config))
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"method": "adv", "hyper": {"steps": 4}, "protocol": "fastat"}))
    assert cli.main(["train", "--protocol", "fastat", "--method", "LIET"]) == 0
    assert cli.main(["train", "--config", str(file), "--method", "liet"]) == 0
    assert cli.main(["train", "--config", str(file)]) == 0
    of_liet = TrainConfig("liet", protocol="fastat")
    assert seen == [of_liet, of_liet, TrainConfig("adv", {"steps": 4}, protocol="fastat")]


# --- what it does to a run


def test_the_schedule_is_torchs_of_a_step_an_epoch() -> None:
    run = engine.prepare(TrainConfig(**SMALL | {"epochs": None}), splits(), None, None)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    for epoch in range(100):
        run.epoch = epoch
        for batch in (0, 1):
            run.step = 3 * epoch + batch  # has no say
            group = optimizer.param_groups[0]
            assert (run.rate(0), run.momentum) == pytest.approx((group["lr"], group["momentum"]), rel=1e-12)
        optimizer.step()
        if epoch < 99:
            schedule.step()
    assert (run.rate(0), run.momentum) == pytest.approx((4e-7, 0.95), rel=1e-12)


def test_images_go_into_the_network_as_they_are() -> None:
    config = TrainConfig(**TINY | {"mean": (), "std": ()})
    run = engine.prepare(config, splits(channels=3), None, None)
    assert run.model.normalize is None
    with pytest.raises(ValueError, match=r"as many numbers, one for each channel, or none both, got \(\) and None"):
        TrainConfig(**TINY | {"mean": ()})
    own = engine.prepare(config, splits(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)), None)
    assert own.config.mean == ()  # which says nothing of a network of one's own


@pytest.mark.parametrize("method", ["one_step_adv", "fgsm_pgi"])
def test_a_resumed_run_keeps_its_protocol_to_the_same_bits(method: str, tmp_path: Path) -> None:
    config = TrainConfig(**SMALL | {"method": method})
    whole = trained(config, folder=tmp_path / "whole")
    trained(config, folder=tmp_path / "cut", on_epoch=lambda row: row["epoch"] == 2)
    lines = Lines()
    resumed = resume(tmp_path / "cut", splits=splits(), display=lines)
    assert lines.said[0] == "resumed after epoch 2 of 5" and resumed.config.protocol == "fastat"
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.final_model), weights(whole.final_model))
    assert [row["momentum"] for row in resumed.history] == [row["momentum"] for row in whole.history]
    longer = resume(tmp_path / "cut", splits=splits(), epochs=6)
    assert longer.history[-1]["lr"] == pytest.approx(4e-7) and longer.config.epochs == 6
    with pytest.raises(ValueError, match="cannot be resumed with another protocol: it has 'fastat', you gave None"):
        resume(tmp_path / "cut", splits=splits(), protocol=None)


def test_the_average_has_no_warm_up_and_holds_the_buffers() -> None:
    """exp_avg of the published code: (1 - tau) * value + tau * exp_avg, the first time with the weights after a batch
    as both."""
    run = engine.prepare(TrainConfig(**SMALL), splits(), None, None)
    expected: dict[str, torch.Tensor] = {}
    assert run.average is not None
    for value in (0.5, 2.0, -1.0):
        with torch.no_grad():
            for tensor in run.model.state_dict().values():
                tensor.copy_(torch.full_like(tensor, value))
        for name, now in run.model.state_dict().items():
            expected[name] = 0.0005 * now + 0.9995 * expected.get(name, now.clone())
        run.average.after_batch(run.model)
    averaged = run.final_model.state_dict()
    assert run.final_model is not run.model and averaged.keys() == expected.keys()
    for name, value in expected.items():
        if averaged[name].is_floating_point():
            torch.testing.assert_close(averaged[name], value)


def test_every_method_beside_has_the_protocol_and_the_table_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    config = TrainConfig(**SMALL | {"epochs": 1, "beside": ("standard",), "out_dir": str(tmp_path)})
    compare(config, splits=splits(), show="silent", say=lines.append)
    title = next(line for line in lines if "epochs 1, seed 0" in line)
    assert "protocol fastat but eps 0.1, dataset bars, augment false, val_size 16, model digits_net" in title
    assert title.strip().endswith("epochs 1, batch_size 16, width 4")
    for name in ("standard", "one_step_adv"):
        recorded = checkpoint.load(tmp_path / name)["config"]
        assert (recorded["protocol"], recorded["schedule_step"], recorded["momentum_low"]) == ("fastat", "epoch", 0.85)
    assert json.loads((tmp_path / "results.json").read_text())["config"]["protocol"] == "fastat"
    resume_compare(tmp_path, splits=splits(), show="silent", say=lines.append)
    assert "evaluated before" in " ".join(lines)


# --- the average or the weights in training


def script(monkeypatch: pytest.MonkeyPatch, raw: Iterable[float], average: Iterable[float]) -> None:
    """Validation finds these PGD accuracies, epoch after epoch."""
    found = {True: iter(raw), False: iter(average)}

    def accuracies(run: Run, model: torch.nn.Module) -> dict[str, float]:
        return {"val_clean": 0.9, "val_pgd": next(found[model is run.model])}

    monkeypatch.setattr(validation, "_accuracies", accuracies)


@pytest.mark.parametrize(
    ("raw", "average", "best", "is_raw"),
    [
        ([0.3, 0.6, 0.4, 0.3, 0.2], [0.1, 0.2, 0.5, 0.5, 0.5], 2, True),
        ([0.3, 0.4, 0.4, 0.3, 0.2], [0.1, 0.2, 0.5, 0.6, 0.5], 4, False),
        ([0.3, 0.4, 0.4, 0.3, 0.7], [0.1, 0.2, 0.5, 0.6, 0.7], 5, True),  # of equal ones the weights in training
    ],
)
def test_best_is_the_better_of_the_average_and_the_weights_in_training(
    raw: list[float], average: list[float], best: int, is_raw: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, raw, average)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    held: list[Run] = []
    prepare = engine.prepare
    monkeypatch.setattr(engine, "prepare", lambda *args: held.append(prepare(*args)) or held[0])
    validate = engine.watch

    def noted(run: Run, *how: Any) -> Any:
        seen[run.epoch] = weights(run.model if is_raw else run.final_model)
        return validate(run, *how)

    monkeypatch.setattr(engine, "watch", noted)
    lines: list[str] = []
    config = TrainConfig(**SMALL | {"out_dir": str(tmp_path)})
    (result,) = compare(config, splits=splits(), show="silent", say=lines.append).values()
    run, folder = held[0], tmp_path / "one_step_adv"
    assert (run.best, run.best_raw) == (best, is_raw) and result.best is not None
    assert (result.best.epoch, result.best.raw, result.raw) == (best, is_raw or None, None)
    row = run.history[best - 1]
    assert (row["raw_pgd"], row["average_pgd"]) == (raw[best - 1], average[best - 1]) and row["val_raw"] == is_raw

    network, description = checkpoint.load_network(folder / "best.pt")
    assert same(weights(network), seen[best]) and description["epoch"] == best
    last, _ = checkpoint.load_network(folder)
    assert same(weights(last), weights(run.final_model))
    if best < 5 or is_raw:
        exported, _ = checkpoint.load_network(folder / checkpoint.export_name().replace("model", "best"))
        assert same(weights(exported), seen[best])
    table = lines[-2].splitlines()
    words = f"best (epoch {best}{', weights in training' if is_raw else ''})"
    assert table[2].startswith("one_step_adv, last (epoch 5)") and table[3].startswith(f"one_step_adv, {words}")
    assert "highest PGD-10 accuracy of the average or of the weights in training, whichever has more" in lines[-2]

    said: list[str] = []
    (found,) = evaluate_checkpoint(folder, splits=splits(), say=said.append).values()
    assert found.best is not None and (found.best.raw, found.rule) == (is_raw or None, result.rule)
    assert (found.best.evaluation.clean, found.evaluation.clean) == (
        result.best.evaluation.clean, result.evaluation.clean,
    )  # fmt: skip
    assert f"and the best epoch, {best}{', its weights in training' if is_raw else ''}:" in said
    (again,) = resume_compare(folder, splits=splits(), show="silent", say=said.append).values()
    assert again == result and any("evaluated before" in line for line in said)


def test_a_run_that_was_killed_before_best_was_written_has_the_weights_in_training_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(monkeypatch, [0.3, 0.6] + [0.1] * 9, [0.2] * 11)
    run = trained(TrainConfig(**SMALL), folder=tmp_path, on_epoch=lambda row: row["epoch"] == 2)
    raw = weights(run.model)
    (tmp_path / "best.pt").unlink()
    resumed = resume(tmp_path, splits=splits())
    assert (resumed.best, resumed.best_raw) == (2, True)
    assert same(weights(checkpoint.load_network(tmp_path / "best.pt")[0]), raw)
    back = resume(tmp_path / "best.pt", splits=splits(), epochs=3)  # with the average of that epoch, too
    assert back.epoch == 3 and back.average is not None and back.final_model is not back.model


def test_validation_costs_twice_with_both_and_the_step_of_its_attack_is_the_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[float | None] = []
    made = validation.PGD
    monkeypatch.setattr(
        validation, "PGD", lambda eps, step, *how, **more: steps.append(step) or made(eps, step, *how, **more)
    )
    run = trained(TrainConfig(**SMALL | {"epochs": 1, "probe_size": 0}))
    assert steps == [2 / 255] * 4  # two halves for the weights in training, and two for their average
    row = run.history[0]
    half = sum(row[f"{name}_{look}"] for name in ("raw", "average") for look in ("clean", "pgd_5"))
    assert validation.share(run, 5.0) == pytest.approx(16 * (2 + 11 * half) / (5 * 48))
    alone = trained(TrainConfig(**SMALL | {"epochs": 1, "best_of": "average"}))
    assert alone.history[0]["val_pgd"] == row["average_pgd"] and "val_raw" not in alone.history[0]
