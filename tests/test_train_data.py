"""Data sets (parsing, checksums, search, download) and batches of the trainer."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from atlas_train import data, methods, writing
from atlas_train.config import TrainConfig
from atlas_train.data import Batches, Images, cifar10, cifar100, fashion_mnist, files, mnist, svhn


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def images(n: int, channels: int = 1, size: int = 6, classes: int = 3) -> Images:
    g = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=g)
    return Images(pixels, torch.randint(0, classes, (n,), generator=g))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data in the environment: ATLAS_DATA unset, an empty cache folder (returned)."""
    monkeypatch.delenv("ATLAS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "atlas_kernels"


# ---- names, types, subsets ------------------------------------------------------------------------------------------


def test_unknown_data_set_offers_the_nearest():
    with pytest.raises(ValueError, match="'CIFAR-10'; the nearest is 'cifar10'"):
        data.load("CIFAR-10")
    with pytest.raises(ValueError, match="'minst'; the nearest is 'mnist'"):
        data.load("minst")


@pytest.mark.parametrize("name", ["Digits", "DIGITS"])
def test_a_data_set_is_known_in_capitals(name: str):
    pytest.importorskip("sklearn")
    assert data.load(name).name == "digits"
    assert TrainConfig(dataset=name, method="TRADES", beside=("Adv",), model="Small_CNN") == TrainConfig(
        dataset="digits", method="trades", beside=("adv",), model="small_cnn"
    )


def test_importing_needs_torch_and_numpy_only():
    code = (
        "import sys\n"
        "for name in ('sklearn', 'scipy', 'PIL', 'pooch', 'torchvision'): sys.modules[name] = None\n"
        "import atlas_train.data, atlas_train.models\n"
        "atlas_train.models.build('digits_net', num_classes=10, in_channels=1)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_images_refuse_other_types():
    good = images(4)
    with pytest.raises(ValueError, match="images must be uint8"):
        Images(good.images.float(), good.labels)
    with pytest.raises(ValueError, match="labels must be int64 \\[4\\]"):
        Images(good.images, good.labels[:3])
    with pytest.raises(ValueError, match="labels of the test split must be in 0..1"):
        data.DataSplits("toy", Images(good.images, good.labels * 0), Images(good.images, good.labels * 0 + 2), 2, 0.1)


def test_images_are_taken_from_numpy():
    good = images(4, channels=3)
    for labels in (good.labels.numpy(), good.labels.numpy().astype(np.uint8), good.labels.numpy().astype(">i4")):
        made = Images(good.images.numpy(), labels)
        assert torch.equal(made.images, good.images) and torch.equal(made.labels, good.labels)
        assert made.labels.dtype == torch.int64
    flipped = Images(good.images.numpy()[:, :, ::-1], good.labels)  # a negative stride, which torch does not have
    assert torch.equal(flipped.images, good.images.flip(2))
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, C, H, W\], got torch.float64 \[4, 3, 6, 6\]"):
        Images(good.images.numpy() / 255, labels)
    with pytest.raises(ValueError, match="labels must be int64"):
        Images(good.images, good.labels.numpy() / 2)
    with pytest.raises(ValueError, match="labels must hold numbers, got an array of object"):
        Images(good.images, np.array(["a", None, 1, 2], dtype=object))
    with pytest.raises(ValueError, match="images must be a tensor or an array of NumPy, got list"):
        Images(good.images.tolist(), good.labels)


def test_labels_of_any_integer_type_are_taken_from_tensors():
    good = images(4)
    for kind in (torch.int32, torch.uint8, torch.int64):
        assert torch.equal(Images(good.images, good.labels.to(kind)).labels, good.labels)
    for labels in (good.labels > 0, good.labels.float()):
        with pytest.raises(ValueError, match="labels must be int64"):
            Images(good.images, labels)


@pytest.mark.parametrize(
    ("convert", "image_cast", "label_cast"),
    [(torch.Tensor.numpy, ".astype(numpy.uint8)", "labels.astype(numpy.int64)"),
     (torch.Tensor.clone, ".to(torch.uint8)", "labels.long()")],
)  # fmt: skip
def test_remedies_are_those_of_what_was_given(convert, image_cast, label_cast):
    good = images(4)
    with pytest.raises(ValueError, match=re.escape(f"(255 * images).round(){image_cast}")):
        Images(convert(good.images / 255), good.labels)
    with pytest.raises(ValueError, match=re.escape(label_cast)):
        Images(good.images, convert(good.labels.float()))
    grey = convert(good.images[:, 0])
    with pytest.raises(ValueError, match=r"got torch.uint8 \[4, 6, 6\]; add the channel: images\[:, None\]$"):
        Images(grey, good.labels)
    Images(grey[:, None], good.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": "4"}, "num_classes must be an integer >= 1, got '4'"),
        ({"num_classes": True}, "num_classes must be an integer >= 1, got True"),
        ({"eps": 8}, "eps must be a number > 0 and < 1, got 8; images are in .0, 1., so write 8/255"),
        ({"eps": None}, "eps must be a number > 0 and < 1, got None"),
        ({"train": "images"}, "train must be Images"),
        ({"name": 3}, "name must be a text, got 3"),
        (
            {"test": Images(torch.zeros(4, 1, 6, 7, dtype=torch.uint8), torch.arange(4))},
            r"toy: training images are \[1, 6, 6\], test images \[1, 6, 7\]: give both one shape",
        ),
    ],
)
def test_facts_of_a_data_set_are_checked_at_once(change, message):
    good = {"name": "toy", "train": images(4, classes=4), "test": images(4, classes=4), "num_classes": 4, "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        data.DataSplits(**good | change)
    taken = data.DataSplits(**good | {"num_classes": np.int64(4), "eps": "8/255"})
    assert (taken.num_classes, taken.eps) == (4, 8 / 255)


def test_images_and_splits_are_shown_without_their_pixels():
    few = images(4, classes=4)
    assert repr(few) == "Images(torch.uint8 [4, 1, 6, 6])"
    text = repr(data.DataSplits("toy", few, few, 4, 8 / 255))
    assert text == f"DataSplits('toy', train={few!r}, test={few!r}, num_classes=4, eps=8/255)"


def test_images_with_the_channels_last_in_the_shape_are_refused_with_the_remedy():
    labels = torch.zeros(2, dtype=torch.int64)
    for shape in ((2, 32, 32, 3), (2, 28, 28, 1), (2, 32, 48, 4)):
        made = torch.zeros(shape, dtype=torch.uint8)
        for given in (made, made.numpy()):
            with pytest.raises(ValueError, match=r"which is \[N, H, W, C\]; give images.permute\(0, 3, 1, 2\)"):
                Images(given, labels)
        assert Images(made.permute(0, 3, 1, 2), labels).shape == (shape[3], *shape[1:3])
    for shape in ((2, 3, 4, 4), (2, 1, 3, 3), (2, 64, 3, 3), (2, 3, 32, 32), (2, 1, 28, 1)):  # small images
        Images(torch.zeros(shape, dtype=torch.uint8), labels)


def test_subset_takes_the_first_or_a_stratified_draw():
    full = images(200, classes=4)
    first = full.subset(17)
    assert torch.equal(first.images, full.images[:17]) and torch.equal(first.labels, full.labels[:17])

    drawn, again, other = full.subset(61, seed=5), full.subset(61, seed=5), full.subset(61, seed=6)
    assert len(drawn) == 61 and torch.equal(drawn.images, again.images)
    assert not torch.equal(drawn.images, other.images)
    large = [full.subset(61, seed=seed).images for seed in (2**32 - 1, 2**32 + 5, 2**33 + 5, 2**63 - 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(large) for b in [drawn.images, *large[:i]])
    share = full.labels.bincount() * 61 / 200
    assert ((drawn.labels.bincount() - share).abs() < 1).all()
    assert torch.equal(full.subset(200, seed=1).images, full.images)  # the order is the original one
    for n in (0, 201):
        with pytest.raises(ValueError, match=f"1..200 .*got {n}"):
            full.subset(n)


def test_mean_and_std_are_those_of_all_pixels():
    pixels = torch.randint(0, 256, (1003, 3, 4, 5), dtype=torch.uint8)
    mean, std = Images(pixels, torch.zeros(1003, dtype=torch.int64)).mean_std()
    channels = pixels.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(mean).double(), channels.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std).double(), channels.std(1, correction=0), rtol=1e-6, atol=0)


