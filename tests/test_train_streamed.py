"""Pictures that stream: their batches are those of pictures in memory, whoever decodes them."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_train import data, engine, progress, saving
from atlas_train.config import TrainConfig
from atlas_train.data import Batch, Batches, Images, Pictures, Streamed, folder, identity, in_order, pictures
from atlas_train.data.pictures import Unreadable
from atlas_train.data.streamed import DRAWS, RATIO, SCALE, Reader, part_of, usual_workers
from atlas_train.evaluate import evaluate
from killed import differences
from resume import in_step
from tiny_runs import TINY, Lines

Image = pytest.importorskip("PIL.Image")
HOW: dict[str, Any] = {"shuffle": True, "seed": 3, "device": "cpu"}
SETTINGS: dict[str, Any] = {
    **TINY, "method": "fgsm_pgi", "dataset": "folder", "image_size": 8, "grey": True, "augment": True, "epochs": 2,
    "batch_size": 8, "probe_size": 4, "val_size": 6, "model": "digits_net", "workers": 0, "crop": "shift",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 14 training and 4 test pictures, of several sizes."""
    made, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), "abc"):
        (made / split / name).mkdir(parents=True)
        for number in range(14 if split == "train" else 4):
            pixels = rng.integers(0, 100, (10 + number % 3, 12, 3), dtype=np.uint8)
            pixels[:, :, "abc".index(name)] += 150
            Image.fromarray(pixels).save(made / split / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return made


@pytest.fixture
def few(root: Path) -> Pictures:
    return folder.find(root, image_size=8).train


def equal(a: Iterator[Batch], b: Iterator[Batch]) -> bool:
    return all(all(map(torch.equal, one, other)) for one, other in itertools.zip_longest(a, b))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_pictures_in_memory(few: Pictures, workers: int) -> None:
    how = HOW | {"augment": True, "channels_last": True}
    streamed, resident = Streamed(few, 9, workers=workers, **how), Batches(few.resident(), 9, **how)
    before = torch.get_rng_state()
    for epoch, first in ((0, 0), (3, 2), (3, 5), (1, 4)):
        for batches in (streamed, resident):
            batches.set_epoch(epoch)
        assert len(streamed) == len(resident) == 5
        assert equal(streamed.starting(first), resident.starting(first))
    next(iter(streamed))  # an epoch that is broken off leaves nothing behind
    assert equal(iter(streamed), iter(resident))
    assert torch.equal(torch.get_rng_state(), before)  # of torch's generator, which networks draw from
    streamed.close()
    assert not multiprocessing.active_children()


def test_processes_share_each_batch(few: Pictures) -> None:
    how = HOW | {"augment": True, "crop": "resized", "workers": 0}
    whole = Streamed(few, 9, **how)
    parts = [Streamed(few, 9, place=(rank, 2), **how) for rank in range(2)]
    for batch, *dealt in zip(whole, *parts, strict=True):
        assert [len(part.y) for part in dealt] == [len(batch.y) // 2, len(batch.y) - len(batch.y) // 2]
        assert all(torch.equal(torch.cat(rows), all_rows) for *rows, all_rows in zip(*dealt, batch, strict=True))
        assert dealt[0].deal.total(dealt[0].y) == len(batch.y)


def test_a_resized_crop_goes_by_seed_epoch_and_picture(few: Pictures) -> None:
    def epoch(number: int, seed: int = 3, **how: Any) -> dict[int, torch.Tensor]:
        batches = Streamed(few, **HOW | {"augment": True, "crop": "resized", "seed": seed, "workers": 0} | how)
        batches.set_epoch(number)
        return {int(row): x for batch in batches for row, x in zip(batch.ids, batch.x, strict=True)}

    first = epoch(1, batch_size=9, workers=2)
    for same in (epoch(1, batch_size=9), epoch(1, batch_size=4)):
        assert all(torch.equal(first[row], same[row]) for row in range(len(few)))
    for other in (epoch(2, batch_size=9), epoch(1, seed=4, batch_size=9), epoch(1, batch_size=9, crop="shift")):
        assert sum(torch.equal(first[row], other[row]) for row in range(len(few))) < 3


def test_parts_are_of_random_size_and_shape() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([part_of((500, 375), rng) for _ in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 500).all() and (boxes[:, 3] <= 375).all()
    share, ratio = wide * high / (500 * 375), wide / high
    assert SCALE[0] * 0.97 < share.min() < 0.1 and 0.9 < share.max() <= 1
    assert RATIO[0] * 0.97 < ratio.min() < 0.77 and 1.3 < ratio.max() < RATIO[1] * 1.03
    assert 0.4 < share.mean() < 0.55
    square = np.array([part_of((400, 400), rng) for _ in range(1000)])
    assert abs(np.log((square[:, 2] - square[:, 0]) / (square[:, 3] - square[:, 1])).mean()) < 0.02

    class Largest:
        """Draws what never fits into a strip."""

        def uniform(self, low: float, high: float) -> float:
            draws.append(high)
            return high

    draws: list[float] = []
    assert part_of((90, 9), Largest()) == (39, 0, 51, 9)  # type: ignore[arg-type]
    assert part_of((9, 90), Largest()) == (0, 39, 9, 51)  # type: ignore[arg-type]
    assert len(draws) == 2 * 2 * DRAWS


def test_batches_that_are_passed_over_are_not_decoded(few: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    picture = Reader._picture
    monkeypatch.setattr(Reader, "_picture", lambda self, row, epoch: (rows.append(row), picture(self, row, epoch))[1])
    batches = Streamed(few, 9, workers=0, **HOW)
    rest = [batch.ids for batch in batches.starting(3)]
    assert rows == torch.cat(rest).tolist() and len(rows) == len(few) - 27


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(root: Path, tmp_path: Path, few: Pictures, workers: int) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((root / "train/a/0.jpg").read_bytes()[:200])
    paths = [*few.paths[:4], str(bad), *few.paths[5:]]
    batches = Streamed(dataclasses.replace(few, paths=paths), 9, workers=workers, **HOW)
    with pytest.raises(Unreadable, match=r"bad.jpg is damaged.*Mend or delete it, or .*--skip-unreadable"):
        list(batches)


def test_nothing_is_left_of_a_killed_process(few: Pictures) -> None:
    def shared() -> set[str]:
        return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()

    before, (read, write) = shared(), os.pipe()
    child = os.fork()
    if not child:
        batches = iter(Streamed(few, 9, workers=2, **HOW))
        next(batches)
        os.write(write, " ".join(str(each.pid) for each in multiprocessing.active_children()).encode())
        time.sleep(60)
        os._exit(0)
    workers = [int(pid) for pid in os.read(read, 100).split()]
    for each in workers:  # a terminal sends its signals to all: the process that trains is the one to end them
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(each, number)
    time.sleep(0.1)
    assert len(workers) == 2 and all(map(_runs, workers))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 60
    while any(map(_runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not {name for name in shared() - before if name.startswith("torch_")}


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_in_order_reads_in_parts(few: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    read = Pictures.read
    monkeypatch.setattr(Pictures, "read", lambda self, row: (rows.append(row), read(self, row))[1])
    resident = few.resident()
    rows.clear()
    batches = in_order(few, 10, device="cpu", channels_last=True, dtype=torch.float64)
    x, y, ids = next(batches)
    assert len(rows) <= 20 and x.is_contiguous(memory_format=torch.channels_last) and ids.tolist() == list(range(10))
    batches.close()  # type: ignore[attr-defined]
    for size in (10, 14, 100):
        assert equal(in_order(few, size, device="cpu"), in_order(resident, size, device="cpu"))


@pytest.mark.parametrize("size", [None, 7])
def test_evaluation_is_that_of_pictures_in_memory(root: Path, size: int | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 3))
    test = folder.find(root, image_size=8).test
    found = [evaluate(model, part, 0.01, size=size, steps=2, batch_size=5) for part in (test, test.resident())]
    assert dataclasses.replace(found[0], seconds=0) == dataclasses.replace(found[1], seconds=0)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    a, b = (evaluate(model, part, 0.01, attacks="fgsm", mean=mean, std=std) for part in (test, test.resident()))
    assert a.samples_csv() == b.samples_csv() and a.table().partition(" s")[0] == b.table().partition(" s")[0]


def test_a_run_has_the_bits_of_one_in_memory_wherever_it_is_stopped(root: Path, tmp_path: Path) -> None:
    config = TrainConfig(**SETTINGS | {"workers": 1}, data_dir=str(root), stream=True)
    resident = engine.train(dataclasses.replace(config, stream=False, workers=None), folder=tmp_path / "resident")
    with in_step(5, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(KeyboardInterrupt) as stop:
        engine.train(config, folder=tmp_path / "streamed")
    assert stop.tb and not multiprocessing.active_children()
    run = engine.train(dataclasses.replace(config, resume=str(tmp_path / "streamed"), workers=0))
    assert isinstance(run.splits.train, Pictures) and isinstance(resident.splits.train, Images)
    assert all(0 < row.pop("data_wait") < 1 for row in run.history)
    assert "data_wait" in (tmp_path / "streamed" / saving.LOG).read_text()
    differ = {each.partition(": ")[2] for each in differences(tmp_path / "resident", tmp_path / "streamed")}
    assert differ == {"history", "validation"}  # the second by files or by pixels
    drop = {"seconds", "images_per_s"}
    rows = [[{key: v for key, v in row.items() if key not in drop} for row in each.history] for each in (run, resident)]
    assert rows[0] == rows[1]
    lines = Lines()
    again = dataclasses.replace(config, resume=str(tmp_path / "streamed"), stream=False, workers=None, epochs=3)
    engine.train(again, display=lines)
    assert any("with stream False (before: True)" in text for text in lines.said)


def test_what_is_shown_and_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"epoch": 1, "epochs": 1, "step": 1, "images_per_s": 1.0, "eta": 1.0, "loss": 1.0}
    assert "data wait 4 %" in progress.describe(row | {"data_wait": 0.04})[1]
    assert "data wait" not in progress.describe(row)[1]
    lines = Lines()
    config = TrainConfig(**SETTINGS | {"epochs": 1, "method": "standard", "workers": 3}, data_dir=str(root))
    engine.train(config, display=lines)
    assert "WARNING: workers=3 changes nothing, as the images are kept in memory" in lines.said
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(40), raising=False)
    assert usual_workers() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1), raising=False)
    assert usual_workers() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": False, "crop": "resized"}, "crop: 'resized' cuts pictures as they lie in their files"),
        ({"extra_data": "more.npz"}, "extra_data: extra images are for data sets that are kept in memory"),
        ({"method": "stored_adv", "crop": "resized"}, "crop: stored_adv shifts the images itself"),
        ({"dataset": "digits", "image_size": None, "grey": False}, "stream is for pictures in files"),
        ({"workers": -1}, "workers must be an integer >= 0, got -1"),
        ({"crop": "cut"}, "crop must be one of 'shift', 'resized', got 'cut'"),
    ],
)
def test_what_cannot_be_had_is_refused(
    root: Path, tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("more.npz", image=np.zeros((9, 8, 8, 1), np.uint8), label=np.zeros(9, np.int64))
    with pytest.raises(ValueError, match=message):
        engine.train(TrainConfig(**{**SETTINGS, "stream": True, "data_dir": str(root), **settings}))


def test_a_folder_streams_where_it_is_large(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = data.load("folder", root, image_size=8)
    monkeypatch.setattr(folder, "RESIDENT", (3 * 14 + 3 * 4) * 3 * 64 - 1)
    streamed = data.load("folder", root, image_size=8)
    assert isinstance(resident.train, Images) and isinstance(streamed.train, Pictures)
    assert isinstance(data.load("folder", root, image_size=8, stream=False).test, Images)
    assert identity.record(streamed) == identity.record(resident)
    assert streamed.train.mean_std() == resident.train.mean_std()
    monkeypatch.setattr(pictures, "MEASURED", 6)
    measured = torch.tensor(streamed.train.mean_std()) - torch.tensor(resident.train.mean_std())
    assert 0 < measured.abs().max() < 0.05


def test_skipping_looks_at_every_picture_first(root: Path, tmp_path: Path) -> None:
    for split, name, number in itertools.product(("train", "test"), "ab", range(2)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        source = (root / split / name / f"{2 * number}.jpg").read_bytes()
        cut = 200 if (split, name, number) == ("train", "b", 1) else len(source)
        (tmp_path / split / name / f"{number}.jpg").write_bytes(source[:cut])
    splits = data.load("folder", tmp_path, image_size=8, stream=True, skip_unreadable=True)
    assert isinstance(splits.train, Pictures) and len(splits.train) == 3 and len(splits.test) == 4
    assert any("1.jpg" in note for note in splits.notes)
