"""Pictures in files: how one is read, a folder of them as a data set, and what is said of those that are damaged."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_train import checkpoint, cli, data
from atlas_train.data import Pictures, folder, identity, own, pictures
from atlas_train.data.pictures import Unreadable, read

Image = pytest.importorskip("PIL.Image")


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, array: np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)
    return path


def encoded(form: str, array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, of 10, 20 and 5 pictures of 6x8, PNG and BMP, beside files that are none."""
    made = tmp_path / "flowers"
    for label, (name, count) in enumerate((("rose", 10), ("daisy", 20), ("Tulip", 5))):
        for i in range(count):
            below = "a/b" if i % 3 == 0 else "."
            write(made / name / below / f"{i}.{'PNG' if i % 2 else 'bmp'}", pixels(6, 8, seed=100 * label + i))
        (made / name / "readme.txt").write_text("no picture")
        (made / name / f"._{i}.png").write_text("what a Mac leaves")
    write(made / ".hidden" / "x.png", pixels(2, 2))
    return made


# ---- one picture ----------------------------------------------------------------------------------------------------


def test_a_picture_is_read_as_it_lies_in_the_file(tmp_path: Path) -> None:
    colour, grey, four = pixels(5, 7), pixels(5, 7, 1), pixels(5, 7, 4)
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter: as in torchvision's ImageFolder it stays as it lies
    for array, how in ((colour, {}), (colour, {"exif": turned}), (four, {})):
        made = read(write(tmp_path / "a.png", array, **how))
        assert made.dtype == torch.uint8 and made.is_contiguous()
        assert torch.equal(made, torch.from_numpy(array[..., :3].copy()).permute(2, 0, 1))  # transparency is dropped
    read(write(tmp_path / "a.png", grey))[0] = 0  # writable
    assert torch.equal(read(tmp_path / "a.png"), torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(read(tmp_path / "a.png", channels=1), torch.from_numpy(grey)[None])
    expected = np.array(Image.fromarray(colour).convert("L"))
    assert torch.equal(read(write(tmp_path / "b.png", colour), channels=1)[0], torch.from_numpy(expected))


def test_sixteen_bits_keep_their_high_byte_and_palettes_their_colours(tmp_path: Path) -> None:
    high = pixels(4, 4, 1)
    deep = high.astype(np.uint16) << 8 | 0x7F
    assert torch.equal(read(write(tmp_path / "deep.png", deep), channels=1)[0], torch.from_numpy(high))
    palette = Image.fromarray(pixels(4, 4)).quantize(8)
    palette.info["transparency"] = b"\x80\xff"
    palette.save(tmp_path / "palette.png")
    assert torch.equal(
        read(tmp_path / "palette.png").permute(1, 2, 0),
        torch.from_numpy(np.array(palette.convert("RGBA").convert("RGB"))),
    )
    write(tmp_path / "float.tif", high.astype(np.float32))
    with pytest.raises(Unreadable, match="float.tif is .*its pixels are of 32 bits .mode F."):
        read(tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("before", "size", "resized"),
    [
        ((6, 8), (6, 8), (6, 8)),
        ((6, 8), (3, 3), (3, 4)),
        ((8, 6), (3, 3), (4, 3)),
        ((5, 7), (10, 10), (10, 14)),
        ((7, 5), (3, 3), (4, 3)),  # 4.2: torchvision's Resize cuts the fraction off
        ((6, 8), (4, 2), (4, 5)),
        ((300, 400), (224, 224), (256, 341)),  # as usual for ImageNet
        ((224, 224), (224, 224), (224, 224)),
    ],
)
def test_the_middle_of_a_resized_picture(before: Any, size: Any, resized: Any, tmp_path: Path) -> None:
    array = pixels(*before)
    whole = np.array(Image.fromarray(array).resize(resized[::-1], Image.Resampling.BILINEAR))
    top, left = (round((big - small) / 2) for big, small in zip(resized, size, strict=True))
    expected = whole[top : top + size[0], left : left + size[1]]
    made = read(write(tmp_path / "a.png", array), size)
    assert torch.equal(made.permute(1, 2, 0), torch.from_numpy(expected.copy()))


def test_what_is_no_whole_picture_is_named(tmp_path: Path) -> None:
    jpeg, png = encoded("JPEG", pixels(40, 40)), encoded("PNG", pixels(40, 40))
    path = tmp_path / "a.jpg"
    for content, message in (
        (b"", "is empty .0 bytes."),
        (b"GIF or not", "is no picture, or of a format that Pillow does not know"),
        (jpeg[: len(jpeg) // 2], "is damaged, cut off"),
        (png[: len(png) // 2], "is damaged, cut off"),
        (png[:50] + bytes(20) + png[70:], "is damaged, cut off"),
        (jpeg[:30], "is no picture|is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(Unreadable, match=f"^{path} ({message})"):
            read(path)
    with pytest.raises(Unreadable, match="there.jpg cannot be opened: No such file"):
        read(tmp_path / "not there.jpg")
    with pytest.raises(Unreadable, match="cannot be opened: Is a directory"):
        pictures.header(tmp_path)


def test_without_pillow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for size in (None, 4):
        with pytest.raises(ImportError, match=r"needs Pillow: pip install 'atlas-kernels\[train\]'"):
            data.load("folder", root, image_size=size)


# ---- a folder -------------------------------------------------------------------------------------------------------


def test_class_folders_alone_are_split_the_same_way_every_time(root: Path) -> None:
    made = data.load("folder", root)
    assert (made.name, made.class_names, made.num_classes) == ("flowers", ("Tulip", "daisy", "rose"), 3)
    assert (len(made.train), len(made.test), made.train.shape) == (28, 7, (3, 6, 8))
    assert made.train.labels.bincount().tolist() == [4, 16, 8] and made.test.labels.bincount().tolist() == [1, 4, 2]
    for part in (made.train, made.test):  # the first stand for all, whatever the order of the folders
        assert (part.labels.diff() < 0).any()
    others, note = made.notes
    assert others == f"{root}: files that are no pictures by their names are passed over: 3 .txt"
    assert "no test pictures of their own: 20% of each class, 7 in all" in note
    again, other = data.load("folder", root), folder.find(root, image_size=4)
    assert torch.equal(again.test.images, made.test.images)
    for part, images in ((other.train, made.train), (other.test, made.test)):
        assert torch.equal(part.labels, images.labels) and part.shape == (3, 4, 4)
        for row in range(len(part)):
            assert torch.equal(read(part.path(row)), images.images[row])
            assert f"/{made.class_names[part.labels[row]]}/" in part.path(row)
    assert set(other.train.paths).isdisjoint(other.test.paths) and len({*other.train.paths, *other.test.paths}) == 35


@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_train_and_test_folders(test: str, tmp_path: Path) -> None:
    for part, count in (("train", 4), (test, 2), ("others", 3)):
        for name in "ab":
            for i in range(count):
                write(tmp_path / part / name / f"{i}.png", pixels(4, 4, seed=i))
    made = data.load("folder", tmp_path)
    assert (len(made.train), len(made.test), made.notes) == (8, 4, ())
    (tmp_path / test / "b" / "0.png").unlink()
    (tmp_path / test / "b" / "1.png").unlink()
    assert data.load("folder", tmp_path).notes == (f"{tmp_path / test} has no picture of b",)
    write(tmp_path / test / "c" / "0.png", pixels(4, 4))
    with pytest.raises(ValueError, match=f"{test} has folders that {tmp_path}/train lacks: c; give both the same"):
        data.load("folder", tmp_path)


def test_of_two_folders_for_the_test_one_is_used_and_the_other_named(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        for name in "ab":
            write(tmp_path / part / name / f"{part}.png", pixels(4, 4))
    found = folder.find(tmp_path)
    assert found.test.root.endswith("test") and "val is not used: the test is that of test" in found.notes[0]
    for name in "ab":  # as ImageNet's test pictures, which have no classes
        (tmp_path / "test" / name / "test.png").rename(tmp_path / "test" / f"{name}.png")
        (tmp_path / "test" / name).rmdir()
    found = folder.find(tmp_path)
    assert found.test.root.endswith("val") and not found.notes


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "train"):
        write(tmp_path / name / "1.png", pixels(4, 4))
    assert folder.find(tmp_path).class_names == ("car", "train")


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset folder has its pictures in a folder of yours: say which"):
        data.load("folder")
    with pytest.raises(FileNotFoundError, match="nowhere is not there: give the folder"):
        data.load("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folders: the pictures of each class have to lie in a folder"):
        data.load("folder", tmp_path)
    write(tmp_path / "cat" / "1.png", pixels(4, 4))
    with pytest.raises(ValueError, match="has the one folder 'cat': the pictures of each class"):
        data.load("folder", tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.gif").touch()
    with pytest.raises(
        ValueError, match=r"class 'dog' has no pictures: .*/dog holds no file .jpg, .*; it has files .gif"
    ):
        data.load("folder", tmp_path)
    with pytest.raises(
        ValueError, match="image_size is for pictures in files, --dataset folder: leave it out for digits"
    ):
        data.load("digits", image_size=8)


def test_several_sizes_name_two_files_and_the_remedy(root: Path) -> None:
    odd = write(root / "rose" / "99.png", pixels(6, 9))
    with pytest.raises(ValueError, match="several sizes: .* is .*, .* is .*: .*--image-size 64") as error:
        data.load("folder", root)
    assert f"{odd} is 9x6" in str(error.value) and re.search(r"(bmp|PNG) is 8x6", str(error.value))
    made = data.load("folder", root, image_size=5, grey=True)
    assert made.train.shape == (1, 5, 5) and not made.augment


def test_damaged_pictures_are_all_named_and_left_out_only_if_asked(root: Path) -> None:
    damaged = encoded("PNG", pixels(6, 8))[:-30]  # its header is whole
    for name, content in (("rose/1.PNG", b""), ("rose/5.PNG", b"no picture"), ("daisy/7.PNG", damaged)):
        assert (root / name).exists()
        (root / name).write_bytes(content)
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("[!.]*.PNG"))
    some = Pictures(paths, torch.zeros(len(paths)).long(), (6, 8), root=str(root))
    with pytest.raises(Unreadable, match=r"3 of 17 pictures .*7.PNG is damaged.*1.PNG is empty.*skip-unreadable"):
        some.resident()
    with pytest.raises(Unreadable, match="2 of 35 pictures cannot be read: .*1.PNG is empty.*5.PNG is no picture"):
        data.load("folder", root)
    made = data.load("folder", root, skip_unreadable=True)
    assert len(made.train) + len(made.test) == 32
    warnings = [note for note in made.notes if note.startswith("WARNING")]
    assert "left out because they cannot be read: 2 (" in warnings[0] and ": 1 (" in warnings[1]
    assert "7.PNG is damaged" in warnings[1]
    assert made.train.files is not None and sum(int(v.split()[0]) for v in made.train.files.values()) == len(made.train)
    for path in (root / "Tulip").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no picture of the class Tulip can be read"):
        data.load("folder", root, skip_unreadable=True)


def test_more_than_fits_is_not_read_before_training(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "RESIDENT", 35 * 3 * 6 * 8 - 1)
    monkeypatch.setattr(pictures, "decoded", None)
    assert isinstance(data.load("folder", root).train, Pictures)


def test_names_that_mean_something_else_are_not_taken(root: Path) -> None:
    for name, expected in (("cifar10", "cifar10-folder"), ("a:b", "a_b")):
        made = data.load("folder", root.rename(root.with_name(name)))
        assert made.name == made.declared.name == expected
        root = root.with_name(name)
    assert own.name_of(Path("/")) == "folder"


# ---- the pictures of a split ----------------------------------------------------------------------------------------


def test_a_subset_has_the_rows_of_the_images(root: Path) -> None:
    found = folder.find(root).train
    images = found.resident()
    for n, seed in ((5, None), (9, 3), (28, 1)):
        part, expected = found.subset(n, seed), images.subset(n, seed)
        assert torch.equal(part.resident().images, expected.images) and torch.equal(part.labels, expected.labels)
    with pytest.raises(ValueError, match="1..28"):
        found.subset(29)
    with pytest.raises(ValueError, match="labels must be int64 .2., one per picture"):
        Pictures(["a", "b"], torch.zeros(3).long(), (4, 4))
    with pytest.raises(ValueError, match="channels must be 3 .RGB. or 1 .grey., got 4"):
        Pictures(["a"], torch.zeros(1).long(), (4, 4), 4)


def test_the_fingerprint_is_that_of_paths_classes_and_sizes(root: Path, tmp_path: Path) -> None:
    recorded = identity.record(data.load("folder", root))
    assert identity.record(data.load("folder", root.rename(tmp_path / "flowers2"))) == recorded | {"name": "flowers2"}
    root = tmp_path / "flowers2"

    def differs(**how: Any) -> str:
        state = {"data": recorded, "config": {}}
        with pytest.raises(ValueError, match="made on other data") as error:
            identity.require_same(state, identity.record(data.load("folder", root, **how)), "last.pt", "resume")
        return str(error.value)

    assert "put the files back as they were" in differs(image_size=6)
    path = root / "rose" / "1.PNG"
    content = path.read_bytes()
    write(path, pixels(6, 8) // 255, compress_level=9)
    assert len(path.read_bytes()) != len(content)
    assert re.search("(train|test): rose has files of other names or sizes", differs())
    path.write_bytes(content)
    path.rename(root / "rose" / "x.png")
    assert "rose has files of other names" in differs()
    (root / "rose" / "x.png").rename(root / "daisy" / "x.png")
    message = differs()
    assert "rose has 7 files instead of 8" in message and "daisy has 17 files instead of 16" in message


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_folder_is_trained_resumed_and_evaluated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)

    def atlas(*words: str) -> str:
        status = cli.main([*words, "--threads", "1", "--device", "cpu"])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    quick = ("--model", "digits_net", "--width", "2", "--batch-size", "16", "--probe-size", "0", "--image-size", "8")
    where = ("--data-dir", str(root))
    out = atlas("train", "--dataset", "folder", *where, *quick, "--epochs", "1", "--method", "standard")
    assert out.count("are held out for it") == 1 and "settings that you did not give are those of cifar10" in out
    state = checkpoint.load("runs/flowers-1/standard")
    assert state["data"]["loader"] == "folder" and state["config"]["image_size"] == 8
    assert len(state["config"]["mean"]) == 3
    with monkeypatch.context() as patch:  # as by Ctrl-C
        patch.setattr(data.Batches, "__iter__", stopped)
        assert cli.main(["train", "--resume", "runs/flowers-1/standard", *where, "--epochs", "2"]) == 130
    how = capsys.readouterr().out.split("to go on from the last checkpoint: atlas ")[1].split("\n")[0]
    assert how.split() == ["train", "--resume", "runs/flowers-1/standard", *where]
    assert "epoch 2/2" in atlas(*how.split(), "--epochs", "2")
    assert "7 test images" in atlas("evaluate", "runs/flowers-1/standard", *where)
    (root / "rose" / "1.PNG").unlink()
    assert cli.main(["train", "--resume", "runs/flowers-1/standard", *where, "--epochs", "3"]) == 2
    assert "rose has 7 files instead of 8" in capsys.readouterr().err
