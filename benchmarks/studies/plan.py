"""What the study of ATLAS runs: beds, recipes, and the queue of them, each run a ``TrainConfig`` of the library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atlas_train.config import TrainConfig
from atlas_train.data import OfEps
from atlas_train.options import number

Judge = Literal["screen", "test"]
JUDGES: tuple[Judge, ...] = ("screen", "test")
QUEUE = Path(__file__).with_name("queue.json")
#: Of every run. A run that collapses ends, and its row says so; best.pt is chosen by validation alone.
SHARED: dict[str, Any] = {
    "beside": (), "augment": True, "val_size": 1000, "probe_size": 256, "on_collapse": "stop",
    "label_smoothing": 0.4, "averaging": "ema", "ema_warmup": False, "best_of": "either",
    "train_precision": "auto", "attack_precision": "auto", "channels_last": True,
}  # fmt: skip
#: An average remembers 1 / (1 - decay) steps: this share of the run, as that of the protocol does of 100 epochs.
REMEMBERED = 0.05


@dataclass(frozen=True)
class Bed:
    """A data set, a network and a schedule. images: trained on in an epoch. screen, test: how many images judge."""

    settings: Mapping[str, Any]
    images: int
    screen: int
    test: int
    batch_size: int = 128
    needs_gpu: bool = False


_PROTOCOL: dict[str, Any] = {"protocol": "fastat"}
BEDS: dict[str, Bed] = {
    # Where the default collapses within minutes on a CPU, at 16/255.
    "cpu": Bed(
        {"dataset": "cifar10", "train_size": 10_000, "model": "preact_resnet18", "width": 16}, 10_000, 1000, 5000
    ),
    "half": Bed({**_PROTOCOL, "train_size": 25_000, "width": 32}, 25_000, 1000, 10_000),
    "full": Bed(_PROTOCOL, 49_000, 1000, 10_000, needs_gpu=True),
    "mnist": Bed({"dataset": "mnist", "train_size": 10_000, "augment": False}, 10_000, 1000, 10_000),
    # Another look than CIFAR-10, and with scikit-learn on every machine.
    "digits": Bed({"dataset": "digits", "val_size": 129, "augment": False, "threads": 1}, 1168, 129, 500, 64),
}

#: The forms of ATLAS that look at the start of the attack. The centre of the study is FGSM-PGI itself where there are
#: ten classes: its start, and squared logits of weight 1. Every other row changes one thing.
_START: dict[str, Any] = {
    "local": "start", "start_noise": "pgi", "local_objective": "logit", "local_weight": 1.0, "keep": "first",
    "step_size": OfEps(1.0),
}  # fmt: skip


#: A weight of 1 until the learning rate has its peak, and growing to 3 as the rate falls.
_GROWS: dict[str, Any] = {"local_weight": 3.0, "local_ramp": 0.5, "local_ramp_start": 0.5, "local_ramp_low": 1 / 3}


def _start(**changed: Any) -> dict[str, Any]:
    return {"method": "atlas", "hyper": _START | changed}


#: The default of ATLAS before the study. It is written out here, so it stays when the default changes; its lengths are
#: those of the data set.
_OLD: dict[str, Any] = {
    "local": "neighbours", "start_noise": "uniform", "local_objective": "kl", "global_term": "kl", "bn": "joint",
}  # fmt: skip


def _atlas(**hyper: Any) -> dict[str, Any]:
    return {"method": "atlas", "hyper": _OLD | hyper}


def _adv(steps: int) -> dict[str, Any]:
    """A step of 1.25 eps in all, up to four steps; ten as published."""
    return {"method": "adv", "hyper": {"steps": steps, "step_size": OfEps(1.25 / steps if steps < 10 else 0.25)}}


def _stored(**hyper: Any) -> dict[str, Any]:
    return {"method": "stored_adv", "hyper": {"local_weight": 0.0, "step_size": OfEps(1.0)} | hyper}


#: By name what each sets.
RECIPES: dict[str, dict[str, Any]] = {
    "start": _start(),
    # another tie, weights constant or growing
    "start-js20": _start(local_objective="js", local_weight=20.0),
    "start-js20-ramp": _start(local_objective="js", local_weight=20.0, local_ramp=1.0),
    "start-js100-ramp": _start(local_objective="js", local_weight=100.0, local_ramp=1.0),
    "start-kl1": _start(local_objective="kl"),
    "start-kl3": _start(local_objective="kl", local_weight=3.0),
    "start-prob10": _start(local_objective="prob", local_weight=10.0),
    "start-ramp": _start(local_ramp=1.0),
    "start-grows": _start(**_GROWS),
    "start-late": _start(local_ramp=0.5, local_ramp_start=0.5),
    "start-w0.1": _start(local_weight=0.1),
    "start-w0.3": _start(local_weight=0.3),
    "start-w3": _start(local_weight=3.0),
    "start-no-tie": _start(local_weight=0.0),
    # another start
    "start-liet": _start(start_noise="liet"),
    "start-liet-js20-ramp": _start(start_noise="liet", local_objective="js", local_weight=20.0, local_ramp=1.0),
    "start-wide": _start(start_noise="wide"),
    "start-uniform": _start(start_noise="uniform"),
    "start-uniform-1.25": _start(start_noise="uniform", step_size=OfEps(1.25)),
    # a global term; an attack of two steps
    "start-global": _start(global_term="kl"),
    "start-global-ce": _start(global_term="ce"),
    "start-2-steps": _start(steps=2, step_size=OfEps(0.625)),
    # other iterates of the attack, as constants or with a gradient of their own
    "start-2-steps-all": _start(steps=2, step_size=OfEps(0.625), iterates="all"),
    "start-2-steps-constants": _start(steps=2, step_size=OfEps(0.625), iterates="all", keep="none"),
    "start-2-steps-kept": _start(steps=2, step_size=OfEps(0.625), iterates="all", keep="all"),
    "start-constant": _start(keep="none"),
    "start-constant-kl1": _start(keep="none", local_objective="kl"),
    "start-constant-w0.1": _start(keep="none", local_weight=0.1),
    "start-constant-w0.3": _start(keep="none", local_weight=0.3),
    "start-constant-w0": _start(keep="none", local_weight=0.0),
    "start-constant-w0-ls0": _start(keep="none", local_weight=0.0) | {"label_smoothing": 0.0},
    "start-uniform-2-steps-all": _start(start_noise="uniform", steps=2, step_size=OfEps(0.625), iterates="all"),
    "start-uniform-2-steps-constants": _start(
        start_noise="uniform", steps=2, step_size=OfEps(0.625), iterates="all", keep="none"
    ),
    # a further point, between image and adversary
    "start-segment": _start(segment_weight=1.0),
    "start-segment-kl": _start(segment_weight=1.0, segment_objective="kl"),
    "start-segment-logit": _start(segment_weight=1.0, segment_objective="logit"),
    "start-uniform-segment": _start(start_noise="uniform", segment_weight=1.0),
    # smoothing and averaging
    "start-ls0": _start() | {"label_smoothing": 0.0},
    "start-ls0.6": _start() | {"label_smoothing": 0.6},
    "start-raw": _start() | {"averaging": "none"},
    # forms that do not look at the start: the old default first
    "atlas": _atlas(),
    "atlas-worst": _atlas(local="worst"),
    "segment": _atlas(local="segment", local_objective="ce"),
    "segment-kl3": _atlas(local="segment", local_weight=3.0),
    "segment-logit": _atlas(local="segment", local_objective="logit"),
    "segment-grows": _atlas(local="segment", local_objective="ce", **_GROWS),
    "segment-no-global": _atlas(local="segment", local_objective="ce", global_term="none"),
    "segment-2-points": _atlas(local="segment", local_objective="ce", global_term="none", count=2),
    "atlas-wide": _atlas(start_noise="wide", step_size=OfEps(1.0)),
    "atlas-step1": _atlas(step_size=OfEps(1.0)),
    "atlas-split": _atlas(bn="split"),
    "atlas-global3": _atlas(global_weight=3.0),
    "atlas-local3": _atlas(local_weight=3.0),
    "atlas-grows": _atlas(**_GROWS),
    "atlas-2-points": _atlas(count=2),
    "atlas-jacobian": _atlas(local="jacobian"),
    "atlas-10-steps": _atlas(steps=10, step_size=OfEps(0.25)),
    # no attack: a stored perturbation, which the training's own backward moves
    "stored_adv": _stored(),
    "stored_adv-logit1": _stored(local_weight=1.0),
    "stored_adv-logit0.1": _stored(local_weight=0.1),
    "stored_adv-kl3": _stored(local_weight=3.0, local_objective="kl"),
    "stored_adv-logit3": _stored(local_weight=3.0),
    "stored_adv-step2": _stored(local_weight=1.0, step_size=OfEps(2.0)),
    "stored_adv-decay0.9": _stored(local_weight=1.0, decay=0.9),
    "stored_adv-2-replays": _stored(local_weight=1.0, replays=2),
    # rivals
    "adv-1": {"method": "one_step_adv"},
    "adv-2": _adv(2),
    "adv-3": _adv(3),
    "adv-4": _adv(4),
    "adv-10": _adv(10),
    "n_fgsm": {"method": "n_fgsm"},
    "liet": {"method": "liet", "label_smoothing": 0.0},  # it has a smoothing of its own
    "fgsm_pgi": {"method": "fgsm_pgi"},
    "fgsm_uap": {"method": "fgsm_uap"},
    "fgsm_cuap": {"method": "fgsm_uap", "hyper": {"per_class": True}},
    "nuat": {"method": "nuat", "hyper": {"code": "fastat"}},
    "grad_align": {"method": "grad_align"},
    "backward_smoothing": {"method": "backward_smoothing"},
    "trades-10": {"method": "trades", "hyper": {"steps": 10, "step_size": OfEps(0.25), "beta": 6.0}},
    "trades-10-b1": {"method": "trades", "hyper": {"steps": 10, "step_size": OfEps(0.25), "beta": 1.0}},
    "trades-10-b3": {"method": "trades", "hyper": {"steps": 10, "step_size": OfEps(0.25), "beta": 3.0}},
    "adr": {"method": "adr", "hyper": {"steps": 10, "step_size": OfEps(0.25)}},
    "gairat": {"method": "gairat", "hyper": {"steps": 10, "step_size": OfEps(0.25)}},
}


@dataclass(frozen=True, order=True)
class Planned:
    """A run of the study, and by which images it is judged. eps: as it is written, 8/255 or 0.3."""

    bed: str
    epochs: int
    eps: str
    recipe: str
    seed: int
    judge: Judge = "screen"

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.bed, BEDS, "bed"), (self.recipe, RECIPES, "recipe"), (self.judge, JUDGES, "judge"),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{what}: {value!r} is not known: choose one of {', '.join(known)}")
        if not 0 < number(self.eps) < 1:
            raise ValueError(f"eps: must be in (0, 1), got {self.eps}: write 8/255 instead of 8")
        if self.epochs < 1 or self.seed < 0:
            raise ValueError(f"epochs must be at least 1 and seed at least 0, got {self.epochs} and {self.seed}")

    @property
    def name(self) -> str:
        """Of its training: runs that differ in the judge alone have one."""
        return f"{self.bed}-{self.epochs}e-{self.eps.replace('/255', 'of255')}-{self.recipe}-s{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What the run sets; all else is the library's default."""
        bed, eps = BEDS[self.bed], number(self.eps)
        recipe = RECIPES[self.recipe]
        hyper = {key: v * eps if isinstance(v, OfEps) else v for key, v in recipe.get("hyper", {}).items()}
        steps = self.epochs * (bed.images // bed.batch_size)
        of_run = {"epochs": self.epochs, "eps": eps, "seed": self.seed, "batch_size": bed.batch_size}
        of_run["ema_decay"] = round(1 - 1 / max(REMEMBERED * steps, 2.0), 6)
        return {**SHARED, **bed.settings, **of_run, **recipe, "hyper": hyper}

    def config(self, **more: Any) -> TrainConfig:
        """The settings, and where the run's files are and what it runs on."""
        return TrainConfig(**self.settings | more)

    @property
    def given(self) -> str:
        """The settings as text, by which a row is known: a recipe that was changed is another run."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def folder(self) -> str:
        return f"{self.name}-{hashlib.sha256(self.given.encode()).hexdigest()[:8]}"


def named(text: str, judge: Judge) -> Planned:
    """The run of that name, as ``Planned.name`` writes it."""
    parts = text.split("-")
    try:
        bed, epochs, eps, *recipe, seed = parts
        if not (epochs.endswith("e") and seed.startswith("s") and recipe):
            raise ValueError
        found = Planned(bed, int(epochs[:-1]), eps.replace("of255", "/255"), "-".join(recipe), int(seed[1:]), judge)
    except ValueError as error:
        reason = f" ({error})" if str(error) and len(parts) > 4 else ""
        raise ValueError(
            f"run: {text!r} is no name of a run{reason}: write BED-EPOCHSe-EPS-RECIPE-sSEED, as in "
            "cpu-15e-16of255-start-s0"
        ) from error
    return found


def queue(path: Path = QUEUE) -> list[Planned]:
    """The runs of the file, most wanted first, each once: for each entry every seed with all its recipes in turn."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return list(dict.fromkeys(planned for entry in entries for planned in _of(entry, path)))


def _of(entry: Mapping[str, Any], path: Path) -> Iterator[Planned]:
    known = {"why", "bed", "epochs", "eps", "recipes", "seeds", "judge"}
    if unknown := entry.keys() - known:
        raise ValueError(f"{path}: no {', '.join(sorted(unknown))} in an entry (known: {', '.join(sorted(known))})")
    for eps in _several(entry["eps"]):
        for epochs in _several(entry["epochs"]):
            for seed in entry.get("seeds", [0]):
                for recipe in entry["recipes"]:
                    yield Planned(entry["bed"], epochs, eps, recipe, seed, entry.get("judge", "screen"))


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]
