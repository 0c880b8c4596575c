"""Attacks by name: "fgsm", "pgd-20", "pgd-50-10", "autoattack"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atlas_kernels.attacks import CWPGD, FGSM, MIFGSM, PGD, Attack

from ..options import Norm, shown, suggestion

#: What an attack needs of the network: nothing, one gradient, several gradients, logits alone, or all of these.
Kind = Literal["clean", "one step", "iterative", "black box", "ensemble"]
CLEAN, AUTOATTACK = "clean", "autoattack"
#: What is run where nothing is named.
USUAL = (CLEAN, "fgsm", "pgd-20")
#: Names with numbers of steps and, where there are several, of restarts; and what tables call them.
_STEPPED = {"pgd": "PGD", "cw": "CW-PGD", "mifgsm": "MI-FGSM"}
_PLAIN: dict[str, tuple[str, Kind]] = {
    CLEAN: ("clean", "clean"),
    "fgsm": ("FGSM", "one step"),
    "apgd": ("APGD", "iterative"),
    "apgd-ce": ("APGD-CE", "iterative"),
    "apgd-t": ("APGD-T", "iterative"),
    "fab-t": ("FAB-T", "iterative"),
    "square": ("Square", "black box"),
    AUTOATTACK: ("AutoAttack", "ensemble"),
}
#: Parts of AutoAttack's standard version, which run alone too.
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
KNOWN = (*_PLAIN, "pgd-STEPS", "pgd-STEPS-RESTARTS", "cw-STEPS", "cw-STEPS-RESTARTS", "mifgsm-STEPS")
ABOUT = (
    "clean; fgsm; pgd-20 (20 steps), pgd-50-10 (50 steps, 10 restarts); cw-20 (PGD on the CW margin); mifgsm-10 "
    "(MI-FGSM); autoattack (see --autoattack-version); its parts apgd-ce, apgd-t, fab-t, square alone; apgd (the first "
    "two, one after the other)"
)


@dataclass(frozen=True)
class Named:
    """An attack by its name, and how tables call it. steps, restarts: 0 where the name has none."""

    name: str
    label: str
    kind: Kind
    steps: int = 0
    restarts: int = 0

    @property
    def searches(self) -> bool:
        """Whether ``AutoAttack`` runs it."""
        return self.name in (AUTOATTACK, "apgd", *PARTS)

    def attack(self, eps: float, norm: Norm, step_size: float | None = None) -> Attack:
        """The attack on gradients in that ball; step_size: of PGD, default 2.5 eps / steps, in l1 PGD's own."""
        if self.name == "fgsm":
            return FGSM(eps, norm=norm)
        base = self.name.partition("-")[0]
        if base == "mifgsm":
            return MIFGSM(eps, steps=self.steps, norm=norm)
        size = default_step(eps, self.steps, norm, step_size)
        several = self.restarts > 1  # a sample that is fooled needs no further one
        kind = CWPGD if base == "cw" else PGD
        return kind(eps, size, self.steps, norm=norm, restarts=self.restarts, compact=several)


def default_step(eps: float, steps: int, norm: Norm, step_size: float | None = None) -> float | None:
    """The size of PGD's steps; None: those that PGD has by itself in l1."""
    return 2.5 * eps / steps if step_size is None and norm != "l1" else step_size


def named(names: Sequence[str] | str) -> tuple[Named, ...]:
    """The attacks of these names, each once, clean accuracy first. Raises ValueError that names the nearest."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError(f"attacks must name one or more of {', '.join(KNOWN)}, got none")
    found = [_named(name) for name in (CLEAN, *names)]
    return tuple(dict.fromkeys(found))


def _named(name: Any) -> Named:
    text = str(name).lower()
    if text in _PLAIN:
        return Named(text, *_PLAIN[text])
    match = re.fullmatch(rf"({'|'.join(_STEPPED)})-(\d+)(?:-(\d+))?", text)
    if match is None:
        near = suggestion(name, (*_PLAIN, "pgd-20", "cw-20", "mifgsm-10", "pgd-50-10"))
        raise ValueError(f"attacks: nothing known as {shown(name)}{near} (known: {', '.join(KNOWN)})")
    base, steps, restarts = match[1], int(match[2]), int(match[3] or 1)
    if not 1 <= steps <= 10**6 or not 1 <= restarts <= 10**4 or (base == "mifgsm" and match[3]):
        most = "steps from 1 to 1000000" + (" alone" if base == "mifgsm" else ", restarts from 1 to 10000")
        raise ValueError(f"attacks: {base} takes {most}, got {shown(name)}: write {base}-20")
    label = f"{_STEPPED[base]}-{steps}" + (f"-{restarts}" if restarts > 1 else "")
    return Named(f"{base}-{steps}" + (f"-{restarts}" if restarts > 1 else ""), label, "iterative", steps, restarts)
