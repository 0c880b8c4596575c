"""Checkpoints, exported networks and configuration files, edited everywhere: taken, or refused in one clear line."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_train import checkpoint, cli, engine, schema
from atlas_train.compare import _kept
from atlas_train.config import TrainConfig, from_dict, from_file, to_dict
from atlas_train.evaluate import Evaluation
from atlas_train.imported import require_trusted
from atlas_train.results import Result, table
from tiny_runs import TINY, splits

SMALL = TINY | {"epochs": 1, "width": 2, "batch_size": 32, "probe_size": 0}
#: Of each kind that a file can hold, and none that it should hold everywhere.
VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 10**9, 2**63, 10**400, 1e300, -0.5, float("nan"), float("inf"), "", "x", "a" * 5000,
    "\x1b[31m\n", [], [1], ["x"], {}, {"a": 1}, {1: 2},
]  # fmt: skip
TENSORS = [
    torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(1).expand(10**9),
    torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64),
    torch.zeros(5056, dtype=torch.uint8),
]  # fmt: skip
DELETED = object()
Where = tuple[Any, ...]


def places(value: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    """Every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*where, key), inner
        yield from places(inner, (*where, key))


def edited(value: Any, where: Where, new: Any) -> Any:
    """A copy with another value there, or none."""
    if not where:
        return new
    copied, (key, *rest) = value.copy(), where
    if new is DELETED and not rest:
        del copied[key]
    else:
        copied[key] = edited(copied[key] if rest else None, tuple(rest), new)
    return copied


def edits(value: Any, tensors: bool) -> Iterator[tuple[Where, Any]]:
    for where, old in places(value):
        yield from ((where, new) for new in (DELETED, *VALUES, *(TENSORS if tensors else ())))
        if isinstance(old, Tensor):
            shapes = [old.flatten(), old[..., :1]] if old.dim() else [old[None]]
            yield from ((where, new) for new in [*shapes, old.half(), old.bool(), old.to(torch.complex64), old * 1e30])
        if isinstance(old, (int, float)) and not isinstance(old, bool):
            yield from ((where, new) for new in (old + 1, old * 1000, str(old)))
        if isinstance(old, list):
            yield where, old + old
        if isinstance(old, dict):
            yield (*where, "another"), 1


@dataclass
class Outcomes:
    """How often an edit was taken, and how often it was refused."""

    taken: int = 0
    refused: int = 0

    def see(self, call: Callable[[], object], what: object) -> None:
        try:
            call()
            self.taken += 1
        except (ValueError, FileNotFoundError, engine.NonFiniteLoss) as error:
            text = str(error)
            assert text.isprintable() and 10 < len(text) < 700, (what, text)
            self.refused += 1
        except Exception as error:
            raise AssertionError(f"{what} ended in {error!r}") from error


