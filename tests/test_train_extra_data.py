"""Extra training images from a file: what batches hold, that a resumed run sees the same, and files that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import atlas_kernels as ak
from atlas_train import checkpoint, engine
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.data import Batches, DataSplits, Images, extra, with_extra
from atlas_train.noise import noise_keys
from atlas_train.stored import evaluate_checkpoint, resume
from tiny_runs import TINY, Lines, same, splits, weights


def images(n: int, seed: int, channels: int = 1) -> Images:
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, channels, 8, 8), generator=rng, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 4, (n,), generator=rng))


def write(path: Path, made: Images, **arrays: Any) -> Path:
    """In the published layout."""
    pixels = made.images.permute(0, 2, 3, 1).contiguous().numpy()
    np.savez_compressed(path, **{"image": pixels, "label": made.labels.numpy()} | arrays)
    return path


def config(path: Path | None, **changed: Any) -> TrainConfig:
    more = {"method": "standard", "epochs": 2, "extra_data": path and str(path), "extra_share": 0.25}
    return TrainConfig(**TINY | more | changed)


def batches(own: Images, others: Images, share: float = 0.3, size: int = 10, **how: Any) -> Batches:
    how = {"shuffle": True, "seed": 7, "device": "cpu", "extra": others, "extra_share": share, "drop_last": True} | how
    return Batches(own, size, **how)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_batch_takes_its_share(channels_last: bool, device: torch.device) -> None:
    own, others = images(64, 0, 3), images(200, 1, 3)
    made = batches(own, others, augment=True, channels_last=channels_last, device=device)
    assert len(made) == 6  # as many batches as without
    key, pixels = noise_keys(7, 0, 1)[0].to(device), {False: own.images.to(device), True: others.images.to(device)}
    for epoch in (0, 1):
        made.set_epoch(epoch)
        seen: list[int] = []
        for x, y, ids in made:
            assert x.shape == (10, 3, 8, 8) and ids.tolist()[:7] == [i for i in ids.tolist() if i < 64]
            assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            seen += ids.tolist()
            for row, number in enumerate(ids.tolist()):
                rows = torch.tensor([number % 64 if number < 64 else number - 64], device=device)
                one = {"key": key, "ids": torch.tensor([number], device=device), "draw": epoch}
                assert torch.equal(x[row], ak.augment(pixels[number >= 64], rows, **one)[0])
                assert y[row] == (own.labels[number] if number < 64 else others.labels[number - 64])
        mine = [number for number in seen if number < 64]
        assert len(mine) == len(set(mine)) == 42  # none twice in an epoch


def test_what_an_epoch_holds_depends_on_seed_and_epoch_alone() -> None:
    own, others = images(64, 0), images(200, 1)

    def ids(made: Batches) -> Iterator[list[int]]:
        return (batch.ids.tolist() for batch in made)

    first, second = batches(own, others), batches(own, others)
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append(list(ids(first)))
    second.set_epoch(2)
    assert list(ids(second)) == epochs[2] != epochs[1] != epochs[0]
    assert list(ids(batches(own, others, seed=8))) != epochs[0]
    drawn = [number for made in epochs for batch in made for number in batch if number >= 64]
    assert len(drawn) == 3 * 6 * 3 and len(set(drawn)) > 40 and max(drawn) < 264
    without = Batches(own, 10, shuffle=True, seed=7, device="cpu", drop_last=True)
    assert [b[3:] for b in ids(without)] == [b[:7] for b in epochs[0]]  # of the same order


def test_many_images_are_held_once(tmp_path: Path) -> None:
    """A file's images lie [N, H, W, C], and batches gather from there in either layout, to the same bits."""
    own, others = images(64, 0, 3), images(200, 1, 3)
    read = extra.read(write(tmp_path / "more.npz", others), others.shape)
    for channels_last in (False, True):
        lying, sliced = (
            batches(own, made, augment=True, channels_last=channels_last)
            for made in (read, Images(torch.cat([others.images] * 2, 1)[:, :3], others.labels))
        )
        assert lying._extra is not None and lying._extra.images.data_ptr() == read.images.data_ptr()
        assert all(torch.equal(a.x, b.x) for a, b in zip(lying, sliced, strict=True))


def test_a_share_of_nothing_or_all_is_refused() -> None:
    for share in (0.04, 0.96):
        with pytest.raises(ValueError, match=f"extra_share {share} of batches of 10 images is none or all of them"):
            batches(images(64, 0), images(200, 1), share)
    with pytest.raises(ValueError, match="extra_share must be a number > 0 and < 1, got 1"):
        config(None, extra_share=1)


@pytest.mark.parametrize("method", ["standard", "free", "mma"])  # the last two remember by place, and by sample
def test_a_resumed_run_comes_to_the_same_bits(method: str, tmp_path: Path) -> None:
    path = write(tmp_path / "more.npz", images(100, 1))
    settings = config(
        path, method=method, epochs=3, hyper={"mma": {"steps": 1}, "free": {"replays": 2}}.get(method, {})
    )
    lines = Lines()
    whole = engine.train(settings, splits=splits(), folder=tmp_path / "whole", display=lines)
    assert lines.said == ["25% of every batch from 100 extra images"]
    engine.train(settings, splits=splits(), folder=tmp_path / "part", on_epoch=lambda row: row["epoch"] == 1)
    assert checkpoint.load(tmp_path / "part")["config"]["extra_data"] == "more.npz"  # and not where it lies
    resumed = engine.train(replace(settings, resume=str(tmp_path / "part")), splits=splits())
    assert same(weights(resumed.model), weights(whole.model)) and same(resumed.memory, whole.memory)
    assert not same(
        weights(engine.train(replace(settings, extra_data=None), splits=splits()).model), weights(whole.model)
    )
    evaluate_checkpoint(tmp_path / "part", splits=splits(), say=lambda text: None)  # needs none


