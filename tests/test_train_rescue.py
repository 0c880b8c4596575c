"""What follows when training collapses: a warning, the end, or the way back to the best epoch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_train import checkpoint, engine, rescue, saving, segment, watch
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.run import Run
from atlas_train.stored import evaluate_checkpoint, resume, resume_compare
from test_train_validation import VALIDATED, script
from tiny_runs import TINY, Lines, same, splits, weights

ROLLBACK = VALIDATED | {"on_collapse": "rollback", "method": "adv", "hyper": {"steps": 1}}
#: Robust accuracies of epochs, the fourth of which is a collapse, then those after a way back.
SERIES = [0.3, 0.6, 0.55, 0.1, 0.5, 0.7, 0.6]
FELL = "the network learned its own attack: PGD-10 accuracy on the validation images fell from 60 % to 10 %"


def trained(folder: Path | None, **settings: Any) -> tuple[Run, list[str]]:
    lines = Lines()
    run = engine.train(TrainConfig(**settings), splits=splits(), folder=folder, display=lines)
    return run, lines.said


def plain(state: dict[str, Any]) -> dict[str, Tensor]:
    moments = {f"{n} {k}": v for n, kept in state["optimizer"]["state"].items() for k, v in kept.items()}
    return state["model"] | moments | {"rng": state["rng"]["cpu"]}


def test_a_warning_leaves_the_run_as_it_is_and_the_best_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm = engine.train(TrainConfig(**VALIDATED | {"method": "adv", "hyper": {"steps": 1}}), splits=splits())
    script(monkeypatch, SERIES)
    run, said = trained(tmp_path, **ROLLBACK | {"on_collapse": "warn"})
    assert [text for text in said if text.startswith(f"WARNING: {FELL} in epoch 4: catastrophic overfitting")]
    assert run.epoch == 4 and same(weights(run.model), weights(calm.model))
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == run.best == 2


def test_the_table_of_a_run_that_collapsed_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)
    lines: list[str] = []
    config = TrainConfig(**ROLLBACK | {"on_collapse": "warn", "out_dir": str(tmp_path)})
    (result,) = compare(config, splits=splits(), show="silent", say=lines.append).values()
    table = lines[-2].splitlines()
    assert [line.split("  ")[0] for line in table[2:4]] == ["adv, last (epoch 4)", "adv, best (epoch 2)"]
    assert table[-1] == f"adv collapsed in epoch 4: {FELL}" and result.collapses == [[4, FELL]]
    assert f"adv collapsed in epoch 4: {FELL}." in (tmp_path / "adv" / "results.md").read_text()


def test_stop_ends_the_run_after_that_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)
    run, said = trained(tmp_path, **ROLLBACK | {"on_collapse": "stop", "epochs": 6})
    assert (run.epoch, run.best, run.ended) == (4, 2, "training collapsed in epoch 4")
    assert said[-1] == "training collapsed in epoch 4: the run ends after epoch 4 of 6"
    assert resume(tmp_path, splits=splits()).epoch == 4
    assert resume(tmp_path, splits=splits(), on_collapse="warn").epoch == 6


def test_a_run_that_came_to_its_last_epoch_did_not_end_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)
    run, said = trained(tmp_path, **ROLLBACK | {"on_collapse": "stop", "early_stop": 2, "epochs": 4})
    assert (run.epoch, run.best, run.ended) == (4, 2, "") and not any("the run ends after" in text for text in said)
    assert checkpoint.load(tmp_path)["ended"] == ""


def test_rollback_goes_on_from_the_best_with_one_step_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)
    taken_back = []
    save = saving.save

    def look(run: Run) -> None:
        save(run)
        if run.rescues and not taken_back:
            taken_back.append((checkpoint.load(tmp_path), run.seconds))

    monkeypatch.setattr(rescue.saving, "save", look)
    kept: dict[str, Tensor] = {}
    put = saving.put

    def spied(run: Run, state: dict[str, Any], source: Path) -> None:
        kept.update({name: value.clone() for name, value in plain(state).items()})
        put(run, state, source)

    monkeypatch.setattr(rescue.saving, "put", spied)
    run, said = trained(tmp_path, **ROLLBACK | {"epochs": 5})
    back = f"{FELL} in epoch 4: back to epoch 2, the best, and on from there with steps 2 (before: 1), "
    assert [text for text in said if text.startswith(back)]
    assert [row["val_pgd"] for row in run.history] == [0.3, 0.6, 0.5, 0.7, 0.6]
    assert (run.epoch, run.best, run.method.in_use()["steps"], run.epochs_done) == (5, 4, 2, 7)
    assert run.method.in_use()["step_size"] == pytest.approx(1.25 * TINY["eps"] / 2)
    state, seconds = taken_back[0]
    assert (state["epoch"], state["step"], state["best"]) == (2, 6, 2)
    assert same(plain(state), kept) and seconds > state["history"][-1]["seconds"]  # lost time counts
    assert run.rescues[0]["changed"]["steps"] == [1, 2]


def test_a_rescued_run_that_is_killed_ends_with_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TrainConfig(**ROLLBACK | {"epochs": 5})
    with monkeypatch.context() as patch:
        script(patch, SERIES)
        whole, _ = trained(tmp_path / "whole", **ROLLBACK | {"epochs": 5})
    take_back = rescue.take_back

    def killed(*args: Any, **how: Any) -> str:
        take_back(*args, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        script(patch, SERIES)
        patch.setattr(rescue, "take_back", killed)
        engine.train(config, splits=splits(), folder=tmp_path / "killed")
    script(monkeypatch, SERIES[4:])
    torch.manual_seed(5)
    again = dataclasses.replace(config, resume=str(tmp_path / "killed"))  # which says nothing of two steps
    run = engine.train(again, splits=splits())
    assert same(weights(run.model), weights(whole.model)) and run.method.in_use() == whole.method.in_use()
    assert run.rescues == whole.rescues and run.best == whole.best == 4
    with pytest.raises(ValueError, match="other hyper-parameters"):
        engine.train(dataclasses.replace(again, hyper={"steps": 7}), splits=splits())
    with pytest.raises(ValueError, match="another method: it has 'adv', you gave 'one_step_adv'"):
        engine.train(dataclasses.replace(again, method="one_step_adv", hyper={}), splits=splits())


def test_a_rescued_run_is_labelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)
    lines: list[str] = []
    config = TrainConfig(**ROLLBACK | {"epochs": 5, "out_dir": str(tmp_path)})
    (result,) = compare(config, splits=splits(), show="silent", say=lines.append).values()
    table = lines[-2]
    assert "adv, rescued, last (epoch 5)" in table and "adv, rescued, best (epoch 4)" in table
    told = (
        f"adv was rescued: it collapsed in epoch 4 ({FELL}) and went back to epoch 2, to go on with steps 2, step_size"
    )
    assert told in table
    written = json.loads((tmp_path / "adv" / "results.json").read_text())["methods"]["adv"]
    assert written["rescues"][0]["back_to"] == 2 and written["hyper"]["steps"] == 2
    assert result.epoch_seconds == pytest.approx((result.training_seconds or 0) / 7)
    assert resume_compare(tmp_path / "adv", splits=splits(), show="silent", say=lines.append) == {"adv": result}


def test_without_steps_the_run_ends_at_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, SERIES)
    run, said = trained(tmp_path, **ROLLBACK | {"method": "one_step_adv", "hyper": {}, "epochs": 6})
    why = "one_step_adv has no attack steps, of which it could make more"
    ended = f"training collapsed in epoch 4, and {why}"
    assert (run.epoch, run.best, run.ended) == (2, 2, ended)
    assert said[-1] == f"{FELL} in epoch 4: back to epoch 2, the best, where the run ends, as {why}"
    assert not any("WARNING" in text for text in said)  # whose advice is followed already
    best, last = checkpoint.load(tmp_path / "best.pt"), checkpoint.load(tmp_path)
    assert same(best["model"], last["model"]) and same(weights(run.model), best["model"])
    assert resume(tmp_path, splits=splits()).epoch == 2


def test_a_run_that_collapses_again_and_again_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.6, *[0.1] * 10])
    run, _ = trained(tmp_path, **ROLLBACK)
    assert (run.epoch, len(run.rescues), run.method.in_use()["steps"]) == (1, 4, 4)
    assert [each["changed"].get("steps") for each in run.rescues] == [[1, 2], [2, 3], [3, 4], None]
    assert run.ended == "training collapsed in epoch 2, and 3 stronger attacks have not helped"


def test_a_collapse_within_an_epoch_is_taken_back_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.5] * 8)
    read, steps = segment.Segment.read, []

    def inverted(self: segment.Segment, numbers: list[float]) -> None:
        read(self, numbers)
        steps.append(self._run.step)
        if self._run.step == 7 and not self._run.rescues:
            self.inverted = 0.1

    monkeypatch.setattr(segment.Segment, "read", inverted)
    run, said = trained(tmp_path, **ROLLBACK)
    assert run.rescues[0]["epoch"] == 3 and run.rescues[0]["back_to"] == run.best == 1
    assert steps[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 3]  # not to the end of the epoch, and back to that of the first
    sign = "the network learned its own attack: it is right at one-step adversaries and wrong"
    assert any(text.startswith(sign) for text in said)
    assert run.epoch == 4


def test_nothing_to_go_back_to_is_a_warning_where_a_run_has_just_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(watch, "fits_its_own_attack_only", lambda row: row.get("epoch") == 1)
    monkeypatch.setattr(watch, "probe", lambda run: {"probe": 0.1})
    run, said = trained(tmp_path, **ROLLBACK | {"epochs": 2, "probe_size": 8})
    assert "there is nothing to go back to, as no epoch before was validated: training goes on" in said
    assert run.epoch == 2 and not run.rescues


def test_rollback_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="on_collapse='rollback' has nothing to go back to without best.pt: give"):
        trained(None, **ROLLBACK)


def test_methods_beside_are_never_rescued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}
    train = engine.train

    def look(config: TrainConfig, **how: Any) -> Run:
        seen[config.method] = config.on_collapse
        return train(config, **how)

    monkeypatch.setattr("atlas_train.compare.train", look)
    config = TrainConfig(**ROLLBACK | {"epochs": 1, "beside": ("one_step_adv",), "out_dir": str(tmp_path)})
    compare(config, splits=splits(), show="silent", say=lambda text: None)
    assert seen == {"adv": "rollback", "one_step_adv": "warn"}


# --- real ones: a step far too large


def dead(folder: Path, **settings: Any) -> tuple[Any, list[str]]:
    """A learning rate that rises until the network is dead."""
    lines: list[str] = []
    config = TrainConfig(
        **ROLLBACK | {"lr": 0.9, "cyclic_peak": 0.97, "epochs": 6, "eps": 0.05, "out_dir": str(folder)} | settings
    )
    (result,) = compare(config, splits=splits(train=96), show="silent", say=lines.append).values()
    return result, lines[-2].splitlines()


@pytest.mark.parametrize("on_collapse", ["stop", "rollback"])
def test_a_network_that_dies_ends_with_usable_weights(on_collapse: str, tmp_path: Path) -> None:
    result, table = dead(tmp_path, on_collapse=on_collapse, method="one_step_adv", hyper={})
    folder = tmp_path / "one_step_adv"
    (found,) = evaluate_checkpoint(folder / "best.pt", splits=splits(train=96), say=lambda text: None).values()
    assert found.evaluation.pgd > 0.6
    if on_collapse == "rollback":
        assert result.evaluation.pgd == found.evaluation.pgd and result.rescues
        assert any(line.startswith("one_step_adv was rescued: it collapsed in epoch") for line in table)
    else:
        assert result.evaluation.pgd < 0.45 and result.collapses
        assert any(line.startswith("one_step_adv collapsed in epoch") for line in table)
        assert any("best (epoch" in line for line in table)


def test_weights_that_are_not_finite_are_taken_back_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(monkeypatch, [0.3, 0.6, 0.5, 0.4])
    step = engine.OptimizerDescent.step

    def burst(descent: engine.OptimizerDescent) -> None:
        step(descent)
        if next(count) == 10:
            with torch.no_grad():
                descent._optimizer.param_groups[0]["params"][0].fill_(float("inf"))

    count = iter(range(1000))
    monkeypatch.setattr(engine.OptimizerDescent, "step", burst)
    run, said = trained(tmp_path, **ROLLBACK)
    assert run.ended == "training collapsed in epoch 4, and a stronger attack does not help against that"
    assert (run.epoch, run.best) == (2, 2) and said[-1].startswith(
        "a loss or a weight that is not finite in epoch 4: back to"
    )
    assert same(weights(run.model), checkpoint.load(tmp_path / "best.pt")["model"])
    assert run.rescues[0]["changed"] == {}


def test_a_wide_start_gives_way_to_two_steps() -> None:
    """It is of one step: the stronger attack starts in the ball."""
    hyper: dict[str, Any] = {"wide_start": 2.0, "start_noise": "wide", "local": "start", "steps": 1}
    settings = TrainConfig(**ROLLBACK | {"method": "atlas", "hyper": hyper})
    run = engine.prepare(settings, splits(), None, None)
    eps = run.config.eps
    changed = rescue._stronger(run)
    narrow = {"wide_start": [2.0, 0.0], "start_noise": ["wide", "uniform"]}
    assert changed == {"steps": [1, 2], "step_size": [eps, 1.25 * eps / 2]} | narrow
    stronger = rescue.with_attack(run.config, changed).build_method()
    assert (stronger.steps, stronger.wide_start, stronger.step_size) == (2, 0.0, 1.25 * eps / 2)  # type: ignore[attr-defined]


def test_a_run_with_a_wide_start_is_rescued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What changes is a name too, which the checkpoint, the results and what is said must hold."""
    script(monkeypatch, SERIES)
    lines: list[str] = []
    hyper = {"start_noise": "wide", "local": "start"}
    settings = ROLLBACK | {"method": "atlas", "hyper": hyper, "epochs": 5, "out_dir": str(tmp_path)}
    (result,) = compare(TrainConfig(**settings), splits=splits(), show="silent", say=lines.append).values()
    assert result.rescues[0]["changed"]["start_noise"] == ["wide", "uniform"]
    assert "went back to epoch 2, to go on with steps 2, " in lines[-2] and "start_noise uniform" in lines[-2]
    assert resume_compare(tmp_path / "atlas", splits=splits(), show="silent", say=lines.append) == {"atlas": result}