@pytest.fixture(scope="module", params=["mma", "free"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of which every part of a checkpoint is used."""
    more = {"mma": {}, "free": {"averaging": "ema", "optimizer": "sgd"}}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    engine.train(TrainConfig(**SMALL | {"method": request.param} | more), splits=splits(), folder=folder)
    return folder


def go_on(path: Path, epochs: int) -> None:
    """What ``atlas train --resume`` does with a file; with one epoch, all but training."""
    config = from_dict(checkpoint.load(path, ("arch", "config"))["config"], str(path))
    require_trusted("model", config.model, path)
    config = replace(config, resume=str(path), epochs=epochs, threads=1)
    if epochs > 1:
        engine.train(config, splits=splits(), folder=path.parent / "more")
    else:
        engine.start(config, splits(), None, None)


def sample(edits: Iterator[tuple[Where, Any]], count: int) -> list[tuple[Where, Any]]:
    """Some of the edits, of each part of a file alike: there are many tensors and few numbers."""
    parts: dict[Where, list[tuple[Where, Any]]] = {}
    for where, new in edits:
        parts.setdefault(tuple("" if isinstance(key, int) else key for key in where[:2]), []).append((where, new))
    dice = random.Random(0)
    for part in parts.values():
        dice.shuffle(part)
    return [part[n] for n in range(count) for part in parts.values() if n < len(part)][:count]


def test_an_edited_checkpoint_is_taken_or_refused(saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved / "last.pt", weights_only=True)
    path, seen = tmp_path / "last.pt", Outcomes()
    for where, new in sample(edits(state, True), 60):
        torch.save(edited(state, where, new), path)
        seen.see(lambda: checkpoint.load_model(path), ("evaluate", where, new))
        before = seen.refused
        seen.see(lambda: go_on(path, 1), ("resume", where, new))
        if seen.refused == before and where[0] in ("memory", "optimizer", "average", "rng", "history"):
            seen.see(lambda: go_on(path, 2), ("resume and train", where, new))
    assert seen.refused > 60 and seen.taken > 3


def test_a_tensor_whose_places_are_one_place_is_refused() -> None:
    assert schema._tensor(torch.zeros(8)) and schema._tensor(torch.zeros(1, 8).expand(1, 8))
    assert not schema._tensor(torch.zeros(8)[:1].expand(8))


@pytest.mark.parametrize("method", ["fgsm_pgi", "fgsm_uap", "liet", "free"])
def test_what_a_method_remembers_has_a_type_that_runs_keep(method: str, tmp_path: Path) -> None:
    engine.train(TrainConfig(**SMALL | {"method": method}), splits=splits(), folder=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for dtype in (torch.float64, torch.float16, torch.float8_e5m2):
        memory = {name: value.to(dtype) for name, value in state["memory"].items()}
        torch.save(state | {"memory": memory}, tmp_path / "edited.pt")
        with pytest.raises(ValueError, match=f"memory [a-z_]+ is {dtype}, and a run keeps float32 or bf.*: edited or"):
            go_on(tmp_path / "edited.pt", 1)


def test_every_entry_of_a_checkpoint_is_checked_before_anything_is_built(saved: Path) -> None:
    state = torch.load(saved / "last.pt", weights_only=True)
    seen = Outcomes()
    for where, new in sample(edits(state, True), 800):
        if where[0] != "format":
            changed = edited(state, where, new)
            seen.see(lambda: schema.require_checkpoint(changed, "last.pt", ("model",)), (where, new))  # noqa: B023
    assert seen.refused > 200 and seen.taken > 100


def test_an_edited_configuration_is_taken_or_refused(tmp_path: Path) -> None:
    config = TrainConfig(hyper={"radius": 0.1, "steps": 2, "adv.steps": 3}, beside=("adv",), eps=0.1, lr=0.1)
    values, path, seen = to_dict(config), tmp_path / "c.json", Outcomes()
    for where, new in sample(edits(values, False), 500):
        path.write_text(json.dumps(edited(values, where, new)))
        seen.see(lambda: from_file(path), (where, new))
    assert seen.refused > 300 and seen.taken > 50
    for text in (
        "",
        "{",
        "[]",
        "1",
        "null",
        "[" * 10**5,
        "1" * 5000,
        '{"seed": ' + "1" * 5000 + "}",
        '{"a": 1, "a": 1}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="config file .*c.json"):
            from_file(path)
    for content in (b"\xff\xfe{}", b"\0", b"\xef\xbb\xbf{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="config file .*c.json is not JSON"):
            from_file(path)


def test_an_edited_evaluation_is_taken_or_made_anew(tmp_path: Path) -> None:
    result = Result(Evaluation(0.5, 0.25, 0.125, 100, 0.1, 20, 0.01, 1, 1.0, "cpu"), 60.0, 6.0, 23.0, 2)
    rescue = {"epoch": 3, "back_to": 2, "sign": "it fell", "changed": {"steps": [1, 2], "step_size": [0.1, 0.05]}}
    result = replace(result, best=replace(result, epoch=2), epoch=3, rule="the highest", validation_share=0.1)
    result = replace(result, collapses=[[3, "it fell"]], rescues=[rescue], ended="collapsed")
    values, path, taken = result.to_dict() | {"of": {"a": 1}}, tmp_path / "evaluation.json", 0
    for where, new in sample(edits(values, False), 300):
        path.write_text(json.dumps(edited(values, where, new)))
        if kept := _kept(path, {"a": 1}):
            assert table({"adv": kept})
            taken += 1
    assert 20 < taken < 200
    for text in ("", "[]", "null", "1", "[" * 10**5, "{}"):
        path.write_text(text)
        assert _kept(path, {"a": 1}) is None


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_an_edited_export_is_taken_or_refused(saved: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    torch_files = pytest.importorskip("safetensors.torch")
    with safetensors.safe_open(saved / "model.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["atlas"])
    weights, path, seen = torch_files.load_file(saved / "model.safetensors"), tmp_path / "m.safetensors", Outcomes()
    texts = [json.dumps(edited(description, *edit)) for edit in sample(edits(description, False), 250)]
    for text in ["", "{", "[]", "null", "1", "[" * 10**5, *texts]:
        torch_files.save_file(weights, path, metadata={"atlas": text, "format": "pt"})
        seen.see(lambda: checkpoint.load_model(path), text)
    assert seen.refused > 80 and seen.taken > 20


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
@pytest.mark.parametrize("file", ["last.pt", "model.safetensors"])
def test_a_damaged_file_is_taken_or_refused(saved: Path, tmp_path: Path, file: str) -> None:
    pytest.importorskip("safetensors")
    whole, path, seen, dice = (saved / file).read_bytes(), tmp_path / file, Outcomes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        start = dice.choice((0, len(whole) - 4000))  # where the lists of contents are
        for _ in range(dice.choice((1, 30))):
            damaged[start + dice.randrange(4000)] = dice.randrange(256)
        path.write_bytes(damaged[: dice.choice((len(whole), dice.randrange(len(whole))))])
        seen.see(lambda: checkpoint.load_model(path), file)
    assert seen.refused > 20


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_a_flipped_bit_of_a_weight_is_refused(saved: Path, tmp_path: Path) -> None:
    damaged = bytearray((saved / "last.pt").read_bytes())
    weight = checkpoint.load(saved)["model"]["conv2.weight"].numpy().tobytes()
    damaged[damaged.index(weight) + len(weight) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(damaged)
    for call in (checkpoint.load_model, lambda folder: go_on(folder / "last.pt", 1)):
        with pytest.raises(ValueError, match="last.pt is damaged: the checksum of its part '.*data/[0-9]*' is wrong"):
            call(tmp_path)


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_checkpoints_have_checksums_where_others_switch_them_off(saved: Path, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint.save(tmp_path / "last.pt", checkpoint.load(saved))
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.load(tmp_path).keys() == checkpoint.load(saved).keys()


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved: Path, tmp_path: Path, value: float) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    state = checkpoint.load(saved)
    state["model"]["conv2.weight"][0, 0] = value
    checkpoint.save(tmp_path / "last.pt", state)
    about = {"atlas": json.dumps({"arch": state["arch"], "config": state["config"]}), "format": "pt"}
    torch_files.save_file(state["model"], tmp_path / "model.safetensors", metadata=about)
    for file in ("last.pt", "model.safetensors"):
        with pytest.raises(ValueError, match=f"{file}: .*conv2.weight.* NaN"):
            checkpoint.load_model(tmp_path / file)
    with pytest.raises(ValueError, match="last.pt: .*conv2.weight.* NaN"):
        go_on(tmp_path / "last.pt", 1)


def test_a_mask_of_infinities_that_a_network_is_made_with_is_no_damage() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    checkpoint.load_weights(model, model.state_dict(), "a file")


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_nothing_is_built_of_sizes_that_the_file_does_not_hold(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(saved / "last.pt", weights_only=True)

    def build(*_: Any, **sizes: Any) -> None:
        raise AssertionError(f"a network of {sizes} was built")

    for width in (3, 500, 10**6, 2**52):
        wide = edited(edited(state, ("arch", "width"), width), ("config", "width"), width)
        torch.save(wide, tmp_path / "last.pt")
        for call in (checkpoint.load_model, lambda folder: go_on(folder / "last.pt", 1)):
            with pytest.raises(ValueError, match="last.pt"), monkeypatch.context() as patch:
                patch.setattr(nn.Parameter, "__new__", no_memory(nn.Parameter.__new__))
                call(tmp_path)


def no_memory(new: Callable[..., Any]) -> Callable[..., Any]:
    """``nn.Parameter``, which may hold no more than a kilobyte outside of the meta device."""

    def checked(cls: type, data: Tensor, *more: Any, **named: Any) -> Any:
        assert data.is_meta or data.nbytes < 1000, f"{list(data.shape)} was built"
        return new(cls, data, *more, **named)

    return checked


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_a_compressed_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    """A file of a kilobyte that unpacks to gigabytes: ours are stored as they are."""
    with (
        zipfile.ZipFile(saved / "last.pt") as whole,
        zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for member in whole.infolist():
            z.writestr(member.filename, whole.read(member))
        z.writestr("archive/data/999", bytes(10**6))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_names_of_the_file_and_in_it_are_shown_in_plain_characters(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31m\nb"
    folder.mkdir()
    state = torch.load(saved / "last.pt", weights_only=True)
    for where, new in sample(edits(state, True), 20):
        torch.save(edited(state, where, new), folder / "last.pt")
        Outcomes().see(lambda: checkpoint.load_model(folder), (where, new))
        Outcomes().see(lambda: go_on(folder / "last.pt", 1), (where, new))


@pytest.mark.parametrize("saved", ["mma"], indirect=True)
def test_the_command_line_ends_with_one_line_and_status_2(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    state = torch.load(saved / "last.pt", weights_only=True)
    path = saved / "edited.pt"
    torch.save(edited(state, ("arch", "width"), 10**400), path)
    Path(saved / "c.json").write_text('{"width": 1e300, "threads": 100000}')
    for command in (
        ["evaluate", str(path)],
        ["train", "--resume", str(path)],
        ["train", "--config", str(saved / "c.json")],
    ):
        assert cli.main(command) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and "must be" in shown.err and not shown.out
