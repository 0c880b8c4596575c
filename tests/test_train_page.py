"""`atlas report`: one page that needs no other file, of what is stored and of few images that are attacked for it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_train import checkpoint, cli, report
from atlas_train.compare import compare
from atlas_train.config import TrainConfig
from atlas_train.data import DataSplits
from atlas_train.page import measured as measuring
from atlas_train.page.build import Page, page_of
from atlas_train.page.png import png
from atlas_train.targets import evaluate_target
from tiny_runs import TINY, splits

pytest.importorskip("tyro")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
NAMES = ("left", "a <b>", "<script>alert(1)</script>", 'it\'s "&"')


def named() -> DataSplits:
    return replace(splits(), class_names=NAMES)


def page(*paths: object, **how: Any) -> Page:
    asked: dict[str, Any] = {"splits": named(), "images": 20, "gallery": 2, "device": "cpu", "say": lambda text: None}
    return page_of([str(path) for path in paths], **asked | how)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    settings = TINY | {"epochs": 2, "train_size": 32, "beside": ("standard",), "out_dir": str(root / "two")}
    compare(
        TrainConfig(**settings), splits=splits(), show="silent", say=lambda text: None, command=("atlas", "<train>")
    )
    return root / "two"


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "STEPS", 2)


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    return Path("two")


class Reader(HTMLParser):
    """The tags, the attributes that load something, and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[tuple[str, str]] = []
        self.sections: dict[str, str] = {}
        self._at, self._heading = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        loads = [(dict(attrs).get("alt") or "", value) for key, value in attrs if key in ("src", "href", "srcset")]
        self.sources += [(alt, value or "") for alt, value in loads]
        self._heading = tag == "h2"

    def handle_data(self, data: str) -> None:
        if self._heading:
            self._at, self._heading = data, False
        self.sections[self._at] = self.sections.get(self._at, "") + data


def test_a_page_is_one_file_with_all_sections(runs: Path) -> None:
    made = page(runs)
    read = Reader(made.html)
    assert [name for name in read.sections if name][:3] == ["Figures", "Learning curves", "Robust accuracy against eps"]
    assert not {"script", "link", "iframe", "object"} & read.tags and not made.left_out
    assert "default-src 'none'" in made.html and "@import" not in made.html and "url(" not in made.html
    for _, source in read.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    stored = json.loads((runs / "atlas" / "evaluation.json").read_text())
    assert f"{100 * stored['pgd']:.1f} %" in read.sections["Figures"]
    assert {alt for alt, _ in read.sources} >= {"learning curves", "accuracy over eps linf", "time against accuracy"}
    assert set(made.pictures) == {"learning-curves", "accuracy-over-eps-linf", "time-against-accuracy"}
    last = read.sections["Command, environment, configuration"]
    assert "atlas '<train>'" in last and f'"torch": "{torch.__version__}"' in last and '"local_weight"' in last


def test_what_is_text_is_escaped(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_train.page.build.has_matplotlib", lambda: False)
    runs = runs.rename("<img src=x onerror=alert(1)>")
    made = page(runs / "atlas")
    assert "<script" not in made.html and "<img src=x" not in made.html and "<train>" not in made.html
    by_class = Reader(made.html).sections["Accuracy by class"]
    assert all(name in by_class for name in NAMES)


def test_figures_by_class_and_over_eps_are_those_of_so_many_images(runs: Path) -> None:
    made = Reader(page(runs / "atlas", images=20).html)
    told = "PGD-2 on 20 test images, made for this page (seed 0); eps of the run 0.1 (l_inf)"
    assert told in made.sections["Accuracy by class"] and told in made.sections["Robust accuracy against eps"]
    how: dict[str, Any] = {"size": 20, "splits": named(), "eps": (0.1,), "say": lambda text: None}
    found, _ = evaluate_target(str(runs / "atlas"), ("pgd-2",), **how)
    for row in found.class_table("markdown").splitlines()[2:]:
        name, _, clean, robust = (cell.strip() for cell in row.strip("| ").split(" | "))
        assert re.search(rf"{re.escape(name)}\s+{clean}\s+{robust}", made.sections["Accuracy by class"])


def test_what_evaluate_has_stored_is_not_measured_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"size": 12, "splits": named(), "eps": (0.05, 0.1), "say": lambda text: None}
    found, _ = evaluate_target(str(runs / "atlas"), ("fgsm",), **how)
    (runs / "atlas" / "mine.json").write_text(json.dumps(found.to_dict()))
    monkeypatch.setattr(measuring, "_evaluated", lambda *args: pytest.fail("measured again"))
    read = Reader(page(runs / "atlas").html)
    for section in ("Accuracy by class", "Robust accuracy against eps"):
        assert "12 test images, from mine.json" in read.sections[section]


