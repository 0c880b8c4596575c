"""The study of ATLAS: runs that go on where they were, rows made once, intervals on known data, the queue's time."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from atlas_train import checkpoint, watch
from atlas_train.autoattack import autoattack
from atlas_train.data import Images, held_out
from atlas_train.evaluate import evaluating
from studies import atlas, bootstrap, diagnosis, judged, plan, report, rows, run_queue, work
from studies.plan import Bed, Planned
from studies.report import FAILS, GPU, HOLDS, NOT_RUN, OPEN, AtLeast, Setting, Study, Survives
from worker import splits_of

TINY = Bed({"dataset": "digits", "train_size": 64, "val_size": 20, "augment": False, "threads": 1, "probe_size": 20},
           64, 30, 25, 32)  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> work.Places:
    monkeypatch.setitem(plan.BEDS, "tiny", TINY)
    monkeypatch.setattr(work, "commit_here", lambda: "c0ffee")
    monkeypatch.setattr(judged, "PART", 12)
    return work.Places(tmp_path / "results", tmp_path / "runs", device="cpu")


def tiny(recipe: str = "start", judge: plan.Judge = "screen", epochs: int = 3) -> Planned:
    return Planned("tiny", epochs, "0.2", recipe, 0, judge)


def quick(model: nn.Module, images: Any, eps: float, **how: Any) -> tuple[torch.Tensor, None]:
    """In place of AutoAttack, which takes a second: right on the image."""
    with evaluating(model), torch.no_grad():
        return model(images.images.float() / 255).argmax(1) == images.labels, None


def test_a_killed_study_goes_on_and_repeats_nothing(
    places: work.Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged, "verdicts", quick)
    first, second = tiny(), tiny("adv-1")
    assert not work.finish(first, places, until=0.0)  # the time is over: it stops after a whole epoch
    folder = places.runs / first.folder
    assert checkpoint.load(folder)["epoch"] == 1 and not places.results.exists()
    real, calls = judged._verdicts, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(judged, "_verdicts", killed)
    with pytest.raises(KeyboardInterrupt):
        work.finish(first, places)
    assert checkpoint.load(folder)["epoch"] == 3 and not places.results.exists()
    assert work.finish(first, places) and work.finish(second, places)
    made = rows.read(places.results / work.ROWS)
    assert [row["name"] for row in made] == [first.name, second.name]
    # Three parts of 30 images, the first judged once; the last weights see as many images as a part has.
    assert sorted({len(args[2]) for args in calls}) == [6, 12] and len({tuple(args[2]) for args in calls}) == 4
    assert work.finish(first, places) and len(rows.read(places.results / work.ROWS)) == 2
    whole = work.Places(tmp_path / "other", tmp_path / "other-runs", device="cpu")
    assert work.finish(first, whole)
    names = [each.results / rows.read(each.results / work.ROWS)[0]["verdicts"] for each in (places, whole)]
    one, other = map(judged.load, names)
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    row = made[0]
    assert row["pgd"] <= row["clean"] == one["clean"].mean() == row["aa"] and row["images"] == 30 == len(one["ids"])
    assert round(row["passes"]) == 7 and row["commit"] == "c0ffee" and row["epochs_done"] == 3 and row["memory"] > 0
    assert json.loads(row["settings"])["averaging"] == "ema" and json.loads(row["given"])["hyper"]["step_size"] == 0.2


def test_verdicts_are_those_of_autoattack() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), splits_of("digits", None).test.subset(40, 0)
    right = model(images.images.float() / 255).argmax(1)
    images = Images(images.images, torch.where(torch.arange(40) < 30, right, images.labels))
    ids = np.arange(5, 35)
    seen = judged._verdicts(model, images, ids, 0.02, "apgd")
    few = Images(images.images[5:35], images.labels[5:35])
    found = autoattack(model, few, 0.02, 30, version="apgd")
    assert seen["aa"].mean() == pytest.approx(found.accuracy) and 0 < found.accuracy < seen["clean"].mean()
    assert not (seen["aa"] & ~seen["clean"]).any() and not (seen["pgd"] & ~seen["clean"]).any()


def test_a_collapse_ends_the_run_and_its_row_says_so(places: work.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "verdicts", quick)
    monkeypatch.setattr(watch, "probe", lambda run: {"probe": -1.0, "probe_10": -1.0})
    assert work.finish(tiny("adv-1"), places)
    (row,) = rows.read(places.results / work.ROWS)
    assert row["epochs_done"] == 1 and row["ended"] == "training collapsed in epoch 1"
    assert row["collapses"].startswith("1: the network learned its own attack: PGD-5 accuracy") and report.collapsed(
        row
    )


def test_a_loss_that_is_not_finite_has_a_row(places: work.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.RECIPES, "wild", {"method": "one_step_adv", "lr": 1e30, "optimizer": "sgd"})
    assert work.finish(tiny("wild"), places) and work.is_done(tiny("wild"), places.results)
    (row,) = rows.read(places.results / work.ROWS)
    assert "is not finite" in row["ended"] and row["aa"] is None and report.collapsed(row)


def test_who_judges(places: work.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = splits_of("digits", None)
    ids, images = judged.judging(tiny(), splits)
    train, held = held_out.rows(splits.train.labels.numpy(), 64, 20, 0)
    assert images is splits.train and len(ids) == 30 and set(held) <= set(ids) and not set(train) & set(ids)
    kept, validation = held_out.split(splits.train, 64, 20, 0)
    assert torch.equal(splits.train.images[held], validation.images)
    assert torch.equal(splits.train.images[train], kept.images)
    ids, images = judged.judging(tiny(judge="test"), splits)
    assert images is splits.test and len(ids) == 25
    # At the end the kept run is judged once more, by AutoAttack on test images, and not trained again.
    asked: list[Any] = []
    monkeypatch.setattr(judged, "verdicts", lambda *args, **how: asked.append(how["version"]) or quick(*args, **how))
    assert work.finish(tiny(epochs=1), places)
    monkeypatch.setattr("atlas_train.engine.train_epoch", lambda *args: pytest.fail("it is trained again"))
    assert work.finish(tiny(judge="test", epochs=1), places)
    assert set(asked) == {"apgd", "standard"} and asked[-1] == "standard"
    screened, tested = rows.read(places.results / work.ROWS)
    assert (screened["attack"], tested["attack"]) == ("apgd", "standard")
    assert (screened["images"], tested["images"]) == (30, 25)


# --- rows


def row(recipe: str = "start", seed: int = 0, bed: str = "cpu", judge: plan.Judge = "screen", **more: Any) -> rows.Row:
    planned = Planned(bed, 15, "16/255", recipe, seed, judge)
    own = {"name": planned.name, "bed": bed, "recipe": recipe, "epochs": 15, "eps": "16/255", "seed": seed}
    known = (
        {name: None for name in rows.COLUMNS}
        | own
        | {"judge": judge, "given": planned.given, "device": "cpu", "cpu": "one"}
    )
    return known | {"aa": 0.2, "clean": 0.4, "pgd": 0.25, "last_aa": 0.2, "ended": 'a "quoted", text'} | more


def _append(path: Path, seed: int) -> None:
    for recipe in ("start", "adv-1", "liet"):
        rows.append(path, row(recipe, seed))


def test_rows_of_several_processes_are_whole_and_there_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, seed)) for seed in (0, 1, 2, 0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    read = rows.read(path)
    assert len(read) == 9 == len({(each["recipe"], each["seed"]) for each in read})
    assert read[0] == row(read[0]["recipe"], read[0]["seed"]) and not list(tmp_path.glob("*.tmp"))
    before = path.read_bytes()
    assert not rows.append(path, row("start", 0, aa=0.9)) and path.read_bytes() == before
    assert rows.append(path, row("start", 0, given="another"))  # a recipe that was changed is another run
    with pytest.raises(ValueError, match="a row has no colour"):
        rows.append(path, row() | {"colour": 1})


def test_rows_made_elsewhere_are_added_once(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    rows.append(here / work.ROWS, row("start"))
    rows.append(there / work.ROWS, row("start", aa=0.9, verdicts="verdicts/old.npz"))  # which is not even there
    rows.append(there / work.ROWS, row("liet", verdicts="verdicts/new.npz"))
    judged.save(there / "verdicts" / "new.npz", {"ids": np.arange(3)})
    assert [rows.merge(there, here), rows.merge(there, here)] == [1, 0]
    assert [(each["recipe"], each["aa"]) for each in rows.read(here / work.ROWS)] == [("start", 0.2), ("liet", 0.2)]
    assert judged.load(here / "verdicts" / "new.npz")["ids"].tolist() == [0, 1, 2]


# --- intervals


def test_an_interval_of_one_network_is_that_of_the_mean() -> None:
    right = np.arange(5000) % 5 == 0
    found = bootstrap.accuracy({0: (np.arange(5000), right)})
    expected = 1.96 * math.sqrt(0.2 * 0.8 / 5000)
    assert found.mean == pytest.approx(0.2) and (found.images, found.seeds) == (5000, 1)
    assert found.high - 0.2 == pytest.approx(expected, rel=0.1) and 0.2 - found.low == pytest.approx(expected, rel=0.1)


def test_a_difference_is_paired_by_image_and_seed() -> None:
    rng = np.random.default_rng(0)
    ids, base = np.arange(0, 8000, 2), rng.random(4000) < 0.5
    better = base | (np.arange(4000) % 10 == 0)  # right where the other is, and on 5 % more
    gain = better.mean() - base.mean()
    more = np.concatenate([ids, [9001]]), np.append(better, False)  # an image that the other has not seen
    found = bootstrap.difference({0: more, 1: more}, {0: (ids, base)})
    assert found.mean == pytest.approx(gain) and (found.images, found.seeds) == (4000, 1)
    assert found.high - gain == pytest.approx(1.96 * math.sqrt(gain * (1 - gain) / 4000), rel=0.12)
    assert found.low > 0
    assert bootstrap.Interval(0.05, -0.0123, 0.1, 9, 1).points() == "+5.0 [-1.2, +10.0]"
    assert bootstrap.difference({0: more}, {1: more}) is None
    assert bootstrap.difference({0: more}, {0: more}).high == 0


def test_seeds_widen_an_interval() -> None:
    ids, none = np.arange(1000), np.zeros(1000, bool)
    share = {0: 0, 1: 100, 2: 200}  # images that are right: 0, 10 and 20 %
    of = {seed: (ids, ids < count) for seed, count in share.items()}
    found = bootstrap.difference(of, {seed: (ids, none) for seed in of})
    assert found.mean == pytest.approx(0.1) and found.seeds == 3
    assert found.low < 0.01 and found.high > 0.19  # of images alone it would be 0.08 to 0.12


# --- the queue


def note(path: Path, sleep: float, planned: Planned, until: float) -> None:
    with path.open("a") as file:
        file.write(f"{planned.seed}\n")
    time.sleep(sleep)


def test_the_queue_runs_in_its_order_until_its_time_is_over(tmp_path: Path) -> None:
    path, begun = tmp_path / "done", list[int]()

    def waiting() -> Iterator[Planned]:
        for seed in range(20):
            begun.append(seed)
            yield Planned("cpu", 15, "16/255", "start", seed)

    path.touch()
    assert run_queue.run_all(waiting(), partial(note, path, 0.15), 1.0, 1, "fork") == []
    assert begun == list(range(len(begun))) and 1 <= len(begun) < 8
    done = [int(line) for line in path.read_text().split()]
    assert done in (begun, begun[:-1])  # on a busy machine the last is ended before it has noted anything
    begun.clear()
    started = time.monotonic()
    assert run_queue.run_all(waiting(), partial(note, path, 60.0), 0.5, 3, "fork") == []
    assert time.monotonic() - started < 30 and begun == list(range(len(begun))) and 1 <= len(begun) <= 3


def broken(planned: Planned, until: float) -> None:
    raise SystemExit(3 if planned.seed == 0 else 0)


def test_a_run_that_fails_leaves_the_others() -> None:
    waiting = [Planned("cpu", 15, "16/255", "start", seed) for seed in range(3)]
    failed = run_queue.run_all(waiting, broken, 30.0, 2, "fork")
    assert failed == ["cpu-15e-16of255-start-s0 ended with status 3"]


def test_what_is_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued = plan.queue()
    assert [each.name for each in queued[:5]] == [
        f"full-30e-8of255-{recipe}-s0" for recipe in ("start", "start-constant-w0", "liet", "adv-1", "adv-2")
    ]
    assert len(set(queued)) == len(queued) and all(plan.named(each.name, each.judge) == each for each in queued)
    configs = [each.config() for each in queued if each.seed == 0]  # each a TrainConfig
    assert all(config.on_collapse == "stop" and config.label_smoothing in (0.0, 0.4, 0.6) for config in configs)
    assert {each.eps for each in queued if each.bed == "full" and each.recipe == "start"} == set(report.EPS)
    assert plan.Planned("full", 100, "8/255", "start", 0).settings["ema_decay"] == pytest.approx(0.9995, abs=5e-5)
    rows.append(tmp_path / work.ROWS, row("start", 0))
    monkeypatch.setattr(work, "RESULTS", tmp_path)
    places = work.Places(tmp_path)
    left = list(run_queue.next_runs(queued, places, ["cpu", "full"], gpu=False))
    assert left == [each for each in queued if each.bed == "cpu" and each != Planned("cpu", 15, "16/255", "start", 0)]


def test_a_row_says_how_many_runs_shared_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(atlas, "finish", lambda planned, places, parallel: asked.append((planned.name, parallel)))
    atlas.main(["run", "cpu-15e-16of255-start-s0", "--parallel", "12"])
    assert asked == [("cpu-15e-16of255-start-s0", 12)]
    assert report._device({"device": "cpu", "cpu": "one", "parallel": 12}) == "one, 12 beside"


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    for text, reason in (("start", "write BED-EPOCHSe"), ("cpu-15e-16of255-stort-s0", "recipe: 'stort' is not known")):
        with pytest.raises(ValueError, match=reason):
            plan.named(text, "screen")
    for eps in ("8", "0"):
        with pytest.raises(ValueError, match=r"eps: must be in \(0, 1\)"):
            Planned("cpu", 15, eps, "start", 0)
    (tmp_path / "queue.json").write_text('[{"bed": "cpu", "recipe": ["start"]}]')
    with pytest.raises(ValueError, match="no recipe in an entry"):
        plan.queue(tmp_path / "queue.json")


# --- verdicts

CPU = Setting("cpu", 15, "16/255")


def study(folder: Path, shares: dict[str, float], seeds: int = 3, images: int = 4000, **of: dict[str, Any]) -> Study:
    """Rows of these robust accuracies, on images that are the same for all."""
    made = []
    for recipe, share in shares.items():
        for seed in range(seeds):
            ids = np.arange(images)
            right = ids % 1000 < round(1000 * share) + seed
            name = f"{recipe}-{share}-{seed}.npz"
            judged.save(folder / name, {"ids": ids, **dict.fromkeys(judged.MEASURES, right)})
            more = {"verdicts": name, "aa": right.mean(), "last_aa": right.mean(), "seconds": 10.0}
            made.append(row(recipe, seed, **more | of.get(recipe.replace("-", "_"), {})))
    return Study(made, folder)


def test_verdicts_on_differences(tmp_path: Path) -> None:
    at_least = AtLeast("", CPU, "start", "adv-2", 0.02)
    for share, verdict in ((0.30, HOLDS), (0.22, OPEN), (0.21, FAILS)):
        found = at_least.verdict(study(tmp_path, {"start": share, "adv-2": 0.20}))
        assert found[0] == verdict and "4,000 validation images, 3 seeds" in found[1], share
    assert at_least.verdict(study(tmp_path, {"start": 0.9, "adv-2": 0.20}, seeds=2))[0] == OPEN
    assert at_least.verdict(study(tmp_path, {"start": 0.9})) == (NOT_RUN, "-")
    assert AtLeast("", Setting("full", 30, "8/255"), "start", "adv-2").verdict(Study([], tmp_path))[0] == GPU
    timed = AtLeast("", CPU, "start", "adv-2", -0.01, time=0.4)
    for seconds, verdict in ((3.9, HOLDS), (4.1, FAILS)):
        made = study(tmp_path, {"start": 0.21, "adv-2": 0.20}, start={"seconds": seconds})
        assert timed.verdict(made)[0] == verdict
    longer = AtLeast("", CPU, "start", "adv-2", 0.02, epochs=20)  # in the other's own setting there is no row
    assert longer.verdict(study(tmp_path, {"start": 0.30, "adv-2": 0.20})) == (NOT_RUN, "-")
    elsewhere = study(tmp_path, {"start": 0.21, "adv-2": 0.20}, start={"device": "another", "seconds": 1.0})
    assert timed.verdict(elsewhere)[0] == OPEN


def test_verdicts_on_collapses(tmp_path: Path) -> None:
    survives = Survives("", CPU, "start", ("atlas", "adv-1"))
    falls = {"collapses": "6: the network learned its own attack: ..."}
    made = study(tmp_path, {"start": 0.2, "atlas": 0.2}, atlas=falls)
    assert survives.verdict(made) == (HOLDS, "start 0 of 3, atlas 3 of 3")
    assert survives.verdict(study(tmp_path, {"start": 0.2, "atlas": 0.2}))[0] == OPEN  # nothing collapses there
    unseen = study(tmp_path, {"start": 0.2, "adv-1": 0.2}, start={"last_aa": 0.05}, adv_1=falls)
    assert survives.verdict(unseen)[0] == FAILS  # a collapse without a sign
    assert survives.verdict(study(tmp_path, {"start": 0.2, "atlas": 0.2}, seeds=1, atlas=falls))[0] == OPEN
    assert survives.verdict(study(tmp_path, {"start": 0.2}))[0] == NOT_RUN


def test_each_figure_can_be_decided_by_the_queue() -> None:
    """Of three seeds each; and the default has its own lines beside those of the centre, on a CPU and at full scale."""
    queued = plan.queue()

    def three(setting: Setting, recipe: str) -> bool:
        found = {each.seed for each in queued if (each.bed, each.epochs, each.eps, each.recipe) == (
            *vars(setting).values(), recipe)}  # fmt: skip
        return {0, 1, 2} <= found

    figures = list(report.figures())
    for figure in figures:
        if isinstance(figure, AtLeast):
            assert all(three(*each) for each in figure.pair), figure
        else:
            assert three(figure.setting, figure.one) and any(three(figure.setting, foil) for foil in figure.foils), (
                figure
            )
    for one in ("start", report.DEFAULT):
        own = [figure for figure in figures if figure.one == one]
        lasting = {(f.setting.bed, f.setting.epochs, f.setting.eps) for f in own if isinstance(f, Survives)}
        wanted = {("full", epochs, eps) for epochs in (30, 60) for eps in ("8/255", "12/255")}
        assert lasting >= wanted | {("cpu", 30, "16/255"), ("cpu", 60, "16/255")}
        for rival in ("adv-2", "liet", "adv-10", "adv-1"):
            beds = {f.setting.bed for f in own if isinstance(f, AtLeast) and f.other == rival}
            assert beds >= {"cpu", "full"}


def test_verdicts_on_speedruns(tmp_path: Path) -> None:
    made, figure = Study([], tmp_path / "atlas-study"), "45.2 % (42.1 to 48.3, 95 %), slowest run 61.1 s"
    assert report.speedrun_verdict(made, 60) == (GPU, "-")
    for gpu, end, verdict in (
        ("A", f"{figure}: the accuracy is reached, the time is exceeded", FAILS),
        ("B", "1 of 3 networks trained, 1 attacked", OPEN),
        ("C", f"{figure}: reached", HOLDS),
    ):  # of several GPUs the best
        said = json.dumps({"verdict": f"target: AA 45 % in 60 s; {end}"})
        (tmp_path / f"NVIDIA-{gpu}-speedrun-60.json").write_text(said)
        assert report.speedrun_verdict(made, 60) == (verdict, end)


def test_tables_and_frontier(tmp_path: Path) -> None:
    falls = {"collapses": "6: the network learned its own attack: ..."}
    more = {"liet": {"clean": 0.3}, "adv_2": {"clean": 0.5}, "atlas": falls, "start": {"memory": 2**20}}
    made = study(tmp_path, {"start": 0.25, "atlas": 0.1, "adv-2": 0.2, "liet": 0.2}, **more)
    lines = {line[0]: line for line in report.table(made, CPU, "screen")}
    assert lines["start"][6].startswith("+5.0 [") and lines["adv-2"][6] == "-" and lines["start"][9] == "1"
    assert lines["atlas"][7] == "3 of 3 (epoch 6, 6, 6; own attack)" and lines["start"][7] == "0 of 3"
    assert report.frontier(made, CPU, "screen")[1:] == [
        ["adv-2", "50.0", "20.1", "none: on the frontier"],
        ["start", "40.0", "25.1", "none: on the frontier"],
        ["liet", "30.0", "20.1", "start, adv-2"],
    ]
    stale = Study([each | {"given": "{}"} for each in made.rows], tmp_path)
    assert report.table(stale, CPU, "screen")[1:] == []  # of recipes that were changed since
    assert "### " not in "".join(report.parts(made).values()) and "start" in report.parts(made)["tables"]


def test_the_page_is_as_its_rows_make_it() -> None:
    text = report.PAGE.read_text(encoding="utf-8")
    assert len(report.BLOCK.findall(text)) == text.count("<!-- begin") == text.count("<!-- end") == 5
    assert report.filled(text, Study.read()) == text, "run python benchmarks/studies/atlas.py report"


# --- diagnosis


def test_a_linear_network_is_the_same_all_over_the_ball() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x, y = 0.3 + 0.4 * torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    seen = diagnosis.look(model, x, y, 0.1)
    assert seen["alignment"] == pytest.approx(1, abs=1e-5)  # of two classes the gradient has one direction
    assert seen["loss image"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
    way = [seen[f"loss {name}"] for name in ("start", "start-adversary 0.25", "start-adversary 0.5", "adversary")]
    assert way == sorted(way) and way[0] < way[-1] and len(seen) == 1 + 2 * 13


def test_a_run_is_looked_at_after_each_epoch_and_goes_on(places: work.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = places.results / "diagnosis.csv", diagnosis.look_at

    def killed(*args: Any) -> Any:
        if path.exists():
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(diagnosis, "look_at", killed)
    with pytest.raises(KeyboardInterrupt):
        diagnosis.diagnose(tiny(epochs=4), places, path)
    monkeypatch.setattr(diagnosis, "look_at", real)
    diagnosis.diagnose(tiny(epochs=4), places, path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [int(each["epoch"]) for each in found] == [1, 2, 3, 4]  # killed between the second's checkpoint and its look
    assert all(-1 <= float(each["alignment"]) <= 1 and each["adv"] for each in found)