# ---- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_a_fixed_stratified_split():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (len(digits.train), len(digits.test), digits.num_classes, digits.augment) == (1297, 500, 10, False)
    assert digits.train.shape == (1, 8, 8)
    share = torch.from_numpy(load_digits().target).bincount() * 500 / 1797
    assert ((digits.test.labels.bincount() - share).abs() < 1).all()
    # every image is in exactly one split, with its label
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    both = torch.cat([digits.train.images, digits.test.images]).numpy()[:, 0]
    labels = torch.cat([digits.train.labels, digits.test.labels]).tolist()
    ours = sorted((image.tobytes(), label) for image, label in zip(both, labels, strict=True))
    target = load_digits().target.tolist()
    assert ours == sorted((image.tobytes(), label) for image, label in zip(original, target, strict=True))
    assert digits.train.images.max() == 255
    # the split is part of every reported number: it must never change
    assert md5(digits.test.labels.numpy().tobytes() + digits.test.images.numpy().tobytes()) == DIGITS_TEST_MD5


DIGITS_TEST_MD5 = "b653a157b3cb1818a93074412415a123"


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'atlas-kernels\[train\]'"):
        data.load("digits")


# ---- MNIST ----------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, suffix: str = ".gz", n: int = 5) -> Images:
    made = images(n, size=4)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        for kind, content in (("images-idx3", made.images[:, 0]), ("labels-idx1", made.labels)):
            raw = idx(content.numpy())
            (folder / f"{split}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return made


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_files_are_read(tmp_path: Path, suffix: str):
    made = write_mnist(tmp_path, suffix)
    sums = {path.name: md5(path.read_bytes()) for path in tmp_path.iterdir()}
    for split in ("train", "t10k"):
        read = mnist.read_split(tmp_path, split, sums)
        assert torch.equal(read.images, made.images) and torch.equal(read.labels, made.labels)
    read.images[0] = 0  # writable


def test_idx_damage_is_named(tmp_path: Path):
    write_mnist(tmp_path, "")
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path.name}.*md5 found {md5(whole)}, expected 6bbc9ace.*--download"):
        mnist.read_split(tmp_path, "train")
    for content, message in (
        (whole[:-1], "95 bytes found, 96 expected for shape \\(5, 4, 4\\).*--download"),
        (whole + b"x", "97 bytes found, 96 expected"),
        (whole[:9], "9 bytes found"),
        (b"", "magic number found '', expected '00000803'"),
        (b"\0\0\x0d\3" + whole[4:], "magic number found '00000d03', expected '00000803'"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            mnist.read_split(tmp_path, "train", None)
    path.write_bytes(idx(np.zeros((4, 4, 4))))
    with pytest.raises(ValueError, match="4 train images but 5 labels"):
        mnist.read_split(tmp_path, "train", None)


def test_truncated_gzip_is_named(tmp_path: Path):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    for content in (path.read_bytes()[:-12], b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is no whole gzip file.*--download"):
            mnist.read_split(tmp_path, "t10k", None)


# ---- CIFAR-10 and its pickles ---------------------------------------------------------------------------------------


def python2_batch(pixels: bytes, shape: tuple[int, int], labels: list[int]) -> bytes:
    """A batch as Python 2 pickled the original ones: byte strings, protocol 2, NumPy's names of that time."""

    def string(s: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(s)) + s

    def integer(i: int) -> bytes:
        return b"J" + struct.pack("<i", i)

    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    state = integer(1) + integer(shape[0]) + integer(shape[1]) + b"\x86" + dtype + b"\x89" + string(pixels)
    array = empty + b"(" + state + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + string(b"labels") + numbers + string(b"data") + array + b"u."


def test_batches_of_both_pythons_are_read(tmp_path: Path):
    made = images(4, channels=3, size=32, classes=10)
    flat = made.images.reshape(4, -1).numpy()
    half = python2_batch(flat[:2].tobytes(), (2, 3072), made.labels[:2].tolist())
    assert np.array_equal(pickle.loads(half, encoding="bytes")[b"data"], flat[:2])  # the helper above is right
    (tmp_path / "a").write_bytes(half)
    (tmp_path / "b").write_bytes(pickle.dumps({b"data": flat[2:], b"labels": made.labels[2:].tolist()}, protocol=3))
    sums = {name: md5((tmp_path / name).read_bytes()) for name in "ab"}
    read = cifar10.read_batches(tmp_path, ("a", "b"), sums)
    assert torch.equal(read.images, made.images) and torch.equal(read.labels, made.labels)

    (tmp_path / "a").write_bytes(half[:-1])
    with pytest.raises(ValueError, match="/a .*damaged.*: md5 found .*, expected .*--download"):
        cifar10.read_batches(tmp_path, ("a",), sums)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def test_malicious_pickles_are_refused_and_not_run(tmp_path: Path):
    mark = tmp_path / "ran"
    for attempt in (Calls(os.mkdir, str(mark)), Calls(exec, f"open({str(mark)!r}, 'w').close()")):
        for content in (attempt, {b"data": attempt, b"labels": [1]}):
            (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content))
            with pytest.raises(ValueError, match="/data_batch_1 .*md5 found"):
                cifar10.read_batches(tmp_path, cifar10.TRAIN)
    assert not mark.exists()


# ---- Fashion-MNIST, CIFAR-100, SVHN: files of the same form, whose checksums stand for the real ones -----------------


def known(folder: Path, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """The checksums of the module's files become those of the files in the folder."""
    for name in module.MD5:
        patch.setitem(module.MD5, name, md5((folder / name).read_bytes()))


@pytest.mark.parametrize("layout", ["fashion_mnist", "FashionMNIST/raw", "."])
def test_fashion_mnist(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch, layout: str):
    made = write_mnist(tmp_path / layout)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz .*md5 found .*expected 8d4fb7e6"):
        data.load("fashion_mnist", tmp_path)
    known(tmp_path / layout, fashion_mnist, monkeypatch)
    read = data.load("Fashion_MNIST", tmp_path)
    for part in (read.train, read.test):
        assert torch.equal(part.images, made.images) and torch.equal(part.labels, made.labels)
    assert (read.class_names[9], read.eps, read.augment) == ("Ankle boot", 0.1, False)


def test_mnist_in_the_place_of_fashion_mnist_is_named(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    write_mnist(tmp_path)
    monkeypatch.setitem(files.OTHERS, "MNIST", {md5((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())})
    with pytest.raises(ValueError, match="belongs to MNIST, whose files have the same names"):
        data.load("fashion_mnist", tmp_path)


def write_cifar100(folder: Path) -> Images:
    made = images(6, channels=3, size=32, classes=100)
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        batch = {
            b"data": made.images.reshape(6, -1).numpy(),
            b"fine_labels": made.labels.tolist(),
            b"coarse_labels": [],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    return made


def test_cifar100(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    made = write_cifar100(tmp_path / "cifar-100-python")
    with pytest.raises(ValueError, match="cifar-100-python/train .*md5 found .*expected 16019d7e"):
        data.load("cifar100", tmp_path)
    known(tmp_path / "cifar-100-python", cifar100, monkeypatch)
    read = data.load("cifar100", tmp_path)
    for part in (read.train, read.test):
        assert torch.equal(part.images, made.images) and torch.equal(part.labels, made.labels)
    names = read.class_names
    assert len(set(names)) == read.num_classes == 100 and list(names) == sorted(names)


def write_svhn(folder: Path) -> Images:
    io_of_scipy = pytest.importorskip("scipy.io")
    made = images(12, channels=3, size=32, classes=10)
    labels = np.where(made.labels == 0, 10, made.labels).astype(np.uint8)[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    for name in svhn.MD5:
        arrays = {"X": made.images.permute(2, 3, 1, 0).numpy(), "y": labels}
        io_of_scipy.savemat(folder / name, arrays, do_compression=True)
    return made


def test_svhn(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    made = write_svhn(tmp_path / "svhn")
    assert (made.labels == 0).any()
    with pytest.raises(ValueError, match="svhn/train_32x32.mat .*md5 found .*expected e26dedcc"):
        data.load("svhn", tmp_path)
    known(tmp_path / "svhn", svhn, monkeypatch)
    read = data.load("svhn", tmp_path)
    for part in (read.train, read.test):
        assert torch.equal(part.images, made.images) and torch.equal(part.labels, made.labels)
    assert not read.augment
    path = tmp_path / "svhn" / "test_32x32.mat"
    for content in (path.read_bytes()[:-100], b"", pickle.dumps(1)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="test_32x32.mat is no file of SVHN"):
            svhn.read(path, None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"needs SciPy: pip install 'atlas-kernels\[train\]'"):
        svhn.read(path, None)


def test_the_checksums_are_those_that_are_published():
    """By torchvision (datasets/cifar.py, mnist.py, svhn.py), and on Fashion-MNIST's own page."""
    sums = {**fashion_mnist.MD5, **cifar100.MD5, **svhn.MD5, "archive": cifar100.ARCHIVE_MD5}
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in sums.values()) and len(set(sums.values())) == 9
    assert set(fashion_mnist.MD5.values()) == files.OTHERS["Fashion-MNIST"]
    assert {mnist.MD5[name] for name in fashion_mnist.MD5} == files.OTHERS["MNIST"]


def test_their_downloads(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    pooch = pytest.importorskip("pooch")
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, downloader: object) -> None:
        asked.append((url, known_hash))
        target = Path(path) / fname
        target.write_bytes(archive.read_bytes() if fname.endswith(".tar.gz") else b"")

    archive = tmp_path / "archive"
    cifar_archive(archive, "cifar-100-python", ("train", "test", "meta"))
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for name, first in (("fashion_mnist", "train-images-idx3-ubyte.gz"), ("svhn", "train_32x32.mat")):
        with pytest.raises(ValueError, match=f"^{nowhere}/{name}/{first} .*md5"):
            data.load(name, download=True)
    with pytest.raises(ValueError, match=f"^{nowhere}/cifar-100-python/train .*md5"):
        data.load("cifar100", download=True)
    assert sorted(path.name for path in (nowhere / "cifar-100-python").iterdir()) == ["test", "train"]
    assert len(asked) == 4 + 2 + 1 and asked[-1][1] == "md5:eb9058c3a382ffc7106e4002c42a8d85"


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar100", "svhn"])
def test_methods_take_what_they_have_for_the_set_that_it_is_like(name: str):
    like = data.get(data.get(name).like or "")
    assert methods.defaults_on(data.get(name), "atlas") == methods.defaults_on(like, "atlas") != {}
    assert methods.defaults_on(data.get("cifar100"), "liet") == methods.get("liet").defaults["cifar100"]
    assert methods.defaults_on(data.get(name), "gairat") == methods.defaults_on(like, "gairat")


# ---- where files are looked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mnist", "MNIST/raw", "."])
def test_mnist_layouts(tmp_path: Path, nowhere: Path, layout: str):
    write_mnist(tmp_path / layout, "")
    with pytest.raises(
        ValueError, match="is damaged, or .*another data set.s: md5"
    ):  # found, and then its checksum is wrong
        data.load("mnist", tmp_path)


def test_the_files_of_another_data_set_are_named(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    write_mnist(tmp_path / "mnist")
    with pytest.raises(ValueError, match="another data set's, point --data-dir") as error:
        data.load("mnist", tmp_path)
    assert "delete" not in str(error.value)
    other = md5((tmp_path / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    monkeypatch.setitem(files.OTHERS, "Fashion-MNIST", {other})
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz \(\d+ bytes\) belongs to Fashion-MNIST") as error:
        data.load("mnist", tmp_path)
    assert "damaged" not in str(error.value) and "--data-dir" in str(error.value)


@pytest.mark.parametrize("folder", ["~nobody-of-that-name/x", "x" * 5000, "a\nb\x1b[31m", "\udcff"])
def test_folders_that_can_be_none_are_said_in_plain_characters(
    folder: str, tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
):
    for given in ("ATLAS_DATA", "XDG_CACHE_HOME", None):
        with monkeypatch.context() as patch:
            if given:
                patch.setenv(given, folder)
            with pytest.raises((ValueError, FileNotFoundError)) as error:
                data.load("mnist", None if given else folder)
        for line in str(error.value).split("\n"):
            assert line.isprintable()


def test_search_order(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    given, env = tmp_path / "given", tmp_path / "env"
    for root in (nowhere, env, given):  # the later found wins over the earlier
        write_mnist(root / "mnist")
        if root is not nowhere:
            monkeypatch.setenv("ATLAS_DATA", str(env))
        with pytest.raises(ValueError, match=f"^{root}/mnist/train-images-idx3-ubyte.gz "):
            data.load("mnist", given if root is given else None)


def test_missing_files_say_where_and_how(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATLAS_DATA", str(tmp_path / "env"))
    partial = tmp_path / "given" / "cifar-10-batches-py"
    partial.mkdir(parents=True)
    for name in list(cifar10.MD5)[:5]:
        (partial / name).touch()
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", tmp_path / "given")
    message = str(error.value)
    for part in (f"{partial}: lacks test_batch\n", f"{tmp_path / 'env'}: not there", str(nowhere)):
        assert part in message
    for remedy in ("--download", "--data-dir", "ATLAS_DATA"):
        assert remedy in message


# ---- download -------------------------------------------------------------------------------------------------------


def cifar_archive(path: Path, inside: str = "cifar-10-batches-py", names: Iterable[str] = cifar10.MD5) -> None:
    """An archive as published, in which each file holds its name."""
    with tarfile.open(path, "w:gz") as tar:
        for name in (*names, "readme.html"):
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))


def test_unpack_takes_the_known_members_only(tmp_path: Path):
    archive, folder = tmp_path / "a.tar.gz", tmp_path / "in" / "folder"
    cifar_archive(archive)
    cifar10.unpack(archive, folder, "cifar-10-batches-py", cifar10.MD5)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: n.encode() for n in cifar10.MD5}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted([*cifar10.MD5, "a.tar.gz"])


def test_download_goes_to_the_first_root(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch):
    pooch = pytest.importorskip("pooch")
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, downloader: object) -> None:
        asked.append((url, known_hash))
        if url.startswith(mnist.MIRRORS[0]):
            raise OSError("this mirror is down")
        (Path(path) / fname).write_bytes(b"")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(ValueError, match=f"^{nowhere}/mnist/train-images-idx3-ubyte.gz"):  # arrived, with a wrong md5
        data.load("mnist", download=True)
    assert len(asked) == 8 and len(list((nowhere / "mnist").iterdir())) == 4
    assert (mnist.MIRRORS[1] + "t10k-labels-idx1-ubyte.gz", "md5:ec29112dd5afa0611ce80d1b7f02629c") in asked

    cifar_archive(tmp_path / "archive")

    def retrieve_archive(url: str, known_hash: str, fname: str, path: Path, downloader: object) -> None:
        assert (url, known_hash) == (cifar10.URLS[0], "md5:c58f30108f718f92721af3b95e74349a")
        (Path(path) / fname).write_bytes((tmp_path / "archive").read_bytes())

    monkeypatch.setattr(pooch, "retrieve", retrieve_archive)
    with pytest.raises(ValueError, match=f"^{tmp_path}/given/cifar-10-batches-py/data_batch_1 "):
        data.load("cifar10", tmp_path / "given", download=True)


def test_download_failures_say_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pooch = pytest.importorskip("pooch")

    def retrieve(url: str, **_: object) -> None:
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(OSError, match="(?s)could not download f:.*no route to u1.*no route to u2.*Try again"):
        files.fetch(["u1", "u2"], "0", tmp_path / "f")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot download into .*--data-dir"):
        files.fetch(["u1"], "0", tmp_path / "file" / "f")
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'atlas-kernels\[train\]'"):
        files.fetch(["u1"], "0", tmp_path / "f")


def test_a_download_over_http_arrives_and_a_terminal_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("pooch")
    content = bytes(3 * files._CHUNK + 5)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "set.bin").write_bytes(content)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("time.monotonic", itertools.count(0, 3).__next__)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("missing.bin", "set.bin")]
        files.fetch(urls, md5(content), tmp_path / "set.bin")
        server.shutdown()
    assert (tmp_path / "set.bin").read_bytes() == content
    shown = capsys.readouterr().err
    assert "\rset.bin: 256 of 768 KiB\rset.bin: 512 of 768 KiB" in shown and "768 of 768 KiB\n" in shown


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    writing.write_bytes(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        writing.write_bytes(tmp_path / "a", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"1"


# ---- batches --------------------------------------------------------------------------------------------------------


def epoch(batches: Batches, number: int) -> list[data.Batch]:
    batches.set_epoch(number)
    return list(batches)


def same(a: list[data.Batch], b: list[data.Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(s, t) for p, q in zip(a, b, strict=True) for s, t in zip(p, q, strict=True)
    )


def test_every_sample_comes_once_with_its_label(device: torch.device):
    full = images(53)
    for shuffle in (False, True):
        batches = Batches(full, 10, shuffle=shuffle, seed=3, device=device)
        assert len(batches) == len(list(batches)) == 6
        ids = torch.cat([batch.ids for batch in batches]).cpu()
        assert torch.equal(ids.sort().values, torch.arange(53))
        assert torch.equal(ids, torch.arange(53)) is not shuffle
        for x, y, rows in batches:
            assert x.device.type == y.device.type == rows.device.type == device.type
            assert (x.dtype, y.dtype, rows.dtype) == (torch.float32, torch.int64, torch.int64)
            assert torch.equal(y.cpu(), full.labels[rows.cpu()])
            assert torch.equal((x * 255).round().to(torch.uint8).cpu(), full.images[rows.cpu()])
    assert [len(b.y) for b in batches] == [10] * 5 + [3]
    dropped = Batches(full, 10, shuffle=False, seed=3, device=device, drop_last=True)
    assert [len(b.y) for b in dropped] == [10] * len(dropped) == [10] * 5


def test_pixels_are_divided_exactly(device: torch.device):
    ramp = torch.arange(256, dtype=torch.uint8)
    full = Images(ramp.view(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    exact = ramp.double() / 255
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        (batch,) = Batches(full, 1, shuffle=False, seed=0, device=device, dtype=dtype)
        rounded = exact if dtype == torch.float64 else exact.float()  # 16-bit types are rounded from float32
        assert torch.equal(batch.x.flatten().cpu(), rounded.to(dtype))


def test_batches_depend_on_seed_and_epoch_only(device: torch.device):
    full = images(40, channels=3)

    def make(seed: int = 1, where: torch.device | str = device) -> Batches:
        return Batches(full, 16, shuffle=True, seed=seed, augment=True, device=where)

    one = make()
    history = [epoch(one, number) for number in range(4)]
    torch.manual_seed(99)
    assert same(epoch(make(), 3), history[3])  # resumed at epoch 3, in another state of the global generators
    assert same(epoch(one, 0), history[0])
    orders = [torch.cat([batch.ids for batch in batches]) for batches in history]
    assert not any(torch.equal(orders[a], orders[b]) for a in range(4) for b in range(a))
    assert not same(epoch(make(seed=2), 0), history[0])
    assert not same(epoch(make(seed=1 + 2**32), 0), history[0])
    on_cpu = epoch(make(where="cpu"), 2)
    assert all(torch.equal(a.x, b.x.cpu()) for a, b in zip(on_cpu, history[2], strict=True))

    one.set_epoch(0)
    running = iter(one)
    first = next(running)
    one.set_epoch(1)
    assert same([first, *running], history[0])  # an iteration keeps its epoch


def test_augmentation_is_fresh_per_sample_and_in_every_epoch():
    full = Images(images(1, channels=3, size=12).images.expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64))
    batches = Batches(full, 32, shuffle=False, seed=0, augment=True, device="cpu")
    seen = [batch.x for number in range(3) for batch in epoch(batches, number)]
    assert not any(torch.equal(seen[a], seen[b]) for a in range(6) for b in range(a))
    assert len(torch.unique(seen[0], dim=0)) > 16  # each sample has its own crop and flip
    padded = torch.nn.functional.pad(full.images[0], (4,) * 4)
    crops = [padded[:, i : i + 12, j : j + 12] for i in range(9) for j in range(9)]
    plain, mirrored = ({c.numpy().tobytes() for c in some} for some in (crops, [c.flip(2) for c in crops]))
    crops = {(x * 255).round().byte().numpy().tobytes() for x in seen[0]}
    assert crops <= plain | mirrored and crops & plain and crops & mirrored


def test_memory_formats_hold_the_same_values():
    full = images(20, channels=3)
    for augmented in (False, True):
        plain, last = (
            epoch(Batches(full, 8, shuffle=True, seed=0, augment=augmented, device="cpu", channels_last=flag), 1)
            for flag in (False, True)
        )
        assert same(plain, last)
        for a, b in zip(plain, last, strict=True):
            assert a.x.is_contiguous() and b.x.is_contiguous(memory_format=torch.channels_last)


def test_batches_refuse_what_cannot_work():
    full = images(5)

    def make(batch_size: int = 2, **changed: object) -> Batches:
        return Batches(full, batch_size, **{"shuffle": True, "seed": 0, "device": "cpu", **changed})  # type: ignore

    for changed, message in (
        ({"dtype": torch.int32}, "dtype must be a floating-point type"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 6, "drop_last": True}, "batch_size 6 exceeds the set's 5 images"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changed)
    with pytest.raises(ValueError, match="at least one image"):
        Batches(Images(full.images[:0], full.labels[:0]), 1, shuffle=True, seed=0, device="cpu")
    with pytest.raises(ValueError, match="epoch must not be negative"):
        make().set_epoch(-1)


# ---- the real files -------------------------------------------------------------------------------------------------


def real(name: str, folder: str) -> data.DataSplits:
    root = os.environ.get("ATLAS_DATA")
    if not root:
        pytest.skip(f"ATLAS_DATA names no folder with the {name} files")
    if not (Path(root) / folder).is_dir():
        pytest.skip(f"ATLAS_DATA ({root}) has no {folder}/")
    return data.load(name)


def test_real_mnist():
    splits = real("mnist", "mnist")
    assert splits.train.images.shape == (60_000, 1, 28, 28) and splits.test.images.shape == (10_000, 1, 28, 28)
    assert splits.train.labels[:5].tolist() == [5, 0, 4, 1, 9] and splits.test.labels[:3].tolist() == [7, 2, 1]
    assert abs(splits.train.images.double().mean().item() / 255 - 0.1307) < 5e-5


def test_real_cifar10():
    splits = real("cifar10", "cifar-10-batches-py")
    assert splits.train.images.shape == (50_000, 3, 32, 32) and splits.test.images.shape == (10_000, 3, 32, 32)
    assert splits.train.labels.bincount().tolist() == [5000] * 10
    mean = splits.train.images.sum((0, 2, 3)) / (50_000 * 1024 * 255)
    assert (mean - torch.tensor([0.4914, 0.4822, 0.4465])).abs().max() < 6e-5
    declared = torch.tensor((splits.declared.mean, splits.declared.std))
    assert (torch.tensor(splits.train.mean_std()) - declared).abs().max() < 1.2e-4
    assert splits.class_names[splits.train.labels[0]] == "frog"
    assert splits.augment and splits.eps == 8 / 255
