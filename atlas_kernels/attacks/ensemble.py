"""Several attacks one after the other, each on the samples that still stand, and the judgement of what they find."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checks import class_indices
from ..layout import column
from ..outputs import logits_of, predicted
from . import saved
from .batch import Batch
from .examined import examine
from .execution import Execution, attacking
from .objective import Objective
from .pool import Pool
from .progress import Progress, counted, duration
from .search import Search
from .sound import distances, within

#: ``fooled_by`` of a sample that stands, and of one that is wrong as it is.
STANDS, CLEAN = -1, 0
_SAME_NETWORK = 0.01  # logits of the same weights: how far another device or thread count may bring them apart

Say = Callable[[str], None]


class Plan(Protocol):
    """What is run; see ``AutoAttack``."""

    @property
    def eps(self) -> float: ...
    @property
    def norm(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def searches(self, classes: int) -> tuple[dict[str, Search], tuple[str, ...]]: ...
    def key(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class AutoAttackRecord:
    """What was done, and what was found to hold for every adversary at the end.

    parts: their names, and what each is. accuracy: share of the samples that stand, "clean" and after each part.
    instead: what differs from the version as published. notes: what the warnings said. largest_norm, least, most: of
    adversaries; nan_adversaries: how many have a NaN. nan_logits: samples for which the network says nothing, clean or
    attacked. unconfirmed: adversaries that a last forward did not confirm, so that these samples stand.
    forwards, backwards: samples that went through the network, by part; "checks" is all but the attacks.
    """

    version: str
    norm: str
    eps: float
    seed: int
    samples: int
    search_precision: str
    batch_size: int
    parts: dict[str, str]
    accuracy: dict[str, float]
    instead: tuple[str, ...]
    notes: tuple[str, ...]
    largest_norm: float
    nan_adversaries: int
    least: float
    most: float
    nan_logits: int
    unconfirmed: int
    forwards: dict[str, int]
    backwards: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def merged(records: Sequence[AutoAttackRecord], fooled_by: Tensor) -> AutoAttackRecord:
    """The record of one run over the samples of all; the time is that of the longest."""
    first = records[0]
    changes: dict[str, Any] = {
        "accuracy": _accuracies(first.parts, fooled_by),
        "notes": tuple(dict.fromkeys(chain(*(record.notes for record in records)))),
    }
    fooled = [record for record in records if record.accuracy["clean"] > min(record.accuracy.values())]
    if fooled:  # of no adversaries there is no least pixel
        changes["least"] = min(record.least for record in fooled)
    together: dict[Callable[..., Any], tuple[str, ...]] = {
        max: ("most", "largest_norm", "seconds"),
        sum: ("samples", "nan_adversaries", "nan_logits", "unconfirmed"),
        _added: ("forwards", "backwards"),
    }
    for function, names in together.items():
        changes |= {name: function([getattr(record, name) for record in records]) for name in names}
    return replace(first, **changes)


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(each.get(name, 0) for each in counts) for name in counts[0]}


def _accuracies(parts: Iterable[str], fooled_by: Tensor) -> dict[str, float]:
    """Share of the samples that stand after each part."""
    names = ["clean", *parts]
    return {
        name: ((fooled_by == STANDS) | (fooled_by > number)).double().mean().item() for number, name in enumerate(names)
    }


@dataclass(frozen=True)
class AutoAttackResult:
    """Per sample: correct, bool[N]: right as it is, and no attack fools; fooled_by, int64[N]: -1 where it stands, 0
    where it is wrong as it is, else the number of the part, from 1 on; adv [N, ...]: the adversary, or x where there
    is none."""

    correct: Tensor
    fooled_by: Tensor
    adv: Tensor
    record: AutoAttackRecord

    @property
    def accuracy(self) -> float:
        """The robust accuracy, in [0, 1]."""
        return self.correct.double().mean().item()


class Counted(nn.Module):
    """A network whose passes are counted, in samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, False
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = logits_of(self.model(x))
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