def test_a_run_goes_on_with_its_own_extra_images_alone(tmp_path: Path) -> None:
    path, other = write(tmp_path / "more.npz", images(100, 1)), write(tmp_path / "other.npz", images(100, 2))
    engine.train(config(path, epochs=1), splits=splits(), folder=tmp_path / "run")
    again = {"splits": splits(), "epochs": 2}
    with pytest.raises(
        FileNotFoundError, match="extra_data: there is no file more.npz; say where it lies .* to resume a run"
    ):
        resume(tmp_path / "run", **again)
    with pytest.raises(ValueError, match="other extra images. It has bars: .*100 extra images.*Give those it was made"):
        resume(tmp_path / "run", **again, extra_data=str(other))
    with pytest.raises(
        ValueError, match="other extra images. It has .*100 extra images.*you gave bars: 4 classes, 64 tr"
    ):
        resume(tmp_path / "run", **again, extra_data=None)
    with pytest.raises(ValueError, match="another extra_share: it has 0.25, you gave 0.5"):
        resume(tmp_path / "run", **again, extra_data=str(path), extra_share=0.5)
    assert resume(tmp_path / "run", **again, extra_data=str(path)).epoch == 2
    engine.train(config(None, epochs=1), splits=splits(), folder=tmp_path / "without")
    with pytest.raises(ValueError, match="other extra images.*or none if it had none"):
        resume(tmp_path / "without", **again, extra_data=str(path))


def test_a_comparison_reads_the_file_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = write(tmp_path / "more.npz", images(100, 1)), []
    read = extra.read
    monkeypatch.setattr(extra, "read", lambda *given: (reads.append(given), read(*given))[1])
    settings = config(path, method="one_step_adv", beside=("standard",), out_dir=str(tmp_path / "run"))
    compare(settings, splits=splits(), show="silent", say=lambda text: None)
    assert len(reads) == 1
    records = [checkpoint.load(tmp_path / "run" / name)["data"]["extra"] for name in ("one_step_adv", "standard")]
    assert records[0] == records[1] and records[0]["images"] == 100


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refused(match: str, path: Path, channels: int = 1) -> None:
        with pytest.raises(ValueError, match=match):
            with_extra(splits(channels=channels), path)

    good = images(6, 1)
    pixels = good.images.permute(0, 2, 3, 1).numpy()
    refused(r"image must be uint8 \[N, 8, 8, 3\], .* got uint8 \[6, 8, 8, 1\]", write(tmp_path / "a.npz", good), 3)
    for name, arrays, match in (
        ("b", {"image": good.images.numpy()}, r"image must be uint8 \[N, 8, 8, 1\], .* got uint8 \[6, 1, 8, 8\]"),
        ("c", {"image": pixels / 255}, "got float64"),
        ("d", {"label": good.labels.numpy()[:5]}, r"label must be integers \[6\], one for each image, got int64 \[5\]"),
        ("e", {"label": good.labels.numpy() / 2}, "label must be integers .* got float64"),
        ("f", {"label": np.full(6, 4)}, r"labels of the extra split must be in 0..3, got 4..4"),
        ("g", {"label": np.full(6, -1)}, r"labels of the extra split must be in 0..3, got -1..-1"),  # not labelled
        ("h", {"image": pixels[:0], "label": np.zeros(0, dtype=int)}, "holds no images"),
        ("i", {"label": np.array([None] * 6)}, "cannot be read as .npz: .*Object arrays"),
    ):
        refused(match, write(tmp_path / f"{name}.npz", good, **arrays))
    np.savez(tmp_path / "unlabelled.npz", image=pixels)
    refused(
        "must hold image and label, images with their classes; it has the arrays image", tmp_path / "unlabelled.npz"
    )
    np.save(tmp_path / "array.npy", pixels)
    refused("must hold image and label.*no arrays by name", tmp_path / "array.npy")
    (tmp_path / "text.npz").write_text("no archive")
    refused("cannot be read as .npz", tmp_path / "text.npz")
    whole = write(tmp_path / "whole.npz", good).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused("cannot be read as .npz", tmp_path / "cut.npz")
    with pytest.raises(ValueError, match=r"training images are \[1, 8, 8\], extra images \[3, 8, 8\]: give both one"):
        DataSplits("bars", splits().train, splits().test, 4, 0.1, extra=images(5, 1, 3))


@pytest.mark.parametrize("damage", ["data", "method of compression", "encrypted"])
def test_a_compressed_file_that_is_damaged_is_refused(damage: str, tmp_path: Path) -> None:
    """zipfile then raises zlib.error, NotImplementedError or RuntimeError."""
    path = write(tmp_path / "a.npz", images(40, 1))
    whole = bytearray(path.read_bytes())
    entry = whole.find(b"PK\x01\x02")  # in the list at the end
    place, value = {"data": (80, 0xFF), "method of compression": (entry + 10, 99), "encrypted": (entry + 8, 1)}[damage]
    whole[place] = value
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="extra_data .*a.npz cannot be read as .npz"):
        extra.read(path, (1, 8, 8))


def test_the_file_of_the_documentation_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert extra.read("more.npz", (3, 32, 32)).shape == (3, 32, 32)