def test_the_gallery_is_drawn_by_seed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_train.page.build.has_matplotlib", lambda: False)  # plots take their time
    first, again, other = (Reader(page(runs / "atlas", images=0, seed=seed).html) for seed in (0, 0, 1))
    pixels = [[s for s in read.sources if not s[0].endswith(("curves", "linf"))] for read in (first, again, other)]
    assert pixels[0] == pixels[1] != pixels[2] and len(pixels[0]) == 6
    text = " ".join(first.sections["Adversaries"].split())
    numbers = [int(number) for number in re.findall(r"image (\d+): ", text)]
    labels = named().test.labels[numbers].tolist()
    assert all(f"image {n}: {NAMES[label]}" in text for n, label in zip(numbers, labels, strict=True))
    assert re.search(r"[012] of 2 are classified wrongly after the attack", text)
    assert "left out: no folder holds it, and nothing was measured" in first.sections["Accuracy by class"]


def test_adversaries_are_in_the_ball_and_said_as_the_network_says(runs: Path) -> None:
    how: dict[str, Any] = {"images": 0, "gallery": 4, "seed": 3, "device": "cpu", "threads": 1, "splits": named()}
    found = measuring.measured(str(runs / "atlas"), say=print, **how)
    network, _ = checkpoint.load_model(runs / "atlas")
    for each in found.gallery:
        assert (each.adversary - each.image).abs().max() <= found.eps + 1e-6
        for pixels, (label, share) in ((each.image, each.clean), (each.adversary, each.attacked)):
            probabilities = network(pixels[None]).detach().softmax(1)[0]
            assert int(probabilities.argmax()) == label and float(probabilities.max()) == pytest.approx(share, abs=1e-4)


def test_collapses_are_marked(runs: Path) -> None:
    path = runs / "atlas" / "last.pt"
    state = torch.load(path, weights_only=True)
    state["history"][0] |= {"val_clean": 0.9}
    state["history"][1] |= {"val_clean": 0.1}
    checkpoint.save(path, state)
    (runs / "atlas" / "evaluation.json").unlink()  # which says itself what collapsed
    read = Reader(page(runs / "atlas", images=0, gallery=0).html)
    assert "! atlas collapsed in epoch 2: " in read.sections["Learning curves"]
    assert "No collapse" in Reader(page(runs / "standard", images=0, gallery=0).html).sections["Learning curves"]
    figure = report.curves_figure({"a": state["history"]}, {"a": [2]})
    marks = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [2, 2]]
    assert len(marks) == 1


def test_without_matplotlib_plots_are_left_out_by_name(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    made = page(runs)
    read = Reader(made.html)
    assert "it needs matplotlib, which is not installed" in read.sections["Learning curves"]
    assert made.left_out == ["plots: matplotlib is not installed"] and not made.pictures
    assert len(read.sources) == 2 * 3 * 2  # the adversaries


def test_the_command_writes_a_page_although_the_data_are_missing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(runs / "atlas"), "--pngs", "plots", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert text.count("! left out: atlas: ") == 1 and "--dataset package.module:factory" in text
    assert re.fullmatch(r"two/atlas/report.html: [\d.]+ MB, all in one file: .*", text.splitlines()[-1])
    written = (runs / "atlas" / "report.html").read_text()
    assert "left out: atlas: " in html.unescape(written) and Path("plots/learning-curves.png").exists()
    assert cli.main(["report", "nowhere"]) == 2 and "nowhere does not exist" in capsys.readouterr().err
    assert not Path("report.html").exists()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_png_is_read_as_it_was(channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    read = image.open(io.BytesIO(png(pixels.float() / 255)))
    assert (read.mode, read.size) == ("RGB" if channels == 3 else "L", (7, 5))
    shown = torch.tensor(list(read.tobytes())).view(5, 7, -1).permute(2, 0, 1)
    assert (shown - (pixels if channels != 2 else pixels.float().mean(0))).abs().max() <= 1