@dataclass
class _Standing:
    """Where an evaluation stands between two attacks. clean: logits. done: how many attacks are."""

    clean: Tensor
    fooled_by: Tensor
    done: int = 0
    forwards: dict[str, int] = field(default_factory=dict)
    backwards: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Evaluation:
    """One run of a plan on a data set; ``AutoAttack.run`` explains the arguments."""

    def __init__(
        self, plan: Plan, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, batch_size: int,
        path: Path | None, save_every: float, search_precision: str, say: Say | None,
    ) -> None:  # fmt: skip
        self.plan, self.model, self.network, self.training = plan, model, Counted(model), model.training
        self.x, self.y, self.ids = x.detach(), class_indices("y", y, x), ids
        self.batch_size, self.path, self.save_every = batch_size, path, save_every
        self.search_precision, self.say = search_precision, say or (lambda line: None)
        self.device = next((parameter.device for parameter in model.parameters()), x.device)
        self.adv = self.x.clone()
        self.begun: dict[str, Any] | None = None  # where a part stands that another process began
        self.progress = Progress()
        self.since = self.saved_at = time.monotonic()

    def run(self) -> AutoAttackResult:
        with self._attacking("checks", "fp32"):
            self._begin()
        for name in list(self.searches)[self.at.done :]:
            with self._attacking(name, self.search_precision):
                self._part(name)
        with self._attacking("checks", "fp32"):
            return self._end()

    @contextmanager
    def _attacking(self, name: str, precision: str) -> Iterator[None]:
        with Execution(precision), attacking(self.model, "eval", self.plan.key(name), device=self.device):
            yield

    # Before the attacks

    def _begin(self) -> None:
        batch = self._batch(Search(self.plan.eps, norm=self.plan.norm), "checks")
        first = batch.rows(batch.every_row()[: self.batch_size]).to(self.device)
        found = examine(self.network, first, self.y, self.training, self.plan.version)
        self.classes, self.randomised, self.notes = found.classes, found.randomised, found.notes
        self.searches, self.instead = self.plan.searches(found.classes)
        if not found.differentiable:
            self._leave_out_gradients()
        for name, part in self.searches.items():
            part.rounds(self.classes)  # raises where there are too few
            self._batch(part, name)  # raises for images of a shape that it does not take
        for change in self.instead:
            warnings.warn(f"AutoAttack: {change}", stacklevel=6)
        self.whose = self._whose() if self.path else {}
        held = saved.load(self.path, self.whose, len(self.x)) if self.path else None
        if held is None:
            clean = self._predict(self.x)
            self.at = _Standing(clean, torch.where(predicted(clean) == self.y, STANDS, CLEAN))
        else:
            self._go_on(held)
        self._count("checks")
        single = self.plan.version == "custom" and len(self.searches) == 1
        what = next(iter(self.searches)) if single else f"AutoAttack {self.plan.version}"
        self.say(
            f"{what}, {self.plan.norm}, eps {self.plan.eps:.5g}: {counted(len(self.x), 'image')}, "
            f"{(self.at.fooled_by != CLEAN).double().mean().item():.2%} right without an attack"
        )

    def _leave_out_gradients(self) -> None:
        blind = {name: part for name, part in self.searches.items() if not part.gradients}
        dropped = ", ".join(name for name in self.searches if name not in blind)
        if dropped and not blind:
            raise ValueError(
                f'the model has no gradient, which {dropped} would follow: choose version="standard", which goes on '
                'with Square, or "custom" with parts that need none'
            )
        self.searches = blind
        self.instead += (f"no {dropped}, as the model has no gradient",) if dropped else ()

    def _whose(self) -> dict[str, Any]:
        return {
            "version": self.plan.version, "norm": self.plan.norm, "eps": float(self.plan.eps), "seed": self.plan.seed,
            "search_precision": self.search_precision,
            "attacks": {name: str(part) for name, part in self.searches.items()},
            "weights": saved.weights_of(self.model), "images": saved.digest([self.x]),
            "labels": saved.digest([self.y]), "ids": saved.digest([self.ids]),
        }  # fmt: skip

    def _go_on(self, held: dict[str, Any]) -> None:
        """From a file whose weights, data and settings are these."""
        self.begun, adv = held.pop("pool"), held.pop("adv")
        held["clean"], held["fooled_by"] = (held[name].to(self.x.device) for name in ("clean", "fooled_by"))
        self.at = _Standing(**held)
        self.adv[self.at.fooled_by > CLEAN] = adv.to(self.x.device)
        before, now = self.at.clean[: self.batch_size], self._predict(self.x[: self.batch_size])
        apart = float((before - now).nan_to_num().abs().max() / before.nan_to_num().abs().max().clamp(min=1e-12))
        if apart > _SAME_NETWORK and not self.randomised:
            raise ValueError(
                f"state_path {self.path} is of another evaluation: the model's clean logits differ by {apart:.1%} from "
                "those, though its weights are the same (has its code changed?). Name another file, or remove it to "
                "begin anew"
            )
        self.say(f"going on from {self.path}: {self.at.done} of {len(self.searches)} attacks are done")

    # The attacks

    def _part(self, name: str) -> None:
        """One attack on all that still stand."""
        search, standing = self.searches[name], self.at.fooled_by == STANDS
        batch = replace(self._batch(search, name), clean=self.at.clean)
        pool = Pool(
            search, batch, self.batch_size, ~standing, device=self.device, confirm=self._confirm,
            doubtful=self.search_precision != "fp32",
        )  # fmt: skip
        if self.begun is not None:
            pool.restore(self.begun)
        self.begun, self.progress = None, Progress()
        try:
            while pool.turn(self.network):
                if self.path and time.monotonic() - self.saved_at >= self.save_every:
                    self._save(name, pool)
                if self.progress.is_due(self._passed(name)):
                    self._tell(name, pool)
        except BaseException:  # Ctrl-C, say, or no memory
            self._save(name, pool)
            raise
        found = pool.fooled & standing
        self.adv[found] = pool.adv[found]
        self.at.done += 1
        self.at.fooled_by[found] = self.at.done
        self._save(name)
        self.say(f"{name}: robust accuracy {self._standing():.2%} after {duration(self._seconds())}")

    def _batch(self, search: Search, name: str) -> Batch:
        return search.batch(self.x, self.y, key=self.plan.key(name).to(self.x.device), ids=self.ids)

    @torch.no_grad()
    def _confirm(self, batch: Batch, points: Tensor) -> tuple[Tensor, Tensor]:
        """The points as they are stored, and which of them the network misclassifies."""
        kept = within(batch, points)
        with torch.autocast(self.device.type, enabled=False):
            logits = batch.goal.predict(self.network, kept)
        assert batch.goal.labels is not None
        return kept, predicted(logits).ne(batch.goal.labels) & kept.isfinite().flatten(1).all(1)

    def _save(self, name: str, pool: Pool | None = None) -> None:
        self._count(name)
        now = time.monotonic()
        self.at.seconds, self.since, self.saved_at = self._seconds(), now, now
        if self.path is None:
            return
        state = {**vars(self.at), "clean": self.at.clean.cpu(), "fooled_by": self.at.fooled_by.cpu()}
        adv = self.adv[self.at.fooled_by > CLEAN].cpu()
        saved.save(self.path, self.whose, {**state, "adv": adv, "pool": None if pool is None else pool.saved()})

    def _tell(self, name: str, pool: Pool) -> None:
        """Robust accuracy so far, and about how long it takes if no other is fooled."""
        standing = len(self.x) - int(pool.fooled.sum())
        later = list(self.searches.values())[self.at.done + 1 :]
        to_come = pool.left() + sum(standing * part.rounds(self.classes) * part.length * part.passes for part in later)
        left = self.progress.left(self._passed(name), to_come)
        self.say(f"{name}: robust accuracy {standing / len(self.x):.2%} so far{left}")

    # After them

    def _end(self) -> AutoAttackResult:
        """Judges every sample once more, as it is stored."""
        logits = self._predict(self.adv)
        wrong, claimed = predicted(logits) != self.y, self.at.fooled_by > CLEAN
        norms = distances(self.adv, self.x, self.plan.norm)
        inside = ((self.adv >= 0) & (self.adv <= 1)).flatten(1).all(1) & (norms <= self.plan.eps)
        denied = claimed & ~(wrong & inside)
        self.at.fooled_by[denied] = STANDS
        if not self.randomised:  # else x is judged once, as its adversaries are
            self.at.fooled_by[~claimed & wrong] = CLEAN
            self._note_denied(int(denied.sum()))
        self._count("checks")
        correct, confirmed = self.at.fooled_by == STANDS, claimed & ~denied
        self.adv = torch.where(column(denied, self.adv), self.x, self.adv)
        found = self.adv[confirmed]
        least, most = found.aminmax() if len(found) else (torch.zeros(()), torch.zeros(()))
        record = AutoAttackRecord(
            version=self.plan.version, norm=self.plan.norm, eps=float(self.plan.eps), seed=self.plan.seed,
            samples=len(self.x), search_precision=self.search_precision, batch_size=self.batch_size,
            parts={name: str(part) for name, part in self.searches.items()},
            accuracy=_accuracies(self.searches, self.at.fooled_by),
            instead=self.instead, notes=self.notes, largest_norm=float(norms[confirmed].max()) if len(found) else 0.0,
            nan_adversaries=int(found.isnan().flatten(1).any(1).sum()), least=float(least), most=float(most),
            nan_logits=int((logits.isnan() | self.at.clean.isnan()).any(1).sum()), unconfirmed=int(denied.sum()),
            forwards=self.at.forwards, backwards=self.at.backwards, seconds=self._seconds(),
        )  # fmt: skip
        self.say(f"robust accuracy {self._standing():.2%} after {duration(record.seconds)}")
        return AutoAttackResult(correct, self.at.fooled_by, self.adv, record)

    def _note_denied(self, count: int) -> None:
        if not count:
            return
        note = (
            f"{counted(count, 'image')} had an adversary that the last check did not confirm, and count as robust: the "
            "figure may be too high by as many. The logits depend on the images beside or on the hardware"
        )
        warnings.warn(note, stacklevel=5)
        self.notes += (note,)

    def _predict(self, x: Tensor) -> Tensor:
        """The logits of all, where x lies."""
        parts = (part.to(self.device) for part in x.split(self.batch_size))
        return torch.cat([Objective().predict(self.network, part).to(x.device) for part in parts])

    def _standing(self) -> float:
        return (self.at.fooled_by == STANDS).double().mean().item()

    def _passed(self, name: str) -> int:
        counted = self.at.forwards.get(name, 0) + self.at.backwards.get(name, 0)
        return counted + self.network.forwards + self.network.backwards

    def _count(self, name: str) -> None:
        for counts, more in ((self.at.forwards, self.network.forwards), (self.at.backwards, self.network.backwards)):
            counts[name] = counts.get(name, 0) + more
        self.network.forwards = self.network.backwards = 0

    def _seconds(self) -> float:
        return self.at.seconds + time.monotonic() - self.since
