"""What an evaluation found: figures with the signs beside them, as tables, as JSON, by class and by image."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atlas_kernels.attacks.progress import counted

from .. import tables
from ..options import Norm, fraction, radius
from ..tables import Form
from .named import AUTOATTACK, CLEAN
from .outcome import Outcome, by_class
from .signs import Probe, Sign

MARK = "!"  # beside a figure that a sign is about
ALL = "all"
#: The fields of a model's record at RobustBench (model_info/DATASET/THREAT/NAME.json), in its order; what only the
#: authors know is null.
RECORD = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Accuracies of one network under several attacks at several radii, and what stands against trusting them.

    labels, numbers: of the images, and where they stand in the whole set. outcomes: clean first, then by radius.
    signs: what stands against a figure; probe: what few images said of the network. facts: more for the record.
    seconds: with those that AutoAttack took before it was stopped and went on.
    """

    labels: Tensor
    numbers: Tensor
    outcomes: tuple[Outcome, ...]
    norm: Norm
    seed: int
    device: str
    seconds: float
    signs: tuple[Sign, ...] = ()
    probe: Probe | None = None
    class_names: Sequence[str] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.table()

    @property
    def clean(self) -> float:
        """Accuracy on the images as they are."""
        return self.outcomes[0].accuracy

    @property
    def radii(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(o.eps for o in self.outcomes if o.eps is not None))

    def outcome(self, attack: str, eps: float | None = None) -> Outcome:
        """What an attack left, at that radius or at the first. Raises KeyError where it was not run."""
        for outcome in self.outcomes:
            if outcome.attack.name == attack and (eps is None or outcome.eps in (None, eps)):
                return outcome
        raise KeyError(self._not_run(attack, eps))

    def accuracy(self, attack: str, eps: float | None = None) -> float:
        """In [0, 1]; "all" is the share of the images that no attack moved."""
        return self.standing(eps).double().mean().item() if attack == ALL else self.outcome(attack, eps).accuracy

    def standing(self, eps: float | None = None) -> Tensor:
        """Which images are right under every attack at that radius (default: the first): the most one may claim. Raises
        KeyError for a radius at which none was run."""
        if eps is not None and eps not in self.radii:
            raise KeyError(self._not_run("no attack", eps))
        at = eps if eps is not None or not self.radii else self.radii[0]
        return torch.stack([o.right for o in self.outcomes if o.eps in (None, at)]).all(0)

    @property
    def error(self) -> float:
        """The largest standard error that an accuracy over so many images can have."""
        return 0.5 / math.sqrt(len(self.labels))

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(outcome.attack.name for outcome in self.outcomes))

    def _not_run(self, attack: str, eps: float | None) -> str:
        said = f"{attack} was{'' if attack.startswith('no ') else ' not'} run{'' if eps is None else f' at eps {eps}'}"
        return f"{said}: there are {', '.join(self._names)}, at eps {', '.join(map(str, self.radii)) or 'none'}"

    def table(self, form: Form = "text") -> str:
        """A row for each radius, a column for each attack, and what stands against the figures."""
        return tables.written(self._rows(), form, self._remarks())

    def _rows(self) -> tables.Table:
        labels = [self.outcome(name).attack.label for name in self._names]
        several = len(labels) > 2
        if not self.radii:
            return [(labels[0],), (self._cell(CLEAN, None),)]
        header = ("eps", *labels, *([ALL] if several else []))
        rows: list[tuple[str, ...]] = []
        for eps in self.radii:
            cells = [self._cell(name, eps) for name in self._names]
            cells += [f"{100 * self.accuracy(ALL, eps):.1f} %"] if several else []
            rows.append((radius(eps, self.norm), *cells))
        return [header, *rows]

    def _cell(self, name: str, eps: float | None) -> str:
        outcome = self.outcome(name, eps)
        marked = any(sign.of(outcome) for sign in self.signs if name != CLEAN or sign.attack == CLEAN)
        return outcome.percent + (f" {MARK}" if marked else "")

    def _remarks(self) -> list[str]:
        """The lines below the table."""
        lines = [
            f"{counted(len(self.labels), 'image')}, standard error at most {100 * self.error:.1f} points; seed "
            f"{self.seed}; {self.seconds:.0f} s on {self.device}"
        ]
        if ALL in self._rows()[0]:
            lines[0] += "; all: right under every attack"
        if self.radii and AUTOATTACK not in self._names:
            lines.append("without autoattack these figures are upper bounds: robust accuracy may be lower")
        return lines + [f"{MARK} {self._about(sign)}{sign.text}" for sign in self.signs]

    def _about(self, sign: Sign) -> str:
        if sign.attack is None:
            return ""
        outcome = self.outcome(sign.attack, sign.eps)
        return f"{outcome.attack.label}{f' at {outcome.ball}' if sign.eps is not None else ''}: "

    def class_table(self, form: Form = "text") -> str:
        """A table for each radius, with a row for each class and a column for each attack."""
        return "\n\n".join(tables.written(self._class_rows(eps), form) for eps in self.radii or (None,))

    def _class_rows(self, eps: float | None) -> tables.Table:
        columns = {o.attack.label: o.right for o in self.outcomes if o.eps in (None, eps)}
        if len(columns) > 2:
            columns[ALL] = self.standing(eps)
        shares = [by_class(right, self.labels) for right in columns.values()]
        corner = f"class, eps {radius(eps, self.norm)}" if eps is not None and len(self.radii) > 1 else "class"
        rows: list[tuple[str, ...]] = [(corner, "images", *columns)]
        for label in shares[0]:
            name = self.class_names[label] if self.class_names else str(label)
            count = int((self.labels == label).sum())
            rows.append((name, f"{count:,}", *(f"{100 * share[label]:.1f} %" for share in shares)))
        return rows

    def samples_csv(self) -> str:
        """A row for each image: its number in the set, its label, and 1 or 0 for right or wrong in each column."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [f"{o.attack.name}{'' if o.eps is None else f'@{fraction(o.eps)}'}" for o in self.outcomes]
        writer.writerow(["image", "label", *names])
        rights = torch.stack([o.right for o in self.outcomes]).int().T.tolist()
        writer.writerows(
            [number, label, *right]
            for number, label, right in zip(self.numbers.tolist(), self.labels.tolist(), rights, strict=True)
        )
        return text.getvalue()

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """By attack, accuracy over eps from 0, where it is clean accuracy; and under all of them."""
        names = [*self._names[1:], *([ALL] if len(self._names) > 2 else [])]
        labels = {name: name if name == ALL else self.outcome(name).attack.label for name in names}
        zero = (0.0, self.clean)
        radii = sorted(self.radii)
        return {labels[name]: [zero, *((eps, self.accuracy(name, eps)) for eps in radii)] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The record of RobustBench for the first radius; all that was measured is in "evaluation"."""
        return self.record() | {"threat_model": {"linf": "Linf", "l2": "L2", "l1": "L1"}[self.norm]} | {
            "evaluation": self.evaluation()
        }  # fmt: skip

    def record(self, eps: float | None = None) -> dict[str, Any]:
        """The record of RobustBench at a radius (default: the first); autoattack_acc only of the standard version."""
        eps = eps if eps is not None or not self.radii else self.radii[0]
        standard = next(
            (o for o in self.outcomes if o.attack.name == AUTOATTACK and o.eps == eps and _is_standard(o)), None
        )
        known = {
            "additional_data": self.facts.get("additional_data"),
            "number_forward_passes": 1,
            "dataset": self.facts.get("dataset"),
            "architecture": self.facts.get("architecture"),
            "eps": None if eps is None else fraction(eps),
            "clean_acc": f"{100 * self.clean:.2f}",
            "autoattack_acc": standard and f"{100 * standard.accuracy:.2f}",
            "footnote": counted(len(self.labels), "image"),
            "unreliable": any(sign.eps in (None, eps) for sign in self.signs),
        }
        return {key: known.get(key) for key in RECORD}

    def evaluation(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {
            "images": len(self.labels),
            "norm": self.norm,
            "seed": self.seed,
            "device": self.device,
            "seconds": self.seconds,
            "attacks": [_described(o, self.labels) for o in self.outcomes],
            "all": [{"eps": eps, "accuracy": self.accuracy(ALL, eps)} for eps in self.radii],
            "signs": [vars(sign) for sign in self.signs],
            "probe": self.probe and self.probe.to_dict(),
            **self.facts,
        }


def _is_standard(outcome: Outcome) -> bool:
    return outcome.settings.get("version") == "standard" and not outcome.settings.get("instead")


def _described(outcome: Outcome, labels: Tensor) -> dict[str, Any]:
    own = {
        "attack": outcome.attack.name,
        "eps": outcome.eps,
        "accuracy": outcome.accuracy,
        "per_class": {str(label): share for label, share in by_class(outcome.right, labels).items()},
        "nan": outcome.nan,
        "seconds": outcome.seconds,
        **outcome.settings,
    }
    if outcome.eps is not None:
        own |= {"largest_distance": outcome.distance, "min": outcome.low, "max": outcome.high}
    return own | ({"after_each_part": dict(outcome.parts)} if outcome.parts else {})
