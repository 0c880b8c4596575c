"""Data of one's own as arrays, in .npz files, and as map-style data sets of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_train import checkpoint, cli, data
from atlas_train.config import TrainConfig, resolved
from atlas_train.data import from_arrays, from_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4
WHOLE = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


class Items(torch.utils.data.Dataset):
    """A map-style data set."""

    def __init__(self, images: Any, labels: Any = LABELS, classes: Any = None) -> None:
        self.items = [images, labels]
        self.classes = classes

    def __len__(self) -> int:
        return len(self.items[0])

    def __getitem__(self, row: int) -> Any:
        return self.items[0][row], self.items[1][row]


# ---- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        PIXELS, PIXELS[::-1][::-1], WHOLE, PIXELS / 255, (PIXELS / 255).astype(np.float16), WHOLE.double() / 255,
        PIXELS.transpose(0, 3, 1, 2), (PIXELS / 255).astype(">f4"),
    ],
)  # fmt: skip
def test_images_of_every_kind_become_uint8(images: Any) -> None:
    labels: Any
    for labels in (LABELS, LABELS.astype(np.uint8), torch.from_numpy(LABELS), LABELS.tolist(), LABELS[:, None]):
        made = from_arrays((images, labels), (images, labels))
        assert torch.equal(made.train.images, WHOLE) and torch.equal(made.test.labels, torch.from_numpy(LABELS))
    assert (made.num_classes, made.class_names, made.augment, made.notes) == (4, None, True, ())


def test_grey_images_have_one_channel_and_are_not_flipped() -> None:
    for images in (PIXELS[..., 0], PIXELS[..., :1], WHOLE[:, :1], WHOLE[:, 0].float() / 255):
        made = from_arrays((images, LABELS))
        assert made.train.shape == (1, 5, 6) and not made.augment


def test_a_fifth_is_held_out_where_there_is_no_test() -> None:
    made, again = (from_arrays((PIXELS, LABELS), name="flowers") for _ in range(2))
    assert made.test.labels.tolist() == again.test.labels.tolist() and torch.equal(made.test.images, again.test.images)
    assert sorted(made.test.labels.tolist()) == [0, 1, 2, 3] and len(made.train) == 16
    assert "flowers has no test images of its own: 20% of each class, 4 in all" in made.notes[0]


def test_images_that_lie_class_by_class_are_shuffled() -> None:
    rows = np.argsort(LABELS, kind="stable")
    made, again = (from_arrays((PIXELS[rows], LABELS[rows]), (PIXELS, LABELS)) for _ in range(2))
    assert "has its images class by class: they are shuffled" in made.notes[0]
    for part, other in ((made.train, again.train), (made.test, again.test)):
        assert torch.equal(part.images, other.images) and len(set(part.labels[:6].tolist())) > 2
        whole = {image.tobytes(): label for image, label in zip(WHOLE.numpy(), LABELS, strict=True)}
        assert len(part) == 20
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            assert whole[image.numpy().tobytes()] == label


def test_defaults_are_those_of_cifar10_or_given() -> None:
    pixels = np.concatenate([PIXELS] * 10)
    labels = np.concatenate([LABELS] * 10)
    config = resolved(TrainConfig(), from_arrays((pixels, labels)))
    cifar10 = data.get("cifar10")
    for name in ("eps", "model", "epochs", "batch_size", "lr", "weight_decay", "optimizer"):
        assert getattr(config, name) == getattr(cifar10, name)
    hyper = resolved(TrainConfig(dataset="cifar10"), from_arrays((pixels, labels), name="cifar10")).hyper
    assert config.hyper == hyper and config.hyper_of("atlas")["local"] == "start" and config.mean
    given = from_arrays((pixels, labels), eps=4 / 255, epochs=3, model="small_cnn", class_names="abcd")
    config = resolved(TrainConfig(lr=0.3), given)
    assert (config.eps, config.epochs, config.model, config.lr) == (4 / 255, 3, "small_cnn", 0.3)
    assert given.class_names == ("a", "b", "c", "d") and given.eps == 4 / 255


@pytest.mark.parametrize(
    ("train", "how", "message"),
    [
        (PIXELS, {}, r"train must be \(images, labels\), got ndarray"),
        ((PIXELS, LABELS[:3]), {}, r"train must be integers \[20\], one for each image, got torch.int64 \[3\]"),
        ((PIXELS, LABELS / 2), {}, "labels of train must be integers .*got torch.float64"),
        ((PIXELS, LABELS > 1), {}, "labels of train must be integers .*got torch.bool"),
        ((PIXELS, np.eye(20)[LABELS].astype(int)), {}, r"must be integers \[20\], one for each image, .*\[20, 20\]"),
        ((PIXELS, ["a"] * 20), {}, "train must be arrays of numbers or tensors, got .'a'"),
        ((PIXELS[:0], LABELS[:0]), {}, "train holds no images"),
        ((PIXELS.astype(int), LABELS), {}, r"images of train must be uint8, or floats in \[0, 1\], got torch.int64"),
        ((PIXELS / 1.0, LABELS), {}, "got torch.float64 from 0 to 255: give them before .*divide by 255"),
        ((PIXELS / 255 - 0.5, LABELS), {}, "from -0.5 to 0.5: give them before normalisation"),
        ((PIXELS * np.nan, LABELS), {}, "from nan to nan"),
        ((PIXELS[..., :2], LABELS), {}, r"\[N, H, W\], \[N, H, W, C\] or .* 1 or 3 channels, got \[20, 5, 6, 2\]$"),
        ((PIXELS[:, :3], LABELS), {}, r"got \[20, 3, 6, 3\], which may be either: give Images of them"),
        ((PIXELS.reshape(20, -1), LABELS), {}, r"channels, got \[20, 90\]"),
        ((PIXELS, LABELS + 1), {}, "labels from 1 to 4, and there is no training image of class 0: number the classes"),
        ((PIXELS, LABELS * 5), {}, r"class 1, 2, 3, 4, 6, ...: number the classes anew, numpy.unique"),
        ((PIXELS, LABELS - 1), {}, "got labels from -1 to 2: number the classes anew"),
        ((PIXELS, LABELS), {"class_names": "abc"}, "labels of the train split must be in 0..2, got 0..3"),
        ((PIXELS, LABELS), {"class_names": "abcd", "num_classes": 5}, "class_names must be 5 names, .*got 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_images_is_refused(train: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_arrays(train, train, **how)


def test_a_class_may_lack_images_where_the_number_of_classes_is_given() -> None:
    assert from_arrays((PIXELS, LABELS * 2), num_classes=9).num_classes == 9
    with pytest.raises(ValueError, match="labels from 0 to 5, and there is no training image of class 4, 5"):
        from_arrays((PIXELS, LABELS), (PIXELS, LABELS + 2))


def test_the_example_of_the_documentation_trains() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```python\n") if "from_arrays" in part).split("```")[0]
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["run"].epoch == 1 and names["own"].class_names == ("dark", "bright")


# ---- map-style data sets --------------------------------------------------------------------------------------------


def test_a_map_style_data_set_is_read_once() -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(each) for each in PIXELS]
    for images in (pictures, PIXELS, WHOLE, WHOLE.float() / 255, PIXELS / 255, [p.convert("RGBA") for p in pictures]):
        for labels in (LABELS, LABELS.tolist(), torch.from_numpy(LABELS)):
            made = from_dataset(Items(images, labels, ["a", "b", "c", "d"]), Items(images, labels))
            assert torch.equal(made.train.images, WHOLE) and made.train.labels.tolist() == LABELS.tolist()
            assert made.class_names == ("a", "b", "c", "d")
    grey = from_dataset(Items([picture.convert("L") for picture in pictures]), class_names="abcd", epochs=2)
    assert grey.train.shape == (1, 5, 6) and grey.declared is not None and grey.declared.epochs == 2
    assert from_dataset(torch.utils.data.TensorDataset(WHOLE, torch.from_numpy(LABELS))).num_classes == 4
    assert from_dataset(torch.utils.data.Subset(Items(PIXELS), range(3, 13))).train.labels.tolist().count(3) == 2


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (iter([1]), "train must be a map-style data set, with a length and items .image, label."),
        (Items(PIXELS[:0]), "train holds no images"),
        (list(PIXELS), r"train\[0\] must be .image, label., got array"),
        ([{"image": PIXELS[0], "label": 1}], r"train\[0\] must be .image, label., got"),
        (Items(PIXELS, LABELS[:4]), r"train\[4\] cannot be read: IndexError: index 4"),
        (Items(PIXELS, LABELS / 2), r"the label of train\[0\] must be an integer, the number of its class, got 0.0"),
        (Items(PIXELS, ["cat"] * 20), r"the label of train\[0\] must be an integer, .*got 'cat'"),
        (Items(["a.png"] * 20), r"image of train\[0\] must be one of Pillow, an array or a tensor, got 'a.png'"),
        (Items(WHOLE.float()), r"images of train\[0\] must be uint8, or floats in \[0, 1\], got torch.float32 from"),
        (Items([*PIXELS[:7], PIXELS[7][:4]]), r"train\[0\] is \[3, 5, 6\], train\[7\] is \[3, 4, 6\]: let its"),
    ],
)  # fmt: skip
def test_what_cannot_be_items_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dataset(dataset)


# ---- .npz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [0, 1, 2])
def test_files_of_arrays(names: int, tmp_path: Path) -> None:
    (image, label), (test_image, test_label) = data.arrays.TRAIN[names], data.arrays.TEST[names]
    test = {test_image: PIXELS[:8], test_label: LABELS[:8, None]}
    np.savez(
        tmp_path / "leaf.npz", **{image: PIXELS, label: LABELS}, **test, class_names=np.array(["a", "b", "c", "d"])
    )
    made = data.load("npz", tmp_path / "leaf.npz")
    assert (made.name, made.loader, made.class_names, made.notes) == ("leaf", "npz", ("a", "b", "c", "d"), ())
    assert torch.equal(made.train.images, WHOLE) and torch.equal(made.test.images, WHOLE[:8])


def test_a_file_without_a_test_and_with_more_than_is_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10.npz", image=PIXELS, label=LABELS, val_images=PIXELS)
    made = data.load("npz", tmp_path / "cifar10.npz")
    assert len(made.train) == 16 and made.name == "cifar10-npz"
    assert "arrays that are not used: val_images" in made.notes[0] and "no test images of its own" in made.notes[1]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset npz is a file of yours: say which"):
        data.load("npz")
    with pytest.raises(FileNotFoundError, match="is a folder: give the .npz file"):
        data.load("npz", tmp_path)
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="is not there: give the .npz file"):
        data.load("npz", path)
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="data_dir .*a.npz cannot be read as .npz: "):
        data.load("npz", path)
    np.savez(path, pixels=PIXELS)
    with pytest.raises(
        ValueError, match="must hold train_image and train_label, or x_train .*it has the arrays pixels"
    ):
        data.load("npz", path)
    np.savez(path, image=PIXELS, label=np.array(["a", None] * 10, dtype=object))
    with pytest.raises(ValueError, match="cannot be read as .npz: ValueError: Object arrays cannot be loaded"):
        data.load("npz", path)
    np.savez(path, image=PIXELS, label=LABELS * 3)
    with pytest.raises(ValueError, match=f"data_dir {path}: labels must be 0, 1, 2 and so on, without gaps"):
        data.load("npz", path)


def test_an_npz_file_is_trained_resumed_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)

    def atlas(*words: str, status: int = 0) -> str:
        assert cli.main([*words, "--data-dir", "own.npz", "--threads", "1", "--device", "cpu"]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
    np.savez("own.npz", x_train=images, y_train=labels, x_test=images[:12], y_test=labels[:12])
    quick = ("--model", "digits_net", "--width", "2", "--batch-size", "16", "--probe-size", "0", "--method", "standard")
    atlas("train", "--dataset", "npz", *quick, "--epochs", "1")
    assert checkpoint.load("runs/own-1/standard")["data"]["loader"] == "npz"
    assert "epoch 2/2" in atlas("train", "--resume", "runs/own-1/standard", "--epochs", "2")
    assert "12 test images" in atlas("evaluate", "runs/own-1/standard")
    np.savez("own.npz", x_train=images, y_train=labels, x_test=images[1:13], y_test=labels[1:13])
    assert "was made on other data" in atlas("evaluate", "runs/own-1/standard", status=2)
