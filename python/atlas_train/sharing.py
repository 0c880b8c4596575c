"""A trained network as a folder for others: weights, what they are, and a model card with the figures behind them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from . import checkpoint, data, hub, tables
from .compare import EVALUATION
from .comparison import value_in_words
from .config import from_record, recorded
from .imported import is_import_path
from .options import plain, radius
from .records import Record, found, read
from .results import Result
from .robustness.named import CLEAN, named
from .writing import builtin, write_json, write_text

CONFIG, CARD = "config.json", "README.md"
#: In config.json, by which such a folder is known.
KIND = "atlas-kernels network"


def load_model(
    path: str | os.PathLike[str], model: nn.Module | str | None = None, *, trust: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run, of an exported folder or of "hf:org/name", in eval mode on the CPU, and its settings.

    It takes images in [0, 1], [N, C, H, W], and gives logits. model: the network, or its import path, where it is of
    your own. trust: the code that the folder names may be run, also code that is downloaded with it. Raises as
    ``checkpoint.load_model``; ImportError where the Hub needs huggingface_hub.
    """
    if trust and model is None:
        path, model = trusted(path)
    return checkpoint.load_model(path, model)


def trusted(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The folder of a network that is trusted, and the import path of its code, None where that is ours.

    A file of code is looked for in the folder alone.
    """
    folder = hub.downloaded(path, code=True) if hub.is_on_hub(path) else Path(path)
    holder = folder if folder.is_dir() else folder.parent
    name = str(checkpoint.facts(checkpoint.locate(folder).parent)["arch"]["name"])
    if not is_import_path(name):
        return folder, None
    where, _, factory = name.rpartition(":")
    if not where.endswith(".py"):
        return folder, name
    file = holder / PurePath(where).name
    if not file.is_file():
        raise FileNotFoundError(
            f"{plain(folder)} names its network {plain(name)}, and holds no {plain(file.name)}: --model"
        )
    return folder, f"{file}:{factory}"


def export(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """A folder with the network of a run: model.safetensors, config.json, evaluation.json if there is one, README.md.

    run: its folder, whose last epoch it is, or one of its files: best.pt, say. out: a folder that is not there yet, or
    is empty; default: export, or export-best, in the run's folder. The folder is written whole or not at all. Raises
    FileExistsError, FileNotFoundError, ValueError for a damaged checkpoint, ImportError without safetensors.
    """
    file = checkpoint.locate(run)
    is_best = file.stem == "best"
    folder = Path(out) if out is not None else file.parent / ("export-best" if is_best else "export")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{plain(folder)} is there already: choose another folder (--out), or remove it")
    weights, state = checkpoint.bare(file)
    (path,) = found(file.parent)
    record = _of(read(path), checkpoint.fingerprint_of(weights), state, is_best)
    description = _description(state)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made.chmod(0o755)
        metadata = {"atlas": json.dumps(builtin(description)), "format": "pt"}
        checkpoint.export_weights(weights, made / checkpoint.WEIGHTS, metadata)
        write_json(made / CONFIG, _config(record, description))
        if record.result:
            write_json(made / EVALUATION, record.result.to_dict() | {"of": {"weights": record.weights}})
        for name, values in record.evaluations.items():
            write_json(made / name, {"evaluation": values})
        write_text(made / CARD, card(record, description))
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def push(folder: str | os.PathLike[str], name: str, *, private: bool = False, code: bool = False) -> str:
    """Uploads an exported folder as org/name; returns its address. code: its .py files too. Errors as ``hub.uploaded``,
    and ValueError for a folder that ``export`` did not write."""
    at = Path(folder)
    missing = [each for each in (checkpoint.WEIGHTS, CONFIG, CARD) if not (at / each).is_file()]
    if missing:
        raise ValueError(
            f"{plain(folder)} holds no {', '.join(missing)}: make it with atlas export RUN --out {plain(folder)}"
        )
    checkpoint.facts(at)
    return hub.uploaded(at, name, private, code)


def states_licence(folder: str | os.PathLike[str]) -> bool:
    """Whether the card of an exported folder names a licence at its top."""
    _, _, rest = (Path(folder) / CARD).read_text(encoding="utf-8").partition("---\n")
    return any(line.startswith("license:") for line in rest.partition("\n---")[0].splitlines())


def _of(record: Record, weights: str, state: Mapping[str, Any], is_best: bool) -> Record:
    """The record with the figures of the weights that are exported, and no others."""
    result: Result | None = record.result
    if result and is_best:
        result = result.best and replace(result.best, collapses=result.collapses, rule=result.rule)
    known = result is not None and result.epoch in (None, state.get("epoch", result.epoch))
    own = {name: values for name, values in record.evaluations.items() if values["weights"] == weights}
    return replace(record, result=result if known else None, weights=weights, evaluations=own, epoch=state.get("epoch"))


def _description(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata of the weights say: as a run's own model.safetensors, and of which epoch they are."""
    settings = recorded(from_record(state["config"]))
    kept = {key: state[key] for key in ("data", "answers", "epoch") if key in state}
    return {"arch": state["arch"], "config": settings, **kept}


def _config(record: Record, description: Mapping[str, Any]) -> dict[str, Any]:
    """The same for people and other programs, with the names of classes where they are known."""
    own = {key: value for key, value in description.items() if key != "answers"}
    return {
        "kind": KIND, "library_name": "atlas-kernels", **own, "class_names": class_names(record),
        "weights_sha256": record.weights, "versions": checkpoint.versions(),
    }  # fmt: skip


def class_names(record: Record) -> list[str] | None:
    """Of the data set, if it has some that are known without its files."""
    own, name = record.data.get("class_names"), str(record.data.get("name"))
    known = own or (data.get(name).class_names if name in data.names() else None)
    return list(known) if known else None


def card(record: Record, description: Mapping[str, Any]) -> str:
    """The text of README.md: which network it is, its figures and how each was measured, and how to load it."""
    settings, arch = record.settings, description["arch"]
    ball = radius(settings["eps"], settings["norm"]) if settings.get("eps") else "not stored"
    name, data_name = plain(arch["name"]), plain(record.data.get("name", settings.get("dataset")))
    shape = "x".join(map(str, (record.data.get("test") or {}).get("shape", ()))) or "[C, H, W]"
    facts = {
        "network": f"{name}, {arch['in_channels']} channels, {arch['num_classes']} classes"
        + (f", width {arch['width']}" if arch["width"] else ""),
        "trained on": f"{data_name}, {_images(record)}",
        "method": f"{record.label} ({', '.join(f'{k} {value_in_words(v)}' for k, v in settings['hyper'].items())})"
        if settings.get("hyper") else record.label,
        "threat model": ball,
        "epoch": str(record.epoch if record.epoch is not None else "not stored"),
        "command": f"`{plain(record.command)}`" if record.command else "not stored",
    }  # fmt: skip
    rows = [[key, _cell(value)] for key, value in facts.items()]
    parts = [
        "---\nlibrary_name: atlas-kernels\npipeline_tag: image-classification\ntags:\n- adversarial-robustness\n"
        "# license: not stated yet; whoever publishes this network states it here\n---",
        f"# {name} on {data_name}, {record.label}, eps {ball}",
        f"An image classifier trained to be robust. It takes images {shape} in [0, 1] and gives logits.",
        tables.markdown([["", ""], *rows]),
        "## Figures",
        *_figures(record),
        "## How to load it",
        "With the package atlas-kernels installed:",
        "```\natlas evaluate THIS-FOLDER --attacks autoattack\n```",
        "```python\nfrom atlas_train.sharing import load_model\n\n"
        f'model, config = load_model("THIS-FOLDER"{_own(arch)})  # eval mode; images in [0, 1] -> logits\n```',
        "THIS-FOLDER is this folder, or `hf:org/name` on the Hub.",
        "## Licence",
        "Not stated yet: whoever publishes this network states it here and at the top of this file.",
    ]
    return "\n\n".join(parts) + "\n"


def _own(arch: Mapping[str, Any]) -> str:
    """What must be given besides, for a network that is none of ours."""
    return "" if arch["by_name"] and not is_import_path(arch["name"]) else ", model=YOUR_NETWORK"


def _images(record: Record) -> str:
    """How many images it was trained on, and which."""
    train, settings = record.data.get("train") or {}, record.settings
    count = settings.get("train_size") or (train.get("images", 0) - (settings.get("val_size") or 0))
    return f"{count:,} images (sha256 of all training images {str(train.get('sha256', 'not stored'))[:16]})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _figures(record: Record) -> list[str]:
    """A table of accuracies, and what is to be said of them."""
    rows = [["attack", "eps", "test images", "accuracy", "from"]]
    if record.result:
        own = record.result.evaluation
        restarts = f", {own.pgd_restarts} restarts" if own.pgd_restarts > 1 else ""
        ball = radius(own.eps, own.norm)
        for title, eps, share in (
            ("none", "0", own.clean),
            ("FGSM", ball, own.fgsm),
            (f"PGD-{own.pgd_steps}{restarts}", ball, own.pgd),
        ):
            rows.append([title, eps, f"{own.images:,}", f"{100 * share:.1f} %", EVALUATION])
        if attacked := record.result.autoattack:
            title = f"AutoAttack, {attacked.version}" + (f" ({attacked.instead})" if attacked.instead else "")
            rows.append([title, ball, f"{attacked.images:,}", f"{100 * attacked.accuracy:.1f} %", EVALUATION])
    for file, values in record.evaluations.items():
        for each in values["attacks"]:
            title = "none" if each["attack"] == CLEAN else named(each["attack"])[-1].label
            if each["attack"] == "autoattack":
                title = f"AutoAttack, {each.get('version', 'standard')}"
            ball = "0" if each["eps"] is None else radius(each["eps"], values["norm"])
            rows.append([title, ball, f"{values['images']:,}", f"{100 * each['accuracy']:.1f} %", _cell(plain(file))])
    if len(rows) == 1:
        return ["None: these weights were not evaluated. `atlas evaluate THIS-FOLDER --attacks autoattack` does it."]
    notes = ["An accuracy under attack is an upper bound: a stronger attack may find more."]
    if not any(row[0] == "AutoAttack, standard" for row in rows):
        notes.append("AutoAttack (standard) was not run, so robust accuracy may be lower than these figures.")
    notes += [f"Training collapsed in epoch {epoch}: {sign}." for epoch, sign in _collapses(record)]
    return [tables.markdown(rows), *notes]


def _collapses(record: Record) -> Sequence[Sequence[Any]]:
    return record.result.collapses if record.result else ()
